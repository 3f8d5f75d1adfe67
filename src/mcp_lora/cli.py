"""The command line: it parses, composes the other modules and prints. Nothing else does."""

import os
import signal
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Annotated, Any

import typer

from mcp_lora import config as configuration
from mcp_lora import dataset, embedded, engine, launch, runs
from mcp_lora.errors import McpLoraError
from mcp_lora.runs import DEFAULT

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Tune a language model to call MCP tools: convert, train, eval, chat, export.",
)

Run = Annotated[Path, typer.Argument(help="A run's folder.", metavar="RUN")]
Checkpoint = Annotated[
    str | None,
    typer.Option(help="A checkpoint of the run (300 or checkpoint-300), not the newest."),
]


@app.command()
def convert(
    inputs: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[INPUT]...",
            help="Filtered MCP data, .json or .jsonl. [default: the newest data/filtered/filtered_*.json]",
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder to write.")] = dataset.FOLDER,
    candidates: Annotated[
        int, typer.Option(min=1, help="Tools offered per sample, the right one included.")
    ] = 10,
    test: Annotated[
        float, typer.Option(min=0, max=0.9, help="Share of the rows that is held out for testing.")
    ] = 0.1,
    seed: Annotated[int, typer.Option(help="Draws held-out rows and candidate tools.")] = 42,
) -> None:
    """Turn filtered MCP data into LLaMA-Factory's dataset format."""
    _print_statistics(dataset.convert(inputs or [], out, candidates, test, seed), out)


@app.command()
def train(
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Settings in LLaMA-Factory's names."),
    ] = None,
    config: Annotated[Path, typer.Option(help="The recipe.")] = configuration.RECIPE,
    model: Annotated[str | None, typer.Option(help="Base model: a folder, a hub id, or `embedded`.")] = None,
    data: Annotated[Path | None, typer.Option(help="Filtered MCP data to train on.")] = None,
    output: Annotated[Path | None, typer.Option(help="The run's folder.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be run.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Start anew; the old run moves to RUN.previous.")
    ] = False,
) -> None:
    """Train the LoRA recipe with LLaMA-Factory."""
    engine.require()
    rank = launch.worker_rank(os.environ)
    say = _say if not rank else _silent
    machine = configuration.detect_machine()
    flags = {"model_name_or_path": model, "output_dir": str(output) if output else None}
    settings, notes = configuration.resolve(config, os.environ, overrides or [], flags, machine)
    for note in notes:
        say(note)
    run = Path(settings.get("output_dir") or DEFAULT)
    settings["output_dir"] = str(run)
    model = str(settings.get("model_name_or_path"))
    problems = engine.problems(settings)
    if model == embedded.NAME:
        settings["model_name_or_path"] = str(embedded.folder() if dry_run else embedded.ensure())
    elif missing := configuration.missing_model(model):
        problems.append(missing)
    if problems:
        raise McpLoraError(f"{'; '.join(problems)}. Mend that and run again: mcp-lora train --dry-run")
    if heavy := configuration.too_big(model, machine):
        if not dry_run:
            raise McpLoraError(heavy)
        say(f"warning: {heavy}")
    checkpoint = runs.prepare(run, settings, resume, overwrite)
    if checkpoint:
        settings["resume_from_checkpoint"] = str(checkpoint)
        say(f"resuming from {checkpoint}")

    environment = launch.engine_environment(settings, machine, os.environ)
    argv = launch.engine_argv("train", run / "run.yaml")
    if dry_run:
        typer.echo(f"# {run / 'run.yaml'}\n{configuration.dump(settings)}")
        typer.echo("# command\n" + " ".join(argv))
        typer.echo("# environment")
        for name, value in environment.items():
            typer.echo(f"{name}={value}")
        return

    _refresh_data(settings, data, say)
    if overwrite and not rank and (previous := runs.put_aside(run)):
        say(f"the run that was in {run} is now in {previous}")
    file = runs.write_config(run, settings) if not rank else run / "run.yaml"
    if rank is not None:
        engine.train(settings)
        return
    with launch.without_spaces(file, environment) as readable:
        say(f"running llamafactory-cli train {file}")
        outcome = launch.run(launch.engine_argv("train", readable), environment)
    if outcome.code:
        raise outcome.error("mcp-lora train")
    say(f"the adapter is in {run}. Next: mcp-lora eval {run}, mcp-lora chat {run}, mcp-lora export {run}")


@app.command(name="eval")
def evaluate(run: Run = DEFAULT, checkpoint: Checkpoint = None) -> None:
    """Answer the held-out questions with the base model and with the adapter, and compare."""
    engine.require()
    from mcp_lora.evaluation import evaluate

    _print_evaluation(evaluate(run, checkpoint, configuration.detect_machine()))


