"""The command line: it parses, composes the other modules and prints. Nothing else does."""

import json
import os
import re
import shlex
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby, islice
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text
from typer import Argument, Option

from mcp_lora import demo_model
from mcp_lora.data import dataset
from mcp_lora.data.records import Fault
from mcp_lora.engine import api, launch
from mcp_lora.engine.topology import World, worker_rank
from mcp_lora.engine.topology import find as find_world
from mcp_lora.errors import Interrupted, McpLoraError
from mcp_lora.prompts import chat_template as prompts
from mcp_lora.prompts import render
from mcp_lora.train import recipe as configuration
from mcp_lora.train import runs, training
from mcp_lora.train.runs import DEFAULT

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Tune a language model to call MCP tools.",
)

Model = Annotated[str | None, Option(help="Base model: a folder, a hub id, or `embedded`.")]
Recipe = Annotated[Path, Option(help="The recipe.")]
Run = Annotated[Path, Argument(help="A run's folder.", metavar="RUN")]
Checkpoint = Annotated[str | None, Option(help="A checkpoint (300 or checkpoint-300), not the newest.")]

_SPLITS = "seen, unseen_tool, unseen_server or no_call"
_INPUTS = (
    "Tool-call data: files (.json, .jsonl, .jsonl.gz, .parquet), folders, globs; "
    "by default the newest data/filtered/filtered_*.json."
)
_TURNS = "Up to the first call, the whole conversation, or a sample for each of its calls."
_STRICT_SCHEMA = "Reject parameters that the schema does not know."
_REDACT = "Replace keys, mail addresses and home folders; by default in session logs."
_OVERRIDES = "Settings in LLaMA-Factory's names."
_REQUIRE = "End with 1 where it does not hold."
_RUNS = f"A run's folder, by default {DEFAULT}; several are compared."


@app.command()
def convert(
    inputs: Annotated[list[str] | None, Argument(metavar="[INPUT]...", help=_INPUTS)] = None,
    out: Annotated[Path, Option(help="Folder to write.")] = dataset.FOLDER,
    tools: Annotated[list[str] | None, Option(metavar="PATH", help="A tool catalogue; repeatable.")] = None,
    turns: Annotated[Literal["call", "all", "each"], Option(help=_TURNS)] = "call",
    max_observation: Annotated[int, Option(min=1, help="Characters kept of a tool's result.")] = 4000,
    candidates: Annotated[int, Option(min=1, help="Tools per sample, the gold tool included.")] = 10,
    holdout_servers: Annotated[float, Option(min=0, max=0.9, help="Share of servers held out.")] = 0.0,
    holdout_tools: Annotated[float, Option(min=0, max=0.9, help="Share of tools held out.")] = 0.0,
    test: Annotated[float, Option(min=0, max=0.9, help="Share of the other rows held out.")] = 0.1,
    no_call: Annotated[float, Option(min=0, max=1, help="Share of extra rows without gold tool.")] = 0.0,
    seed: Annotated[int, Option(help="Decides what is held out, and the candidates.")] = 42,
    drop_reasoning: Annotated[bool, Option("--drop-reasoning", help="Leave out what was thought.")] = False,
    strict_schema: Annotated[bool, Option("--strict-schema", help=_STRICT_SCHEMA)] = False,
    keep_failed: Annotated[bool, Option("--keep-failed", help="Train on calls that failed, too.")] = False,
    redact: Annotated[bool | None, Option("--redact/--no-redact", help=_REDACT)] = None,
    explain: Annotated[int | None, Option(min=1, help="Show a row in each step, no more.")] = None,
    strict: Annotated[bool, Option("--strict", help="End with 1 if a row is rejected.")] = False,
    max_rejects: Annotated[str, Option(metavar="N", help="End with 1 if more: 5%, or a count.")] = "100%",
) -> None:
    """Turn tool-call data into LLaMA-Factory's dataset format."""
    bound = "0" if strict else max_rejects
    if not re.fullmatch(r"\d+(\.\d+)?%?", bound):
        raise McpLoraError(f"--max-rejects {bound}: neither a share nor a number: --max-rejects 5%")
    held_out = (holdout_servers, holdout_tools, test)
    settings = dataset.Settings(
        inputs or [],
        tools or [],
        turns,
        max_observation,
        candidates,
        *held_out,
        no_call,
        seed,
        drop_reasoning,
        strict_schema,
        keep_failed,
        redact,
    )
    if explain:
        for step, what in dataset.explain(settings, explain):
            text = json.dumps(what, ensure_ascii=False, indent=2, default=str)
            typer.echo(f"# {step}\n{text}".encode(errors="backslashreplace"))  # half a surrogate pair
        return
    with _progress() as progress, dataset.locked(out):
        statistics = dataset.convert(settings, out, progress)
    _print_statistics(statistics, out)
    rejected, read = sum(statistics["rejected"].values()), statistics["read"]
    allowed = int(float(bound.rstrip("%")) * (read / 100 if bound.endswith("%") else 1))
    if rejected > allowed:
        why = f"see why in {out / 'rejected.jsonl'}"
        raise McpLoraError(f"{rejected} of {read} rows were rejected, and {allowed} may be: {why}", code=1)


