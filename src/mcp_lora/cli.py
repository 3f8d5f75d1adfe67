"""The command line: it parses, composes the other modules and prints. Nothing else does."""

import json
import os
import re
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import groupby, islice
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from mcp_lora import config as configuration
from mcp_lora import dataset, embedded, engine, launch, runs, training
from mcp_lora.errors import Interrupted, McpLoraError
from mcp_lora.prompts import render as prompts
from mcp_lora.prompts import rendered
from mcp_lora.records import Fault
from mcp_lora.runs import DEFAULT
from mcp_lora.world import World, worker_rank
from mcp_lora.world import find as find_world

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Tune a language model to call MCP tools: doctor, convert, inspect, train, eval, report, chat, "
    "export.",
)

Run = Annotated[Path, typer.Argument(help="A run's folder.", metavar="RUN")]
Checkpoint = Annotated[
    str | None,
    typer.Option(help="A checkpoint of the run (300 or checkpoint-300), not the newest."),
]


@app.command()
def convert(
    inputs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[INPUT]...",
            help="Tool-call data: files (.json, .jsonl, .jsonl.gz, .parquet), folders, globs. "
            "[default: the newest data/filtered/filtered_*.json]",
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder to write.")] = dataset.FOLDER,
    tools: Annotated[
        list[str] | None,
        typer.Option(help="A tool catalogue, file or folder; may be repeated.", metavar="PATH"),
    ] = None,
    turns: Annotated[
        Literal["call", "all", "each"],
        typer.Option(help="Up to the first call, the whole conversation, or a sample for each of its calls."),
    ] = "call",
    max_observation: Annotated[
        int, typer.Option(min=1, help="Characters of a tool's result; what is beyond is left out.")
    ] = 4000,
    candidates: Annotated[
        int, typer.Option(min=1, help="Tools offered per sample, the right one included.")
    ] = 10,
    holdout_servers: Annotated[
        float, typer.Option(min=0, max=0.9, help="Share of the servers that is held out for testing.")
    ] = 0.0,
    holdout_tools: Annotated[
        float, typer.Option(min=0, max=0.9, help="Share of the tools that is held out for testing.")
    ] = 0.0,
    test: Annotated[
        float, typer.Option(min=0, max=0.9, help="Share of the other rows that is held out for testing.")
    ] = 0.1,
    no_call: Annotated[
        float, typer.Option(min=0, max=1, help="Share of extra samples without the right tool.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="Decides what is held out and draws candidate tools.")] = 42,
    drop_reasoning: Annotated[
        bool, typer.Option("--drop-reasoning", help="Leave out what was thought.")
    ] = False,
    strict_schema: Annotated[
        bool, typer.Option("--strict-schema", help="Reject parameters that the schema does not know.")
    ] = False,
    keep_failed: Annotated[
        bool, typer.Option("--keep-failed", help="Train on calls of which the result is an error.")
    ] = False,
    strict: Annotated[bool, typer.Option("--strict", help="End with 1 if a row is rejected.")] = False,
    max_rejects: Annotated[
        str, typer.Option(help="End with 1 if more are rejected: 5%, or a number of rows.", metavar="N")
    ] = "100%",
) -> None:
    """Turn tool-call data into LLaMA-Factory's dataset format."""
    allowed = _allowed_rejects("0" if strict else max_rejects)
    settings = dataset.Settings(
        inputs or [],
        tools or [],
        turns,
        max_observation,
        candidates,
        holdout_servers,
        holdout_tools,
        test,
        no_call,
        seed,
        drop_reasoning,
        strict_schema,
        keep_failed,
    )
    with _progress() as progress, dataset.locked(out):
        statistics = dataset.convert(settings, out, progress)
    _print_statistics(statistics, out)
    rejected, read = sum(statistics["rejected"].values()), statistics["read"]
    if rejected > allowed(read):
        raise McpLoraError(
            f"{rejected} of {read} rows were rejected, and {allowed(read)} may be: "
            f"see why in {out / 'rejected.jsonl'}",
            code=1,
        )


@app.command()
def inspect(
    row: Annotated[int, typer.Argument(min=1, help="Which row, from 1.")] = 1,
    split: Annotated[
        str, typer.Option(help="train, seen, unseen_tool, unseen_server or no_call.", metavar="NAME")
    ] = "train",
    model: Annotated[str | None, typer.Option(help="Base model: a folder, a hub id, or `embedded`.")] = None,
    config: Annotated[
        Path, typer.Option(help="The recipe: model, folder, cutoff_len.")
    ] = configuration.RECIPE,
    data: Annotated[
        Path | None, typer.Option("--from", help="The dataset's folder, if not the recipe's.")
    ] = None,
    ids: Annotated[bool, typer.Option("--ids", help="Show the token ids.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="For machines: input_ids, labels, prompt, target; a line a sample.")
    ] = False,
) -> None:
    """Show a row as the model is trained on it, what is trained on in another colour."""
    recipe = _recipe(config, model)
    folder = data or Path(recipe["dataset_dir"])
    found = next(islice(dataset.samples(folder, split), row - 1, None), None)
    if found is None:
        raise McpLoraError(f"{split} in {folder} has fewer than {row} rows: mcp-lora inspect 1")
    template = prompts.load(recipe)
    settings = rendered.settings_of(recipe)
    try:
        fitted = rendered.fit(template, found, settings)
    except Fault as fault:
        raise McpLoraError(
            f"row {row} of {split} is left out: {fault}. See another: mcp-lora inspect"
        ) from None
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
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Settings in LLaMA-Factory's names."),
    ] = None,
    config: Annotated[Path, typer.Option(help="The recipe.")] = configuration.RECIPE,
    model: Annotated[str | None, typer.Option(help="Base model: a folder, a hub id, or `embedded`.")] = None,
    data: Annotated[Path | None, typer.Option(help="Tool-call data to train on.")] = None,
    output: Annotated[Path | None, typer.Option(help="The run's folder.")] = None,
    gpus: Annotated[
        int | None, typer.Option(min=1, help="GPUs of this machine.", show_default="all visible")
    ] = None,
    nodes: Annotated[int | None, typer.Option(min=1, help="Machines.", show_default="1")] = None,
    node_rank: Annotated[int | None, typer.Option(min=0, help="Which of them this is, from 0.")] = None,
    master: Annotated[str | None, typer.Option(metavar="HOST:PORT", help="Where the first is met.")] = None,
    zero: Annotated[
        Literal["0", "2", "3"] | None,
        typer.Option(help="DeepSpeed's ZeRO stage.", show_default="the recipe's"),
    ] = None,
    global_batch: Annotated[
        int | None,
        typer.Option(min=1, help="Samples of a step, on all GPUs together.", show_default="the recipe's"),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be run.")] = False,
    no_retry: Annotated[
        bool, typer.Option("--no-retry", help="Out of memory, do not start again with a smaller batch.")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Start anew; the old run moves to RUN.previous.")
    ] = False,
) -> None:
    """Train the LoRA recipe with LLaMA-Factory."""
    engine.require()
    flags = {
        "model_name_or_path": model,
        "output_dir": str(output) if output else None,
        "deepspeed": str(configuration.ZERO.with_name(f"ds_z{zero}_config.json")) if zero else None,
    }
    machine = configuration.detect_machine(gpus if dry_run else None)
    if gpus and gpus > machine.gpus:
        raise McpLoraError(
            f"this machine shows {machine.gpus} GPUs, not {gpus} (CUDA_VISIBLE_DEVICES, nvidia-smi): "
            f"mcp-lora train, or see what {gpus} would do: mcp-lora train --gpus {gpus} --dry-run"
        )
    world = find_world(os.environ, machine.gpus, gpus, nodes, node_rank, master)
    plan = training.plan(
        config, overrides or [], flags, machine, world, global_batch, resume, overwrite, dry_run
    )
    say = _silent if world.rank else _say
    for note in plan.notes:
        say(note)
    if dry_run:
        plan = training.foresee(plan, say)
        typer.echo(f"# {plan.run / 'run.yaml'}\n{configuration.dump(plan.config)}")
        typer.echo(f"# command\n{' '.join(plan.argv)}\n# environment")
        typer.echo("\n".join(f"{name}={value}" for name, value in plan.environment.items()))
        typer.echo("# plan\n" + "\n".join([plan.batch, *training.outlook(plan)]))
        return
    with _progress() as progress:
        refreshed = training.refresh_data(plan.config, data, progress)
    if refreshed.statistics:  # by whichever rank came first
        _say(refreshed.message)
        _print_statistics(refreshed.statistics, Path(plan.config["dataset_dir"]))
    else:
        say(refreshed.message)
    plan = training.render(plan, say)
    if overwrite and world.leads and (previous := runs.put_aside(plan.run)):
        say(f"the run that was in {plan.run} is now in {previous}")
    say(f"training; the configuration is in {plan.run / 'run.yaml'}")
    training.start(plan, say, not no_retry)
    say(f"the adapter is in {plan.run}; the next steps: mcp-lora eval, chat and export {plan.run}")


@app.command()
def doctor(
    model: Annotated[str | None, typer.Option(help="Base model: a folder, a hub id, or `embedded`.")] = None,
    config: Annotated[Path, typer.Option(help="The recipe.")] = configuration.RECIPE,
    as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
) -> None:
    """Look whether this machine, the packages, the model and the data are fit for a training."""
    engine.require()
    from mcp_lora.doctor import examine

    machine = configuration.detect_machine()
    settings, _ = configuration.resolve(config, os.environ, [], {"model_name_or_path": model}, machine)
    if settings.get("model_name_or_path") == embedded.NAME:
        settings["model_name_or_path"] = str(embedded.folder())
    findings = []
    for finding in examine(settings, machine):
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
    split: Annotated[
        list[str] | None,
        typer.Option(help="seen, unseen_tool, unseen_server or no_call.", show_default="all"),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Questions of each split.", show_default="all")
    ] = None,
    base_only: Annotated[bool, typer.Option("--base-only", help="Ask the base model alone.")] = False,
    adapter_only: Annotated[bool, typer.Option("--adapter-only", help="Ask the adapter alone.")] = False,
    endpoint: Annotated[
        str | None, typer.Option(metavar="URL", help="Ask a server of OpenAI's protocol instead.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="The model's name on that server.")] = None,
    require: Annotated[
        list[str] | None,
        typer.Option(metavar="SPLIT.FIGURE>=SHARE", help="Exit code 1 where it does not hold."),
    ] = None,
) -> None:
    """Answer the held-out questions with the base model and with the adapter, and compare."""
    engine.require()
    from mcp_lora import evaluation

    if bool(endpoint) != bool(model):
        raise McpLoraError(
            "--endpoint and --model belong together: mcp-lora eval --endpoint URL --model NAME"
        )
    if base_only + adapter_only + bool(endpoint) > 1:
        raise McpLoraError("--base-only, --adapter-only and --endpoint exclude each other: give one of them")
    requirements = [evaluation.requirement(text) for text in require or []]  # before anything that takes long
    with _progress() as progress:
        found = evaluation.evaluate(
            run,
            configuration.detect_machine(),
            checkpoint,
            split or [],
            limit,
            [evaluation.BASE] * (not adapter_only) + [evaluation.ADAPTER] * (not base_only),
            evaluation.Endpoint(endpoint, model) if endpoint and model else None,
            progress,
        )
    _print_evaluation(found)
    if found.left_out:
        reasons = ", ".join(f"{count} {reason}" for reason, count in found.left_out.items())
        _say(f"warning: questions that cannot be asked: {reasons}")
    _say(f"every answer and all figures are in {run / 'eval'}; on a page: mcp-lora report {run}")
    if missed := evaluation.unmet(found, requirements):
        raise McpLoraError(
            f"{'; '.join(missed)}. See what is wrong in {run / 'eval'}, and train on more of it", 1
        )


@app.command()
def report(
    runs: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[RUN]...", help="A run's folder; several are compared.", show_default=str(DEFAULT)
        ),
    ] = None,
) -> None:
    """Write a page about a run: figures, errors, examples, curves, data. It is one HTML file."""
    from mcp_lora.report import write

    _say(f"the page is {write(runs or [DEFAULT])}")


@app.command()
def chat(run: Run = DEFAULT, checkpoint: Checkpoint = None) -> None:
    """Talk to the adapter in the terminal."""
    engine.require()
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
    export_dir: Annotated[Path, typer.Option("--to", help="Folder to write.")] = Path("outputs/merged_model"),
    checkpoint: Checkpoint = None,
) -> None:
    """Merge the adapter into the base model, and check that the result says the same."""
    engine.require()
    from mcp_lora import merging

    adapter = runs.adapter(run, checkpoint)
    if runs.is_quantised(run):
        raise McpLoraError(
            f"{run} was trained on a quantised base, and merging into that loses precision: "
            f"use the adapter as it is: mcp-lora chat {run}"
        )
    if export_dir.exists():
        raise McpLoraError(f"{export_dir} exists: mcp-lora export {run} --to OTHER_FOLDER")
    settings = runs.serving_config(run, adapter) | {"export_dir": str(export_dir), "export_size": 1}
    settings |= {"template": rendered.TEMPLATE}  # which leaves the tokenizer its own chat template
    outcome = _run_engine("export", settings)
    if outcome.code:
        raise outcome.error(f"mcp-lora export {run}")
    merging.serve_as_trained(export_dir, prompts.load(runs.read_run(run)))
    found = merging.compare(settings, adapter, export_dir)
    limit = merging.TOLERANCE[found.dtype] * found.largest
    _say(
        f"{export_dir} against base + adapter, in {found.dtype}: the largest difference of a logit is "
        f"{found.difference:.2g} (tolerance {limit:.2g})"
    )
    if not found.within_tolerance:
        raise McpLoraError(
            f"{export_dir} does not say what base + adapter says: do not use it. Export again "
            f"elsewhere: mcp-lora export {run} --to OTHER_FOLDER",
            code=1,
        )


