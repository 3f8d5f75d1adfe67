"""The report on a run, or on several side by side: one self-contained HTML file.

It is made from the files in the runs' folders, and shows which of them are missing: run.yaml, manifest.json,
trainer_state.json, eval/*.jsonl, eval/bfcl/*.jsonl, eval/plain_chat.json. Its Jinja template is page.html.
"""

import difflib
import json
import shlex
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from itertools import chain
from math import isfinite
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from mcp_lora.data import files
from mcp_lora.errors import McpLoraError, advice, explained
from mcp_lora.evaluate import answers, evaluation, plain_chat
from mcp_lora.evaluate.answers import Answer
from mcp_lora.evaluate.benchmark import NAME
from mcp_lora.evaluate.evaluation import ADAPTER, BASE, summarise
from mcp_lora.evaluate.score import ERRORS
from mcp_lora.train import manifest, runs, steps
from mcp_lora.train.manifest import Manifest

EXAMPLES = 3  # of each outcome and split
_OUTCOMES = ("lost", "wrong", "gained", "right")  # in the order in which examples are shown


@dataclass(frozen=True)
class Run:
    """The content of a run's folder: run.yaml, manifest.json, the models' answers, the base's first.

    `answers` are by subfolder of RUN/eval: "", and the benchmark's.
    `history` is the trainer's log, in transformers' keys, or the newest checkpoint's if training is not
    finished. `name` is the run's name on the page.
    """

    name: str
    folder: Path
    config: dict[str, Any]
    manifest: Manifest | None
    history: list[dict[str, Any]]
    answers: dict[str, dict[str, list[Answer]]]

    @cached_property
    def adapter(self) -> Path | None:
        """The folder of the newest adapter, if there is one."""
        with suppress(McpLoraError):
            return runs.adapter(self.folder)
        return None

    def curve(self, key: str) -> list[tuple[float, float]]:
        """Return the logged values of a key: (step, value)."""
        logged = ((row["step"], row[key]) for row in self.history if key in row and "step" in row)
        return [(step, value) for step, value in logged if isfinite(value)]


def write(folders: Sequence[Path], output: Path | None = None) -> Path:
    """Write `output`, by default report.html in a run's folder, or comparison.html in the first of several.

    Raises McpLoraError if a folder contains no run or a damaged one, or the page cannot be written.
    """
    several = len(folders) > 1
    file = output or folders[0] / ("comparison.html" if several else "report.html")
    page = _render([_read(folder, str(folder) if several else folder.resolve().name) for folder in folders])
    again = f"free space or fix permissions, and mcp-lora report {shlex.join(map(str, folders))}"
    with explained(f"{file} cannot be written", again):
        file.write_text(page, encoding="utf-8", errors="replace")
    return file