@app.command()
def inspect(
    row: Annotated[int, Argument(min=1, help="Which row, from 1.")] = 1,
    split: Annotated[str, Option(metavar="NAME", help=f"train, {_SPLITS}.")] = "train",
    model: Model = None,
    config: Recipe = configuration.RECIPE,
    data: Annotated[Path | None, Option("--from", help="The dataset's folder, if not the recipe's.")] = None,
    ids: Annotated[bool, Option("--ids", help="Show the token ids.")] = False,
    as_json: Annotated[bool, Option("--json", help="A line a sample: ids, labels, prompt, target.")] = False,
) -> None:
    """Show a row as the model is trained on it, what is trained on in another colour."""
    recipe = _resolved(config, model)
    recipe |= demo_model.located(recipe, fetch=True)
    if problems := training.settings_problems(recipe):
        raise McpLoraError(f"{'; '.join(problems)}. Fix {config} and run again")
    folder = data or Path(recipe["dataset_dir"])
    found = next(islice(dataset.samples(folder, split), row - 1, None), None)
    if found is None:
        raise McpLoraError(f"{split} in {folder} has fewer than {row} rows: mcp-lora inspect 1")
    template = prompts.load(recipe)
    settings = render.settings_of(recipe)
    try:
        fitted = render.fit(template, found, settings)
    except Fault as fault:
        raise McpLoraError(f"row {row} of {split} is left out: {fault}: mcp-lora inspect") from None
    for sample in fitted.samples:
        if as_json:
            shown = ("input_ids", "labels", "prompt", "target")
            typer.echo(json.dumps({key: getattr(sample, key) for key in shown}, ensure_ascii=False))
        else:
            _print_sample(sample, template, ids)
    if not as_json:
        lost = f"; {fitted.dropped} distractors are left out to fit" if fitted.dropped else ""
        _say(f"{len(fitted.samples)} samples, cutoff_len {settings['cutoff_len']}, {template.note}{lost}")


@app.command()
def train(
    overrides: Annotated[list[str] | None, Argument(metavar="[KEY=VALUE]...", help=_OVERRIDES)] = None,
    config: Recipe = configuration.RECIPE,
    model: Model = None,
    data: Annotated[Path | None, Option(help="Tool-call data to train on.")] = None,
    output: Annotated[Path | None, Option(help="The run's folder.")] = None,
    gpus: Annotated[int | None, Option(min=1, help="GPUs of this machine; all by default.")] = None,
    nodes: Annotated[int | None, Option(min=1, help="Machines; 1 by default.")] = None,
    node_rank: Annotated[int | None, Option(min=0, help="Which of them this is, from 0.")] = None,
    master: Annotated[str | None, Option(metavar="HOST:PORT", help="Where the first is met.")] = None,
    zero: Annotated[Literal["0", "2", "3"] | None, Option(help="DeepSpeed's ZeRO stage.")] = None,
    global_batch: Annotated[int | None, Option(min=1, help="Samples of a step, on all GPUs.")] = None,
    dry_run: Annotated[bool, Option("--dry-run", help="Show what would be run.")] = False,
    no_retry: Annotated[bool, Option("--no-retry", help="Out of memory, do not halve the batch.")] = False,
    resume: Annotated[bool, Option("--resume", help="Go on from the newest checkpoint.")] = False,
    overwrite: Annotated[bool, Option("--overwrite", help="Start anew; the old run is put aside.")] = False,
) -> None:
    """Train the LoRA recipe with LLaMA-Factory."""
    api.require()
    flags = {
        "model_name_or_path": model,
        "output_dir": str(output) if output else None,
        "deepspeed": str(configuration.ZERO.with_name(f"ds_z{zero}_config.json")) if zero else None,
    }
    machine = configuration.detect_machine(gpus if dry_run else None)
    world = find_world(os.environ, machine.gpus, gpus, nodes, node_rank, master)
    say = (lambda text: None) if world.rank else _say  # of several ranks the first one speaks
    plan = training.plan(
        config, overrides or [], flags, machine, world, say, global_batch, resume, overwrite, dry_run
    )
    if dry_run:
        typer.echo(training.preview(plan, say))
        return
    folder = Path(plan.config["dataset_dir"])
    with _progress() as progress, dataset.locked(folder):
        refreshed = dataset.refresh(data, folder, progress, keep=resume)
    if refreshed.statistics:  # by whichever rank came first
        _say(refreshed.message)
        _print_statistics(refreshed.statistics, folder)
    else:
        say(refreshed.message)
    training.run(plan, say, not no_retry, overwrite)