@app.command()
def chat(run: Run = DEFAULT, checkpoint: Checkpoint = None) -> None:
    """Talk to the adapter in the terminal."""
    engine.require()
    settings = runs.serving_config(run, runs.adapter(run, checkpoint))
    with tempfile.TemporaryDirectory(prefix="mcp-lora-") as folder:
        file = runs.write_config(Path(folder), settings)
        environment = launch.engine_environment(settings, configuration.detect_machine(), os.environ)
        outcome = launch.run(launch.engine_argv("chat", file), environment, hold_traceback=True)
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
    from mcp_lora.merging import TOLERANCE, compare

    adapter = runs.adapter(run, checkpoint)
    if runs.is_quantised(run):
        raise McpLoraError(
            f"{run} was trained on a quantised base, and merging into that loses precision: "
            f"use the adapter as it is: mcp-lora chat {run}"
        )
    if export_dir.exists():
        raise McpLoraError(f"{export_dir} exists: mcp-lora export {run} --to OTHER_FOLDER")
    settings = runs.serving_config(run, adapter) | {"export_dir": str(export_dir), "export_size": 1}
    with tempfile.TemporaryDirectory(prefix="mcp-lora-") as folder:
        file = runs.write_config(Path(folder), settings)
        environment = launch.engine_environment(settings, configuration.detect_machine(), os.environ)
        outcome = launch.run(launch.engine_argv("export", file), environment)
    if outcome.code:
        raise outcome.error(f"mcp-lora export {run}")
    found = compare(settings["model_name_or_path"], adapter, export_dir)
    limit = TOLERANCE[found.dtype] * found.largest
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


def _refresh_data(settings: dict[str, Any], data: Path | None, say: Any) -> None:
    """Convert where the data is newer than the conversion; the first rank to come does it."""
    import filelock

    if settings.get("dataset") != dataset.TRAIN:
        return
    folder = Path(settings["dataset_dir"])
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(folder / ".lock"):
            statistics = dataset.refresh(data, folder)
    except OSError as error:
        raise McpLoraError(
            f"{folder} cannot be written ({error.strerror}): mcp-lora train dataset_dir=OTHER_FOLDER"
        ) from None
    if statistics:
        _print_statistics(statistics, folder)
    else:
        say(f"the data in {folder} is up to date")


def _print_statistics(statistics: dict[str, Any], out: Path) -> None:
    counts = statistics["train"], statistics["test"], statistics["rejected"]
    _say(
        f"read {statistics['read']} rows of {', '.join(statistics['files'])}: {counts[0]} to train on "
        f"+ {counts[1]} held out + {counts[2]} rejected; {statistics['tools']} tools of "
        f"{statistics['servers']} servers → {out}"
    )
    for reason, count in statistics["reasons"].items():
        _say(f"  rejected {count} × {reason} (see {out / 'rejected.jsonl'})")


def _print_evaluation(evaluation: Any) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    count = len(evaluation.answers)
    table = Table(title=f"{count} held-out questions")
    for column in ("", "valid call", "right tool", "exact call"):
        table.add_column(column, justify="right" if column else "left")
    for name, figures in evaluation.figures.items():
        shares = (figures.valid, figures.tool, figures.exact)
        table.add_row(name, *(f"{share:.1%}" for share in shares))
    console.print(table)
    for answer in evaluation.answers[:: max(1, count // 3)][:3]:
        console.print(Text(f"\n{answer.instruction}", style="bold"))
        for name, said in answer.said.items():
            mark = "✓" if answer.exact[name] else "✗"
            console.print(Text(f"  {name} {mark} {' '.join(said.split())[:300]}"))


def _say(text: str) -> None:
    typer.echo(f"mcp-lora: {text}", err=True)


def _silent(text: str) -> None:
    """Say nothing: of several ranks, the first one speaks for all."""


def _interrupted(number: int, frame: Any) -> None:
    """End by a signal as by any other error: what was started is stopped on the way out."""
    raise McpLoraError("interrupted; a run goes on with: mcp-lora train --resume", 128 + number)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; an error is one line and an exit code, and a traceback on request.

    MCP_LORA_TRACEBACK=1 in the environment brings the traceback back.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupted)
    try:
        app(arguments)
    except McpLoraError as error:
        if os.environ.get("MCP_LORA_TRACEBACK"):
            traceback.print_exc()
        if not launch.worker_rank(os.environ):
            _say(f"error: {error}")
        sys.exit(error.code)


if __name__ == "__main__":
    main()
