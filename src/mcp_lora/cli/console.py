"""All output: messages on stderr, results on stdout, a progress bar on a terminal."""

import json
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import groupby
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from mcp_lora.data import dataset
from mcp_lora.data.records import Statistics
from mcp_lora.evaluate.benchmark import is_asked_in
from mcp_lora.prompts import chat_template as prompts

QUIET = False  # set by --quiet


@contextmanager
def progress() -> Iterator[Callable[[str, float], None]]:
    """Show a progress bar on a terminal while the block runs."""
    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
        tasks: dict[str, Any] = {}

        def show(step: str, fraction: float) -> None:
            if step not in tasks:
                tasks[step] = bar.add_task(step, total=1)
            bar.update(tasks[step], completed=fraction)

        yield show


def _table(
    title: str, columns: Sequence[str], rows: Iterable[Sequence[object]], texts: Collection[str]
) -> None:
    """Print a table; columns other than `texts` are numbers, aligned right."""
    table = Table(title=Text(harmless(title), no_wrap=True, overflow="ignore"), title_justify="left")
    for column in columns:
        if column in texts:
            table.add_column(column, overflow="fold", min_width=9)
        else:
            table.add_column(column.replace("_", " "), justify="right")
    for row in rows:
        table.add_row(*(Text(harmless(str(cell))) for cell in row))
    console = Console()
    if not console.is_terminal:
        console.width = 120  # a file has no width
    console.print(table)


def show_statistics(statistics: Statistics, out: Path) -> None:
    """Print a table of a conversion into `out` by file, and its messages and warnings."""
    written, sources = statistics.written, statistics.sources
    files = [os.path.abspath(source.file) for source in sources]
    common = os.path.commonpath(map(os.path.dirname, files))
    near = os.path.relpath(common)
    rows = []
    for file, source in zip(files, sources, strict=True):
        splits = [source.written[split] for split in written]
        cleaned, rejected = counts(source.cleaned) or 0, counts(source.rejected) or 0
        name = os.path.relpath(file, common)
        rows.append([name, source.format, source.read, cleaned, *splits, rejected])
    title = f"{statistics.read} rows of {common if near.startswith('..') else near}"
    columns = ["file", "format", "read", "normalized", *written, "rejected"]
    _table(title, columns, rows, texts=("file", "format", "normalized", "rejected"))
    for line in dataset.summary(statistics, out):
        say(line)


def show_sample(sample: Any, template: Any, ids: bool) -> None:
    """Print a rendered sample; the targets are green, or in ⟦ ⟧ without colours."""
    console = Console()
    marks = "{}" if console.is_terminal and not console.no_color else "⟦{}⟧"
    pairs = zip(sample.input_ids, sample.labels, strict=True)
    for trained, run in groupby(pairs, key=lambda pair: pair[1] != prompts.IGNORED):
        tokens = [token for token, _ in run]
        text = harmless(" ".join(map(str, tokens)) if ids else template.tokenizer.decode(tokens))
        styled = Text(marks.format(text) if trained else text, style="bold green" if trained else "dim")
        console.print(styled, end="\n" if ids else "", soft_wrap=True)
    console.print()
    count = sum(label != prompts.IGNORED for label in sample.labels)
    say(f"{len(sample.input_ids)} tokens, {count} of them trained on")


def show_evaluation(evaluation: Any) -> None:
    """Print tables of an evaluation's metrics, the worst tools, and three questions with answers."""
    for name, split in evaluation.splits.items():
        rows = []
        for metric in next(iter(split.metrics.values())):
            cells = [metric]
            for found in (metrics[metric] for metrics in split.metrics.values()):
                cells.append(f"{100 * found.rate:.1f} ({100 * found.low:.0f}…{100 * found.high:.0f})")
            for gain in (gains[metric] for gains in split.gains.values()):
                reach = f"{100 * gain.low:+.0f}…{100 * gain.high:+.0f}"
                cells += [f"{100 * gain.difference:+.1f} ({reach})", f"{gain.p:.1g}"]
            rows.append(cells)
        columns = ["", *split.metrics, *["difference", "p"] * len(split.gains)]
        kind = "" if is_asked_in(name) else "held-out "
        title = f"{name}: {split.count} {kind}questions; % (95 % interval)"
        _table(title, columns, rows, texts=("",))
        for model, errors in split.errors.items():
            if errors:
                show(f"errors of {model}: {counts(errors)}")
    if found := evaluation.plain_chat:
        advice = "; that is much: mcp-lora convert --keep-plain" * found.is_high
        moved = f"{found.divergence:.2f} nats per token, {found.first:.2f} at the first of an answer"
        show(f"\nPlain chat has moved by {moved}{advice}")
    last, worst = list(evaluation.answers)[-1], []
    for place in evaluation.tools[:5]:
        right, server = place.right[last], f" of {place.server}" if place.server else ""
        if right.rate < 1:
            worst.append(f"{place.tool}{server} {right.right}/{right.count}")
    if worst:
        show(f"\nTools that need more data, the worst of {last} first: {', '.join(worst)}")
    asked = list(zip(*evaluation.answers.values(), strict=True))
    for row in asked[:: max(1, len(asked) // 3)][:3]:
        Console().print(Text(f"\n{harmless(row[0].instruction)}", style="bold"), soft_wrap=True)
        for model, answer in zip(evaluation.answers, row, strict=True):
            mark = "✗" if answer.verdict.error else "✓"
            said = answer.text or json.dumps([call._asdict() for call in answer.calls])
            show(f"  {model} {mark} {' '.join(said.split())[:300]}")


def show_generated(lines: Sequence[Any]) -> None:
    """Print a table of generated rows by tool, and what was thrown away and why."""
    rows = Counter(f"{line['server']}.{line['tool']}" for line in lines if not line["reason"])
    rejected = Counter(line["reason"] for line in lines if line["reason"])
    prompts, answers = (sum(line["tokens"][place] for line in lines) for place in (0, 1))
    _table(f"{rows.total()} rows", ["tool", "rows"], rows.most_common(), texts=("tool",))
    say(f"rejected: {counts(dict(rejected.most_common())) or 'none'}")
    say(f"the teacher's tokens: {prompts:,} of prompts, {answers:,} of answers")


def show_turn(who: str, text: str) -> None:
    """Print a turn of a chat; calls and results are dim."""
    if who == "note":
        say(text)
    elif who == "assistant":
        Console().print(Text(f"Assistant: {harmless(text)}"), soft_wrap=True)
    else:
        mark = {"call": "→", "result": "←"}[who]
        Console().print(Text(f"{mark} {harmless(text)}", style="dim"), soft_wrap=True)


def ask(question: str) -> str | None:
    """Return a line of input, None at its end."""
    with suppress(ImportError):
        import readline  # noqa: F401  # importing it gives input() history and editing
    try:
        return input(harmless(question)).strip()
    except EOFError:
        show("")
        return None


def counts(counted: dict[str, int]) -> str:
    """Return counts as text: 3 schema, 1 no-call."""
    return ", ".join(f"{count} {what}" for what, count in counted.items())


def show(text: str) -> None:
    """Print a result on stdout."""
    typer.echo(harmless(text))


def say(text: str) -> None:
    """Print a message on stderr; if quiet, only warnings and errors."""
    if not QUIET or text.startswith("error: ") or "warning: " in text:
        typer.echo(f"mcp-lora: {harmless(text)}", err=True)


def harmless(text: str) -> str:
    """Return text, which may come from data, without a terminal's control characters."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]", "\ufffd", text)