@app.command()
def doctor(
    model: Model = None,
    config: Recipe = configuration.RECIPE,
    as_json: Annotated[bool, Option("--json", help="For machines.")] = False,
) -> None:
    """Look whether this machine, the packages, the model and the data are fit for a training."""
    settings = _resolved(config, model)
    from mcp_lora.doctor import examine

    findings = []
    for finding in examine(
        settings | demo_model.located(settings, fetch=False), configuration.detect_machine()
    ):
        findings.append(finding)
        if not as_json:
            typer.echo(f"{finding.verdict:8} {finding.what:18} {finding.words}")
    if as_json:
        typer.echo(json.dumps([vars(finding) for finding in findings], indent=2))
    problems = [finding.what for finding in findings if finding.verdict == "problem"]
    if problems:
        raise McpLoraError(f"not fit to train ({', '.join(problems)}): see above, and mcp-lora doctor", 1)


@app.command(name="eval")
def evaluate(
    run: Run = DEFAULT,
    checkpoint: Checkpoint = None,
    split: Annotated[list[str] | None, Option(help=f"{_SPLITS}; all by default.")] = None,
    limit: Annotated[int | None, Option(min=1, help="Questions of each split; all by default.")] = None,
    base_only: Annotated[bool, Option("--base-only", help="Ask the base model alone.")] = False,
    adapter_only: Annotated[bool, Option("--adapter-only", help="Ask the adapter alone.")] = False,
    endpoint: Annotated[str | None, Option(metavar="URL", help="Ask an OpenAI-compatible server.")] = None,
    model: Annotated[str | None, Option(help="The model's name on that server.")] = None,
    max_new_tokens: Annotated[int | None, Option(min=1, help="Tokens of an answer, at most.")] = None,
    gpus: Annotated[int | None, Option(min=1, help="GPUs that share the questions; all by default.")] = None,
    batch_size: Annotated[int, Option(min=1, help="Questions at a time on a GPU.")] = 16,
    require: Annotated[list[str] | None, Option(metavar="SPLIT.FIGURE>=SHARE", help=_REQUIRE)] = None,
) -> None:
    """Answer the held-out questions with the base model and with the adapter, and compare."""
    api.require()
    from mcp_lora.evaluate import evaluation

    if bool(endpoint) != bool(model):
        raise McpLoraError("one without the other: mcp-lora eval --endpoint URL --model NAME")
    if base_only + adapter_only + bool(endpoint) > 1:
        raise McpLoraError("--base-only, --adapter-only and --endpoint exclude each other: give one of them")
    requirements = [evaluation.requirement(text) for text in require or []]  # before anything that takes long
    machine = configuration.detect_machine()
    with _progress() as progress:
        found = evaluation.evaluate(
            run,
            machine,
            find_world(os.environ, machine.gpus, gpus, nodes=1, node_rank=0),
            checkpoint,
            split or [],
            limit,
            [evaluation.BASE] * (not adapter_only) + [evaluation.ADAPTER] * (not base_only),
            evaluation.Endpoint(endpoint, model) if endpoint and model else None,
            max_new_tokens,
            batch_size,
            requirements,
            progress,
        )
    _print_evaluation(found)
    if found.left_out:
        _say(f"warning: questions that cannot be asked: {_counts(found.left_out)}")
    _say(f"every answer and all figures are in {run / 'eval'}; on a page: mcp-lora report {run}")
    if missed := evaluation.unmet(found, requirements):
        raise McpLoraError(f"{'; '.join(missed)}. See what is wrong: mcp-lora report {run}", 1)


