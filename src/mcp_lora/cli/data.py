"""convert and inspect."""

import json
import re
from decimal import Decimal
from itertools import islice
from pathlib import Path
from typing import Annotated, Literal

from typer import Argument, Option

from mcp_lora import demo_model
from mcp_lora.cli import console
from mcp_lora.cli.options import SPLITS, Model, Recipe
from mcp_lora.data import conversion, dataset
from mcp_lora.data.records import RowError
from mcp_lora.errors import McpLoraError
from mcp_lora.prompts import chat_template, render
from mcp_lora.train import recipe as recipes
from mcp_lora.train import training

_INPUTS = (
    "Tool-call data: files (.json, .jsonl, .jsonl.gz, .parquet), folders, globs; "
    "by default the newest data/filtered/filtered_*.json."
)
_CANDIDATES = (
    "Tools per sample, including the gold tool; 4-10 varies it from one training sample to the next."
)
_QUESTIONS = "Single-turn questions that share the candidates of one training sample."
_TURNS = "Up to the first call, the whole conversation, or one sample per call."
_STRICT_SCHEMA = "Reject parameters that the schema does not define."
_PLAIN = "Also train on conversations without tools, so that plain chat stays as it was."
_REDACT = "Replace keys, mail addresses and home folders; by default in session logs."


def convert(
    inputs: Annotated[list[str] | None, Argument(metavar="INPUT", help=_INPUTS)] = None,
    output: Annotated[Path, Option("--output", "-o", help="Folder to write.")] = dataset.FOLDER,
    tools: Annotated[list[str] | None, Option(metavar="PATH", help="A tool catalogue; repeatable.")] = None,
    turns: Annotated[Literal["call", "all", "each"], Option(help=_TURNS)] = "call",
    max_observation: Annotated[int, Option(min=1, help="Maximum characters of a tool's result.")] = 4000,
    candidates: Annotated[str, Option(metavar="N|N-M", help=_CANDIDATES)] = "10",
    holdout_servers: Annotated[float, Option(min=0, max=0.9, help="Fraction of servers held out.")] = 0.0,
    holdout_tools: Annotated[float, Option(min=0, max=0.9, help="Fraction of tools held out.")] = 0.0,
    test: Annotated[float, Option(min=0, max=0.9, help="Fraction of other rows held out.")] = 0.1,
    no_call: Annotated[float, Option(min=0, max=1, help="Fraction of extra no-call samples.")] = 0.0,
    questions_per_sample: Annotated[int, Option(min=1, help=_QUESTIONS)] = 1,
    seed: Annotated[int, Option(help="Decides what is held out, and the candidates.")] = 42,
    drop_reasoning: Annotated[bool, Option("--drop-reasoning", help="Leave out the reasoning.")] = False,
    strict_schema: Annotated[bool, Option("--strict-schema", help=_STRICT_SCHEMA)] = False,
    keep_failed: Annotated[bool, Option("--keep-failed", help="Also train on calls that failed.")] = False,
    keep_plain: Annotated[bool, Option("--keep-plain", help=_PLAIN)] = False,
    redact: Annotated[bool | None, Option("--redact/--no-redact", help=_REDACT)] = None,
    explain: Annotated[int | None, Option(min=1, help="Only show one row at each step.")] = None,
    strict: Annotated[bool, Option("--strict", help="Exit with 1 if a row is rejected.")] = False,
    max_rejects: Annotated[str, Option(metavar="N", help="Exit with 1 if more: 5%, or a count.")] = "100%",
) -> None:
    """Turn tool-call data into LLaMA-Factory's dataset format."""
    bound = "0" if strict else max_rejects
    if not re.fullmatch(r"\d+(\.\d+)?%?", bound):
        raise McpLoraError(f"--max-rejects {bound}: neither a percentage nor a number: --max-rejects 5%")
    low, _, high = candidates.partition("-")
    if not re.fullmatch(r"[1-9]\d*(-[1-9]\d*)?", candidates) or int(high or low) < int(low):
        raise McpLoraError(f"--candidates {candidates}: neither a number nor a range: --candidates 4-10")
    settings = conversion.Settings(
        inputs=inputs or [],
        tools=tools or [],
        turns=turns,
        max_observation=max_observation,
        candidates=candidates if high else int(low),
        holdout_servers=holdout_servers,
        holdout_tools=holdout_tools,
        test=test,
        no_call=no_call,
        questions_per_sample=questions_per_sample,
        seed=seed,
        drop_reasoning=drop_reasoning,
        strict_schema=strict_schema,
        keep_failed=keep_failed,
        keep_plain=keep_plain,
        redact=redact,
    )
    if explain:
        for step, what in conversion.explain(settings, explain):
            text = json.dumps(what, ensure_ascii=False, indent=2, default=str)
            console.show(f"# {step}\n{text}")
        return
    with console.progress() as progress, dataset.locked(output):
        statistics = conversion.convert(settings, output, progress)
    console.show_statistics(statistics, output)
    rejected, rows = sum(statistics.rejected.values()), statistics.read
    limit = Decimal(bound.rstrip("%"))  # a float would make 56 of 0.57 % of 10,000
    allowed = int(limit * rows / 100 if bound.endswith("%") else limit)
    if rejected > allowed:
        what = f"{rejected} of {rows} rows were rejected, at most {allowed} may be"
        raise McpLoraError(f"{what}: see why in {output / 'rejected.jsonl'}", code=1)


def inspect(
    row: Annotated[int, Argument(min=1, metavar="ROW", help="Number of the row, from 1.")] = 1,
    split: Annotated[str, Option(metavar="NAME", help=f"train, {SPLITS}.")] = "train",
    model: Model = None,
    config: Recipe = recipes.RECIPE,
    data: Annotated[Path | None, Option("--from", help="The dataset's folder, if not the recipe's.")] = None,
    ids: Annotated[bool, Option("--ids", help="Show the token ids.")] = False,
    as_json: Annotated[bool, Option("--json", help="One line of JSON per sample.")] = False,
) -> None:
    """Show a row as the model is trained on it, with the targets in another colour."""
    recipe = recipes.resolve_here(config, model)
    recipe |= demo_model.located(recipe, fetch=True)
    if problems := training.settings_problems(recipe):
        raise McpLoraError(f"{'; '.join(problems)}. Fix {config} and run again")
    folder = data or Path(recipe["dataset_dir"])
    found = next(islice(dataset.samples(folder, split), row - 1, None), None)
    if found is None:
        raise McpLoraError(f"{split} in {folder} has fewer than {row} rows: mcp-lora inspect 1")
    template = chat_template.load(recipe)
    settings = render.settings_of(recipe)
    try:
        fitted = render.fit(template, found, settings)
    except RowError as error:
        raise McpLoraError(f"row {row} of {split} is left out: {error}: mcp-lora inspect") from None
    for sample in fitted.samples:
        if as_json:
            shown = ("input_ids", "labels", "prompt", "target")
            console.show(json.dumps({key: getattr(sample, key) for key in shown}))
        else:
            console.show_sample(sample, template, ids)
    if not as_json:
        lost = f"; {fitted.dropped} distractors are left out to fit" if fitted.dropped else ""
        what = f"{len(fitted.samples)} samples, cutoff_len {settings['cutoff_len']}"
        console.say(f"{what}, {template.note}{lost}")
