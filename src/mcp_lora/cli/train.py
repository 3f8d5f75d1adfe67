"""train, recipe, doctor."""

import json
from pathlib import Path
from typing import Annotated, Literal

from typer import Argument, Option

from mcp_lora.cli import console
from mcp_lora.cli.options import AsJson, Gpus, Model, Recipe
from mcp_lora.errors import McpLoraError, explained
from mcp_lora.train import recipe as recipes
from mcp_lora.train import training
from mcp_lora.train.machine import detect_machine

_MEMORY = "Of each GPU, if not all of it: --dry-run --gpus 8 --gpu-memory 80 plans for another machine."
_SPEED = "Of each GPU, for the hours that --dry-run estimates; an A100's by default."
_SHIPPED = "lora_config, qlora or demo."
_OVERRIDES = "Settings with LLaMA-Factory's keys."


def train(
    overrides: Annotated[list[str] | None, Argument(metavar="KEY=VALUE", help=_OVERRIDES)] = None,
    config: Recipe = recipes.RECIPE,
    model: Model = None,
    data: Annotated[list[Path] | None, Option(help="Tool-call data to train on; repeatable.")] = None,
    output: Annotated[Path | None, Option("--output", "-o", help="The run's folder.")] = None,
    gpus: Gpus = None,
    gpu_memory: Annotated[float | None, Option(min=1, metavar="GB", help=_MEMORY)] = None,
    tokens_per_second: Annotated[float | None, Option(min=0.1, metavar="N", help=_SPEED)] = None,
    nodes: Annotated[int | None, Option(min=1, help="Number of nodes; 1 by default.")] = None,
    node_rank: Annotated[int | None, Option(min=0, help="This node's rank, from 0.")] = None,
    master: Annotated[str | None, Option(metavar="HOST:PORT", help="The first node's address.")] = None,
    zero: Annotated[Literal["0", "2", "3"] | None, Option(help="DeepSpeed's ZeRO stage.")] = None,
    global_batch: Annotated[int | None, Option(min=1, help="Samples per optimizer step.")] = None,
    dry_run: Annotated[bool, Option("--dry-run", help="Show what would be run.")] = False,
    no_retry: Annotated[bool, Option("--no-retry", help="Do not retry when out of memory.")] = False,
    resume: Annotated[bool, Option("--resume", help="Resume from the newest checkpoint.")] = False,
    overwrite: Annotated[bool, Option("--overwrite", help="Start over; the old run is moved away.")] = False,
) -> None:
    """Train the LoRA recipe with LLaMA-Factory."""
    request = training.Request(
        recipe=config,
        overrides=overrides or [],
        model=model,
        data=data or [],
        output=output,
        zero=zero,
        global_batch=global_batch,
        gpus=gpus,
        gpu_memory=gpu_memory,
        nodes=nodes,
        node_rank=node_rank,
        master=master,
        retry=not no_retry,
        resume=resume,
        overwrite=overwrite,
    )
    if dry_run:
        console.show(training.preview(request, console.say, tokens_per_second))
        return
    if tokens_per_second:
        again = f"mcp-lora train --dry-run --tokens-per-second {tokens_per_second:g}"
        raise McpLoraError(f"--tokens-per-second is only for the hours that a dry run estimates: {again}")
    with console.progress() as progress:
        training.train(request, console.say, progress)


def recipe(name: Annotated[str, Argument(metavar="NAME", help=_SHIPPED)] = "lora_config") -> None:
    """Print a shipped recipe, to edit and pass to --config."""
    with explained(f"there is no recipe {name}", "mcp-lora recipe lora_config, qlora or demo"):
        console.show(recipes.find(Path(name)).read_text("utf-8", "replace").rstrip())


def doctor(model: Model = None, config: Recipe = recipes.RECIPE, as_json: AsJson = False) -> None:
    """Check whether this machine, the packages, the model and the data are ready for training."""
    settings = recipes.resolve_here(config, model)
    from mcp_lora.doctor import examine

    findings = []
    for finding in examine(settings, detect_machine()):
        findings.append(finding)
        if not as_json:
            console.show(f"{finding.verdict:8} {finding.what:18} {finding.words}")
    if as_json:
        console.show(json.dumps([vars(finding) for finding in findings], indent=2))
    if problems := [finding.what for finding in findings if finding.verdict == "problem"]:
        raise McpLoraError(f"not ready to train ({', '.join(problems)}): see above, and mcp-lora doctor", 1)