@app.command()
def report(runs: Annotated[list[Path] | None, Argument(metavar="[RUN]...", help=_RUNS)] = None) -> None:
    """Write a page about a run: figures, errors, examples, curves, data. It is one HTML file."""
    from mcp_lora.report.page import write

    _say(f"the page is {write(runs or [DEFAULT])}")


@app.command()
def demo() -> None:
    """Show the whole way on the CPU: the embedded model, the shipped sample, a page of what was learned."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    start, out, run = time.monotonic(), Path("data/demo"), Path("outputs/demo")
    _say("1/4 convert: the shipped sample, 2 candidates a question; questions, tools and a server held out")
    sample = [str(dataset.FILTERED_FOLDER / dataset.SAMPLE)]
    convert(sample, out, candidates=2, test=0.12, holdout_tools=0.15, holdout_servers=0.15, no_call=0.2)
    _say("2/4 train: SmolLM2-135M-Instruct on the CPU, ten to twenty minutes")
    train(config=configuration.RECIPE.with_name("demo.yaml"), model=demo_model.NAME, overwrite=True)
    _say("3/4 eval: the held-out questions, put to the base model and to the adapter")
    evaluate(run)
    _say("4/4 report: all of that on a page")
    report([run])
    minutes = (time.monotonic() - start) / 60
    _say(f"done in {minutes:.0f} minutes. Open {run / 'report.html'}; next: mcp-lora chat {run}")


@app.command()
def chat(run: Run = DEFAULT, checkpoint: Checkpoint = None) -> None:
    """Talk to the adapter in the terminal."""
    api.require()
    settings = runs.serving_config(run, runs.adapter(run, checkpoint))
    outcome = _run_engine("chat", settings, hold_traceback=True)
    # LLaMA-Factory's chat raises at the end of its input, and aborts on the way out on a CPU.
    raised = launch.real_error(outcome.stderr).startswith("EOFError")
    aborted = outcome.stderr.rstrip().endswith("terminate called without an active exception")
    if outcome.code and not raised and not aborted:
        raise outcome.error(f"mcp-lora chat {run}")


@app.command()
def export(
    run: Run = DEFAULT,
    export_dir: Annotated[Path, Option("--to", help="Folder to write.")] = Path("outputs/merged_model"),
    checkpoint: Checkpoint = None,
) -> None:
    """Merge the adapter into the base model, and check that the result says the same."""
    api.require()
    from mcp_lora.train import merging

    adapter = runs.adapter(run, checkpoint)
    if runs.is_quantised(run):
        why = "was trained on a quantised base, and merging into that loses precision"
        raise McpLoraError(f"{run} {why}: use the adapter as it is: mcp-lora chat {run}")
    if export_dir.exists():
        raise McpLoraError(f"{export_dir} exists: mcp-lora export {run} --to OTHER_FOLDER")
    new = export_dir.with_name(f".{export_dir.name}.new")  # half an export is none
    settings = runs.serving_config(run, adapter) | {"export_dir": str(new), "export_size": 1}
    settings |= {"template": render.TEMPLATE}  # which leaves the tokenizer its own chat template
    shutil.rmtree(new, ignore_errors=True)  # what an export that was killed has left
    try:
        outcome = _run_engine("export", settings)
        if outcome.code:
            raise outcome.error(f"mcp-lora export {run}")
        merging.serve_as_trained(new, prompts.load(runs.read_run(run)))
        new.rename(export_dir)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    found = merging.compare(settings, adapter, export_dir)
    _say(
        f"{export_dir} against base + adapter, in {found.dtype}: the largest difference of a logit is "
        f"{found.difference:.2g} (tolerance {found.tolerance:.2g})"
    )
    if found.difference > found.tolerance:
        what = f"{export_dir} does not say what base + adapter says, do not use it"
        raise McpLoraError(f"{what}: mcp-lora export {run} --to OTHER_FOLDER", code=1)


def _run_engine(verb: str, settings: dict[str, Any], hold_traceback: bool = False) -> launch.Outcome:
    gpus = configuration.detect_machine().gpus
    environment = launch.engine_environment(settings, World(gpus or 1), gpus, os.environ)
    return launch.run_engine(verb, settings, environment, hold_traceback)


def _resolved(config: Path, model: str | None) -> dict[str, Any]:
    api.require()
    machine = configuration.detect_machine()
    return configuration.resolve(config, os.environ, [], {"model_name_or_path": model}, machine)[0]


@contextmanager
def _progress() -> Iterator[Callable[[str, float], None]]:
    """Show a bar on a terminal, for as long as something is done."""
    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
        tasks: dict[str, Any] = {}

        def show(doing: str, share: float) -> None:
            if doing not in tasks:
                tasks[doing] = bar.add_task(doing, total=1)
            bar.update(tasks[doing], completed=share)

        yield show


def _print_table(
    title: str, columns: Sequence[str], rows: Iterable[Sequence[object]], texts: Collection[str]
) -> None:
    """Print a table; columns other than `texts` are numbers, at the right."""
    table = Table(title=Text(_harmless(title), no_wrap=True, overflow="ignore"), title_justify="left")
    for column in columns:
        if column in texts:
            table.add_column(column, overflow="fold", min_width=9)
        else:
            table.add_column(column.replace("_", " "), justify="right")
    for row in rows:
        table.add_row(*(Text(_harmless(str(cell))) for cell in row))
    console = Console()
    if not console.is_terminal:
        console.width = 120  # a file has room
    console.print(table)


def _print_statistics(statistics: dict[str, Any], out: Path) -> None:
    written, rejected = statistics["written"], sum(statistics["rejected"].values())
    files = [os.path.abspath(source["file"]) for source in statistics["sources"]]
    common = os.path.commonpath(map(os.path.dirname, files))
    near = os.path.relpath(common)
    rows = [
        [
            os.path.relpath(file, common),
            source["format"],
            source["read"],
            _counts(source["cleaned"]) or 0,
            *(source["written"].get(split, 0) for split in written),
            _counts(source["rejected"]) or 0,
        ]
        for file, source in zip(files, statistics["sources"], strict=True)
    ]
    _print_table(
        f"{statistics['read']} rows of {common if near.startswith('..') else near}",
        ["file", "format", "read", "normalized", *written, "rejected"],
        rows,
        texts=("file", "format", "normalized", "rejected"),
    )
    parts = [f"{count} in {name}" for name, count in written.items()]
    _say(
        f"read {statistics['read']} rows = {' + '.join(parts)} + {rejected} rejected; "
        f"{statistics['tools']} tools of {statistics['servers']} servers → {out}"
    )
    if rejected:
        _say(f"why rows were rejected is in {out / 'rejected.jsonl'}")
    for name, count in statistics["no_call_samples"].items():
        _say(f"{count} extra samples without the gold tool in {name}")
    if statistics["synonyms"]:
        _say(f"{statistics['synonyms']} candidates were left out that do what a gold tool does")
    if statistics["later_calls"]:
        _say(f"{statistics['later_calls']} later calls are in no sample: --turns each, or all")
    if unknown := statistics["unknown_parameters"]:
        worst = ", ".join(f"{count} of {tool}" for tool, count in list(unknown.items())[:3])
        total = sum(unknown.values())
        _say(
            f"warning: {total} calls have parameters that the schema does not know ({worst}): --strict-schema"
        )
    if broken := statistics["broken_schemas"]:
        worst = "; ".join(f"{one['tool']}: {one['problem']}" for one in broken[:3])
        _say(
            f"warning: {len(broken)} tools have a schema that is none, calls of them are unchecked ({worst})"
        )
    for note in (notes := statistics["notes"])[:3]:
        _say(f"warning: {note}")
    if len(notes) > 3:
        _say(f"warning: {len(notes) - 3} more notes are in {out / 'stats.json'}")


def _print_sample(sample: Any, template: Any, ids: bool) -> None:
    console = Console()
    pairs = zip(sample.input_ids, sample.labels, strict=True)
    for trained, run in groupby(pairs, key=lambda pair: pair[1] != prompts.IGNORED):
        tokens = [token for token, _ in run]
        text = " ".join(map(str, tokens)) if ids else template.tokenizer.decode(tokens)
        styled = Text(_harmless(text), style="bold green" if trained else "dim")
        console.print(styled, end="\n" if ids else "", soft_wrap=True)
    console.print()
    count = sum(label != prompts.IGNORED for label in sample.labels)
    _say(f"{len(sample.input_ids)} tokens, {count} of them trained on (in green)")


def _print_evaluation(evaluation: Any) -> None:
    for name, split in evaluation.splits.items():
        rows = []
        for figure in next(iter(split.figures.values())):
            cells = [figure, *(_interval(shares[figure]) for shares in split.figures.values())]
            for gain in (gains[figure] for gains in split.gains.values()):
                reach = f"{100 * gain.low:+.0f}…{100 * gain.high:+.0f}"
                cells += [f"{100 * gain.difference:+.1f} ({reach})", f"{gain.p:.1g}"]
            rows.append(cells)
        columns = ["", *split.figures, *["difference", "p"] * len(split.gains)]
        title = f"{name}: {split.count} held-out questions; % (95 % interval)"
        _print_table(title, columns, rows, texts=("",))
        for model, errors in split.errors.items():
            if errors:
                typer.echo(f"{model} errs: {_counts(errors)}")
    last = list(evaluation.answers)[-1]
    worst = [place for place in evaluation.tools if place.right[last].share < 1][:5]
    if worst:
        told = ", ".join(
            f"{place.tool}{f' of {place.server}' if place.server else ''} "
            f"{place.right[last].right}/{place.right[last].count}"
            for place in worst
        )
        typer.echo(f"\nWhere more data is wanted, the worst tools of {last} first: {told}")
    count = len(evaluation.answers[last])
    for place in range(0, count, max(1, count // 3))[:3]:
        typer.secho(f"\n{_harmless(evaluation.answers[last][place].instruction)}", bold=True)
        for model, answers in evaluation.answers.items():
            answer = answers[place]
            mark = "✗" if answer.verdict.error else "✓"
            said = answer.text or json.dumps([call._asdict() for call in answer.calls])
            typer.echo(f"  {model} {mark} {_harmless(' '.join(said.split())[:300])}")


def _interval(share: Any) -> str:
    return f"{100 * share.share:.1f} ({100 * share.low:.0f}…{100 * share.high:.0f})"


def _counts(counted: dict[str, int]) -> str:
    return ", ".join(f"{count} {what}" for what, count in counted.items())


def _say(text: str) -> None:
    typer.echo(f"mcp-lora: {_harmless(text)}", err=True)


def _harmless(text: str) -> str:
    """Return a text that may come out of data without what a terminal obeys."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\ufffd", text)