def _render(found: Sequence[Run]) -> str:
    """Return the page; the adapters of several runs are compared with the first one's."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    several = len(found) > 1
    (compared, notes), (judged, judged_notes) = (_compared(found, place) for place in ("", NAME))
    by_model = compared.answers if compared else {}
    base = Path(found[0].config["model_name_or_path"])
    wrong = {one.verdict.error for each in by_model.values() for one in each}
    curves: dict[str, list[Any]] = defaultdict(list)
    for colour, run in enumerate(found, 0 if several else 1):  # the colour of the adapter's bars
        for name, key in (("loss", "loss"), ("loss", "eval_loss"), ("learning rate", "learning_rate")):
            if points := run.curve(key):
                curves[name].append((colour, key, points))
    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined)
    return environment.get_template("page.html").render(
        runs=found,
        advice=advice,
        several=several,
        base=base.name if base.is_absolute() else base,
        made_of=_side_by_side([_made_of(run) for run in found]),
        settings=_side_by_side([run.config for run in found]),
        evaluation=compared,
        notes=notes,
        models=list(by_model),
        judged=judged,
        judged_notes=judged_notes,
        unasked=[run.folder for run in found if ADAPTER not in run.answers[""]],
        examples=_examples(by_model),
        errors={error: f"var(--error-{place})" for place, error in enumerate(ERRORS) if error in wrong},
        curves=curves,
        validated=any(run.curve("eval_loss") for run in found),
        usage=None if several else _usage(found[0]),
        plain_chat=[
            (run.name, kept)
            for run in found
            if run.adapter and (kept := plain_chat.kept_of(run.folder, run.adapter))
        ],
    )


def compare(expected: str, answer: str) -> list[tuple[str, str]]:
    """Return the lines of two texts: "same", "extra" if not expected, "missing" if expected only."""
    if expected == answer:
        return [("same", expected)]
    one, other = expected.split("\n"), answer.split("\n")
    lines = list(difflib.unified_diff(one, other, n=len(one), lineterm=""))[3:]  # without its header
    kinds = {" ": "same", "+": "extra", "-": "missing"}
    return [(kinds[line[0]], f"{line[1:]}\n") for line in lines]


def _read(folder: Path, name: str) -> Run:
    config = runs.read_run(folder)
    states = [folder, *runs.complete_checkpoints(folder)[::-1]]
    again = f"remove it, and {advice('report', folder)}"
    logs = (files.load(place / "trainer_state.json", again).get("log_history") for place in states)
    kept = {place: _answers(folder / "eval" / place) for place in ("", NAME)}
    return Run(name, folder, config, manifest.read(folder), next(filter(None, logs), []), kept)


def _answers(folder: Path) -> dict[str, list[Answer]]:
    kept = {unquote(file.stem): answers.read(file) for file in sorted(folder.glob("*.jsonl"))}
    models = [BASE, *(name for name in kept if name not in (BASE, ADAPTER)), ADAPTER]
    return {model: kept[model] for model in models if kept.get(model)}


def _compared(found: Sequence[Run], place: str) -> tuple[evaluation.Evaluation | None, list[str]]:
    """Return the metrics of a run's models, or of several runs' adapters, and notes on what is left out."""
    asked = {run.name: run.answers[place][ADAPTER] for run in found if ADAPTER in run.answers[place]}
    notes: list[str] = []
    if len(found) == 1:
        asked, notes = _comparable(found[0].answers[place])
    by_model, left_out = _common(asked)
    if left_out:
        notes.append(f"{left_out} questions that not all of them have answered are left out.")
    for folder in (run.folder for run in found if _is_stale(run, place)):
        again = advice("eval", folder, *["--benchmark", place] * bool(place))
        notes.append(f"The adapter in {folder}, or mcp-lora, has changed since it was evaluated: {again}")
    for one in found:
        for reason, count in _left_out(one, place):
            notes.append(f"{count} questions could not be asked in {one.folder} ({reason}).")
    return summarise(by_model) if by_model else None, notes


def _comparable(by_model: Mapping[str, list[Answer]]) -> tuple[dict[str, list[Answer]], list[str]]:
    """Leave out the models without an answer to each of the adapter's questions, or of the base's.

    Also returns a note on each. With a server that was asked one question, one question would be left of all.
    """
    main = next((name for name in (ADAPTER, BASE, *by_model) if name in by_model), "")
    asked = {answer.question for answer in by_model.get(main, ())}
    kept, notes = {}, []
    for name, each in by_model.items():
        count = len(asked & {answer.question for answer in each})
        if count == len(asked):
            kept[name] = each
        else:
            notes.append(f"{name} has answered only {count} of {len(asked)} questions and is left out.")
    return kept, notes


def _common(by_model: Mapping[str, list[Answer]]) -> tuple[dict[str, list[Answer]], int]:
    """Return the answers to the questions that all models share, in one order, and the number of others."""
    by_key = {name: {answer.question: answer for answer in each} for name, each in by_model.items()}
    every = dict.fromkeys(chain.from_iterable(by_key.values()))
    common = [key for key in every if all(key in each for each in by_key.values())]
    found = {name: [each[key] for key in common] for name, each in by_key.items()}
    return found if common else {}, len(every) - len(common)


def _made_of(run: Run) -> dict[str, Any]:
    """Return the table of what a run was made from; all its settings are in run.yaml."""
    record = run.manifest or Manifest()
    done, epochs = (max((row.get(key, 0) for row in run.history), default=0) for key in ("step", "epoch"))
    return {
        "base model": run.config["model_name_or_path"],
        "chat template": record.rendered.get("chat_template", "not recorded"),
        "batch": steps.describe_batch(run.config, record.processes).removeprefix("global batch size "),
        "trained": f"{done} steps, {epochs:g} epochs",
        "samples": record.rendered.get("samples", "not recorded"),
        "data": record.data.file if record.data else "not recorded",
        "time": _time(record),
        "hardware": ", ".join(record.gpus) or "CPU",
        "packages": ", ".join(f"{name} {version}" for name, version in record.packages.items()),
        "commit": record.git_commit or "none",
    }


def _time(record: Manifest) -> str:
    if not record.started or not record.ended:
        return f"{record.started}, not finished" if record.started else "not recorded"
    took = datetime.fromisoformat(record.ended) - datetime.fromisoformat(record.started)
    failed = f", failed with exit code {record.exit}" if record.exit else ""
    return f"{record.started}, took {took}{failed}"


def _side_by_side(columns: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[str], bool]]:
    """Return rows of (key, the value in each run, whether they differ), those that differ first."""
    rows = []
    for key in dict.fromkeys(chain.from_iterable(columns)):
        values = [str(column.get(key, "")) for column in columns]
        rows.append((key, values, len(set(values)) > 1))
    return sorted(rows, key=lambda row: not row[2])


def _examples(by_model: Mapping[str, list[Answer]]) -> list[dict[str, Any]]:
    """Return the first EXAMPLES of each outcome and split, so that all are represented.

    Each has the last model's answer, the outcome (right or wrong; gained or lost if the first model's
    differs), the gold calls as text, and (name, error, parts; see `compare`) of each model's answer.
    """
    groups: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for row in zip(*by_model.values(), strict=True):
        first, last = (row[place].verdict.error is None for place in (0, -1))
        outcome = ("right" if last else "wrong") if first == last else ("gained" if last else "lost")
        group = groups[outcome, row[-1].split]
        if len(group) < EXAMPLES:
            expected = _calls(row[-1].expected) or "no call: no candidate tool fits"
            shown = [(name, row[i].verdict.error, _parts(row[i])) for i, name in enumerate(by_model)]
            group.append({"answer": row[-1], "outcome": outcome, "expected": expected, "answers": shown})
    ordered = sorted(groups, key=lambda group: (_OUTCOMES.index(group[0]), group[1]))
    return [example for group in ordered for example in groups[group]]


def _parts(answer: Answer) -> list[tuple[str, str]]:
    if answer.calls and answer.expected:
        return compare(_calls(answer.expected), _calls(answer.calls))
    return [("same", _calls(answer.calls) or answer.text)]


def _calls(calls: Sequence[Any]) -> str:
    return "\n".join(
        f"{call.name} {json.dumps(call.arguments, indent=2, ensure_ascii=False, sort_keys=True)}"
        for call in calls
    )


def _is_stale(run: Run, place: str) -> bool:
    """Tell whether the adapter, or mcp-lora, has changed since the answers in RUN/eval or its subfolder."""
    asked = [found and found.adapter for found in _kept(run, place) if not found or found.adapter]
    return bool(asked) and run.adapter is not None and asked[-1] != runs.adapter_hash(run.adapter)


def _left_out(run: Run, place: str) -> Iterable[tuple[str, int]]:
    """Return how many questions could not be asked in the newest evaluation, by reason."""
    newest = (_kept(run, place) or [None])[-1]
    return newest.left_out.items() if newest else ()


def _kept(run: Run, place: str) -> list[evaluation.Evaluation | None]:
    """Return what is in RUN/eval or its subfolder, the newest last; None if it is of another version."""
    written = (run.folder / "eval" / place).glob("metrics*.json")
    by_time = sorted(written, key=lambda file: file.stat().st_mtime)
    return [evaluation.read(run.folder, file) for file in by_time]


def _usage(run: Run) -> dict[str, str] | None:
    """Return commands and Python code that use a run's adapter, None if it has none."""
    if not run.adapter:
        return None
    base, place = run.config["model_name_or_path"], str(run.adapter.absolute())
    return {
        "Chat with it": shlex.join(["mcp-lora", "chat", str(run.folder)]),
        "Merge it into the base model": shlex.join(["mcp-lora", "export", str(run.folder)]),
        "Load it in Python": f"from peft import PeftModel\n"
        f"from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f"tokenizer = AutoTokenizer.from_pretrained({place!r})  # with the chat template\n"
        f'model = AutoModelForCausalLM.from_pretrained({base!r}, dtype="auto")\n'
        f"model = PeftModel.from_pretrained(model, {place!r})\n",
    }
