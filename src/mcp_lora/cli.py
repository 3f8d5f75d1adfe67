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
from mcp_lora import dataset, engine, launch, runs, training
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
    flags = {"model_name_or_path": model, "output_dir": str(output) if output else None}
    plan = training.plan(
        config, overrides or [], flags, configuration.detect_machine(), resume, overwrite, dry_run
    )
    say = _say if plan.leads else _silent
    for note in plan.notes:
        say(note)
    if dry_run:
        typer.echo(f"# {plan.run / 'run.yaml'}\n{configuration.dump(plan.config)}")
        typer.echo(f"# command\n{' '.join(plan.argv)}\n# environment")
        typer.echo("\n".join(f"{name}={value}" for name, value in plan.environment.items()))
        return
    if statistics := training.refresh_data(plan.config, data):
        _print_statistics(statistics, Path(plan.config["dataset_dir"]))
    elif plan.config.get("dataset") == dataset.TRAIN:
        say(f"the data in {plan.config['dataset_dir']} is up to date")
    if overwrite and plan.leads and (previous := runs.put_aside(plan.run)):
        say(f"the run that was in {plan.run} is now in {previous}")
    say(f"training; the configuration is in {plan.run / 'run.yaml'}")
    training.start(plan)
    say(f"the adapter is in {plan.run}; the next steps: mcp-lora eval, chat and export {plan.run}")


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
    outcome = _run_engine("export", settings)
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


def _run_engine(verb: str, settings: dict[str, Any], hold_traceback: bool = False) -> launch.Outcome:
    with tempfile.TemporaryDirectory(prefix="mcp-lora-") as folder:
        argv = launch.engine_argv(verb, runs.write_config(Path(folder), settings))
        environment = launch.engine_environment(settings, configuration.detect_machine(), os.environ)
        return launch.run(argv, environment, hold_traceback)


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