def _interrupted(number: int, frame: Any) -> None:
    """End by a signal as by any other error: what was started is stopped on the way out."""
    raise Interrupted(128 + number)


def _again(words: list[str], option: str | None) -> str:
    """Return the command that goes on with an interrupted one: the same, but where a training has begun."""
    if option is not None and words[0] == "train":  # a demo is run as a whole
        words = [word for word in words if word not in ("--resume", "--overwrite")] + [option] * bool(option)
    return shlex.join(["mcp-lora", *words])


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; an error is one line and an exit code, and a traceback on request.

    MCP_LORA_TRACEBACK=1 in the environment brings the traceback back.
    """
    if arguments is None:  # what a shell has left: only train_lora.py is a launcher's worker
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
            os.environ.pop(name, None)
    words = sys.argv[1:] if arguments is None else arguments
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupted)
    try:
        if empty := [place for place, word in enumerate(words) if not word or re.match(r"--\S+=$", word)]:
            what = " ".join(words[max(0, empty[0] - 1) : empty[0] + 1])
            raise McpLoraError(f"empty, by an unset variable? {what}: see mcp-lora {words[0]} --help")
        try:
            app(words)
        except OSError as error:  # what is printed, or the temporary folder, on a full disk
            where = error.filename or "the output"
            what = f"{where} cannot be read or written ({error.strerror or error})"
            raise McpLoraError(f"{what}: see df -h and ls -l, and run again") from error
    except (McpLoraError, Interrupted) as error:
        if os.environ.get("MCP_LORA_TRACEBACK"):
            traceback.print_exc()
        if not (os.environ.get("RANK", "").isdigit() and worker_rank(os.environ)):
            go_on = f"; to go on: {_again(words, error.option)}" if isinstance(error, Interrupted) else ""
            _say(f"error: {error}{go_on}")
        sys.exit(error.code)


if __name__ == "__main__":
    main()
