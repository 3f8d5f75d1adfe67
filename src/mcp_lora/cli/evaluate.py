"""eval and report."""

from pathlib import Path
from typing import Annotated, Literal

from typer import Argument, Option

from mcp_lora.cli import console
from mcp_lora.cli.options import SPLITS, AsJson, Checkpoint, Gpus, Run
from mcp_lora.errors import McpLoraError, advice
from mcp_lora.train.runs import DEFAULT

_BATCH_SIZE = 16
_BENCHMARK = "Ask the questions of the Berkeley Function Calling Leaderboard instead."
_REQUIRE = "Exit with 1 if not met; repeatable."
_PAGE = "File to write; report.html or comparison.html in the first run's folder by default."
_RUNS = f"A run's folder, by default {DEFAULT}; several are compared."


def evaluate(
    run: Run = DEFAULT,
    checkpoint: Checkpoint = None,
    split: Annotated[list[str] | None, Option(help=f"{SPLITS}; all by default.")] = None,
    benchmark: Annotated[Literal["bfcl"] | None, Option(help=_BENCHMARK)] = None,
    limit: Annotated[int | None, Option(min=1, help="Questions of each split; all by default.")] = None,
    base_only: Annotated[bool, Option("--base-only", help="Ask only the base model.")] = False,
    adapter_only: Annotated[bool, Option("--adapter-only", help="Ask only the adapter.")] = False,
    endpoint: Annotated[str | None, Option(metavar="URL", help="Ask an OpenAI-compatible server.")] = None,
    endpoint_model: Annotated[str | None, Option(metavar="NAME", help="Its model's name.")] = None,
    max_new_tokens: Annotated[int | None, Option(min=1, help="Maximum tokens per answer.")] = None,
    gpus: Gpus = None,
    batch_size: Annotated[int, Option(min=1, help="Questions per batch on a GPU.")] = _BATCH_SIZE,
    require: Annotated[list[str] | None, Option(metavar="SPLIT.METRIC>=VALUE", help=_REQUIRE)] = None,
    as_json: AsJson = False,
) -> None:
    """Answer the held-out questions with the base model and with the adapter, and compare."""
    from mcp_lora.evaluate import evaluation, gates

    if bool(endpoint) != bool(endpoint_model):
        raise McpLoraError("use both options or neither: mcp-lora eval --endpoint URL --endpoint-model NAME")
    if benchmark and split:
        raise McpLoraError("the benchmark has no --split: mcp-lora eval --benchmark bfcl --limit 20")
    if base_only + adapter_only + bool(endpoint) > 1:
        what = "--base-only, --adapter-only and --endpoint exclude each other"
        raise McpLoraError(f"{what}: use one of them, as in mcp-lora eval --adapter-only")
    of_engine = {"--checkpoint": checkpoint, "--gpus": gpus, "--batch-size": batch_size != _BATCH_SIZE}
    if endpoint and (idle := ", ".join(option for option, given in of_engine.items() if given)):
        again = advice("eval", run, "--endpoint", endpoint, "--endpoint-model", "NAME")
        raise McpLoraError(f"{idle} cannot be used with --endpoint: {again}")
    request = evaluation.Request(
        run=run,
        checkpoint=checkpoint,
        splits=split or [],
        benchmark=bool(benchmark),
        limit=limit,
        models=[evaluation.BASE] * (not adapter_only) + [evaluation.ADAPTER] * (not base_only),
        endpoint=evaluation.Endpoint(endpoint, endpoint_model) if endpoint and endpoint_model else None,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        gpus=gpus,
        requirements=[gates.requirement(text) for text in require or []],
    )
    with console.progress() as progress:
        found = evaluation.evaluate(request, progress, console.say)
    if as_json:
        console.show(found.metrics().rstrip())
    else:
        console.show_evaluation(found)
    if found.left_out:
        console.say(f"warning: some questions cannot be asked: {console.counts(found.left_out)}")
    place = run / "eval" / (benchmark or "")
    console.say(f"all answers and metrics are in {place}; see them with {advice('report', run)}")
    if missed := gates.unmet(found, request.requirements):
        raise McpLoraError(f"{'; '.join(missed)}. See what is wrong: {advice('report', run)}", 1)


def report(
    runs: Annotated[list[Path] | None, Argument(metavar="RUN", help=_RUNS)] = None,
    output: Annotated[Path | None, Option("--output", "-o", help=_PAGE)] = None,
) -> None:
    """Write a report on a run as one HTML file: metrics, errors, examples, curves, data."""
    from mcp_lora.report.page import write

    console.say(f"the report is {write(runs or [DEFAULT], output)}")