def _run_engine(verb: str, settings: dict[str, Any], hold_traceback: bool = False) -> launch.Outcome:
    with tempfile.TemporaryDirectory(prefix="mcp-lora-") as folder:
        argv = launch.engine_argv(verb, runs.write_config(Path(folder), settings))
        gpus = configuration.detect_machine().gpus
        environment = launch.engine_environment(settings, World(gpus or 1), gpus, os.environ)
        return launch.run(argv, environment, hold_traceback)


def _recipe(config: Path, model: str | None) -> dict[str, Any]:
    """Return the resolved configuration; an embedded model is fetched."""
    engine.require()
    flags = {"model_name_or_path": model}
    machine = configuration.detect_machine()
    recipe, _ = configuration.resolve(config, os.environ, [], flags, machine)
    if recipe.get("model_name_or_path") == embedded.NAME:
        recipe["model_name_or_path"] = str(embedded.ensure())
    if problems := training.settings_problems(recipe):
        raise McpLoraError(f"{'; '.join(problems)}. Fix {config} and run again")
    return recipe


def _allowed_rejects(text: str) -> Callable[[int], int]:
    """Read `5%` or `20`: how many of the rows may be rejected."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(%?)", text)
    if not found:
        raise McpLoraError(f"--max-rejects {text}: neither a share nor a number: --max-rejects 5%")
    number = float(found.group(1))
    return lambda read: int(number * read / 100 if found.group(2) else number)


@contextmanager
def _progress() -> Iterator[Callable[[str, float], None]]:
    """Show a bar for what takes more than a second."""
    from rich.console import Console
    from rich.progress import Progress

    start = time.monotonic()
    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
        tasks: dict[str, Any] = {}

        def show(doing: str, share: float) -> None:
            if doing not in tasks and time.monotonic() - start > 1:
                tasks[doing] = bar.add_task(doing, total=1)
            if doing in tasks:
                bar.update(tasks[doing], completed=share)

        yield show


def _print_statistics(statistics: dict[str, Any], out: Path) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    splits = list(statistics["written"])
    sources = statistics["sources"]
    common = os.path.commonpath([os.path.dirname(os.path.abspath(source["file"])) for source in sources])
    near = os.path.relpath(common)
    title = f"{statistics['read']} rows of {common if near.startswith('..') else near}"
    table = Table(title=title, title_justify="left")
    table.add_column("file", overflow="fold", min_width=12)
    table.add_column("shape", no_wrap=True)
    for column in ("read", "cleaned", *splits):
        table.add_column(column.replace("_", " "), justify="right")
    table.add_column("rejected", overflow="fold", min_width=9)
    for source in sources:
        why = ", ".join(f"{count} {reason}" for reason, count in source["rejected"].items())
        counts = [source["read"], sum(source["cleaned"].values())]
        counts += [source["written"].get(name, 0) for name in splits]
        name = os.path.relpath(source["file"], common)
        table.add_row(*map(Text, [name, source["shape"], *map(str, counts), why or "0"]))
    written = statistics["written"]
    rejected = sum(statistics["rejected"].values())
    console = Console()
    if not console.is_terminal:
        console.width = 120  # a file has room
    console.print(table)
    parts = [f"{count} in {name}" for name, count in written.items()]
    _say(
        f"read {statistics['read']} rows = {' + '.join(parts)} + {rejected} rejected; "
        f"{statistics['tools']} tools of {statistics['servers']} servers → {out}"
    )
    if rejected:
        _say(f"why rows were rejected is in {out / 'rejected.jsonl'}")
    for name, count in statistics["no_call_samples"].items():
        _say(f"{count} extra samples without the right tool in {name}")
    if statistics["later_calls"]:
        _say(f"{statistics['later_calls']} later calls are in no sample: --turns each, or all")
    if unknown := statistics["unknown_parameters"]:
        worst = ", ".join(f"{count} of {tool}" for tool, count in list(unknown.items())[:3])
        total = sum(unknown.values())
        _say(
            f"warning: {total} calls have parameters that the schema does not know ({worst}): --strict-schema"
        )
    for what, count in statistics["cleaned"].items():
        _say(f"cleaned: {count} × {what}")
    for broken in statistics["broken_schemas"]:
        _say(f"warning: the schema of {broken['tool']} is none, its calls are unchecked: {broken['problem']}")
    for note in statistics["notes"]:
        _say(f"warning: {note}")


def _print_sample(sample: Any, template: Any, ids: bool) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console()
    pairs = zip(sample.input_ids, sample.labels, strict=True)
    for trained, run in groupby(pairs, key=lambda pair: pair[1] != prompts.IGNORED):
        tokens = [token for token, _ in run]
        text = " ".join(map(str, tokens)) if ids else template.tokenizer.decode(tokens)
        console.print(
            Text(text, style="bold green" if trained else "dim"), end="\n" if ids else "", soft_wrap=True
        )
    console.print()
    trained = sum(label != prompts.IGNORED for label in sample.labels)
    _say(f"{len(sample.input_ids)} tokens, {trained} of them trained on (in green)")


def _print_evaluation(evaluation: Any) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    for name, split in evaluation.splits.items():
        title = f"{name}: {split.count} held-out questions; % (95 % interval)"
        table = Table(title=title, title_justify="left")
        columns = ["", *split.figures, *["difference", "p"] * len(split.gains)]
        for column in columns:
            table.add_column(column, justify="right" if column else "left")
        for figure in next(iter(split.figures.values())):
            cells = [_interval(shares[figure]) for shares in split.figures.values()]
            for gains in split.gains.values():
                gain = gains[figure]
                reach = f"{100 * gain.low:+.0f}…{100 * gain.high:+.0f}"
                cells += [f"{100 * gain.difference:+.1f} ({reach})", f"{gain.p:.1g}"]
            table.add_row(figure, *cells)
        console.print(table)
        for model, errors in split.errors.items():
            if errors:
                told = ", ".join(f"{count} {error}" for error, count in errors.items())
                console.print(Text(f"{model} errs: {told}"))
    last = list(evaluation.answers)[-1]
    worst = [place for place in evaluation.tools if place.right[last].share < 1][:5]
    if worst:
        told = ", ".join(
            f"{place.tool}{f' of {place.server}' if place.server else ''} "
            f"{place.right[last].right}/{place.right[last].count}"
            for place in worst
        )
        console.print(Text(f"\nWhere more data is wanted, the worst tools of {last} first: {told}"))
    count = len(evaluation.answers[last])
    for place in range(0, count, max(1, count // 3))[:3]:
        console.print(Text(f"\n{evaluation.answers[last][place].instruction}", style="bold"))
        for model, answers in evaluation.answers.items():
            answer = answers[place]
            mark = "✗" if answer.verdict.error else "✓"
            said = answer.text or json.dumps([call._asdict() for call in answer.calls])
            console.print(Text(f"  {model} {mark} {' '.join(said.split())[:300]}"))


def _interval(share: Any) -> str:
    return f"{100 * share.share:.1f} ({100 * share.low:.0f}…{100 * share.high:.0f})"


def _say(text: str) -> None:
    typer.echo(f"mcp-lora: {text}", err=True)


def _silent(text: str) -> None:
    """Say nothing: of several ranks, the first one speaks for all."""


def _interrupted(number: int, frame: Any) -> None:
    """End by a signal as by any other error: what was started is stopped on the way out."""
    raise Interrupted("interrupted; a run goes on with: mcp-lora train --resume", 128 + number)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; an error is one line and an exit code, and a traceback on request.

    MCP_LORA_TRACEBACK=1 in the environment brings the traceback back.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupted)
    try:
        app(arguments)
    except (McpLoraError, Interrupted) as error:
        if os.environ.get("MCP_LORA_TRACEBACK"):
            traceback.print_exc()
        if not worker_rank(os.environ):
            _say(f"error: {error}")
        sys.exit(error.code)


if __name__ == "__main__":
    main()
