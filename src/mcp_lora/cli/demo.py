"""demo: the whole pipeline with the embedded model and the shipped sample, within a given time."""

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from typer import Option

from mcp_lora import demo_model
from mcp_lora.cli import console, data, train
from mcp_lora.data import conversion, dataset
from mcp_lora.evaluate import evaluation
from mcp_lora.evaluate.evaluation import ADAPTER, BASE, Evaluation
from mcp_lora.prompts import chat_template, render
from mcp_lora.report.page import write
from mcp_lora.train import recipe as recipes
from mcp_lora.train.machine import detect_machine

_MINUTES = "Minutes in all; by default 10, without bf16 in the processor 15."
_OUT, _RUN, _RECIPE = Path("data/demo"), Path("outputs/demo"), Path("demo")
_START = 25  # seconds in which the engine starts and stops
_QUESTION = 1200  # tokens of a question with ten candidates
_PREDICTED = 3  # times as fast as training
_WHERE = {"seen": "questions about known tools", "unseen_tool": "new tools", "unseen_server": "a new server"}


def demo(minutes: Annotated[float | None, Option(min=5, help=_MINUTES)] = None) -> None:
    """Run the whole pipeline on the CPU, with the embedded model and the shipped sample."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    bf16 = detect_machine().bf16
    minutes = minutes or (10 if bf16 else 15)
    end = time.monotonic() + 60 * minutes
    held_out_are = "some of its questions, tools and servers are held out"
    console.say(f"1/4 convert: the shipped sample, ten candidate tools; {held_out_are}")
    data.convert(
        [str(conversion.shipped_sample())],
        _OUT,
        candidates="4-10",
        test=0.12,
        holdout_tools=0.15,
        holdout_servers=0.15,
        no_call=0.3,
        questions_per_sample=8,
    )
    console.say(f"2/4 train: SmolLM2-135M-Instruct on the CPU, {minutes:g} minutes with the evaluation")
    rate = demo_model.speed(bf16)
    config = recipes.resolve_here(_RECIPE, str(demo_model.ensure()))
    folder = _OUT / dataset.RENDERED
    _, made = render.render(chat_template.load(config), dataset.file_of(_OUT, "train"), folder, config)
    tokens, held_out = made["lengths"]["tokens"], (dataset.statistics(_OUT) or {})["samples"]
    del held_out["train"]
    # questions of each split, so that asking two models takes two fifths of the time at most
    limit = max(5, int((12 * minutes - _START) * _PREDICTED * rate / _QUESTION / len(held_out)))
    asked = sum(min(limit, count) for count in held_out.values())
    evaluated = 2 * (_START + asked * _QUESTION / _PREDICTED / rate)
    epochs = max(0.1, rate * (end - time.monotonic() - evaluated - _START) / tokens)
    samples = round(epochs * made["samples"])
    console.say(
        f"{rate:.0f} tokens a second: {samples} samples ({epochs:.1f} epochs), {asked} questions after it"
    )
    words = [f"num_train_epochs={epochs:.2f}"]
    train.train(words, config=_RECIPE, model=demo_model.NAME, output=_RUN, overwrite=True)
    console.say("3/4 eval: the held-out questions, put to the base model and to the adapter")
    with console.progress() as progress:
        found = evaluation.evaluate(evaluation.Request(_RUN, limit=limit), progress, console.say)
    console.say("4/4 report: the results as one HTML page")
    page = write([_RUN])
    for line in _learned(found):
        typer.echo(line)
    typer.echo(f"The page: {page}; next: mcp-lora chat {_RUN}")


def _learned(found: Evaluation) -> Iterator[str]:
    """Yield what was learned: calls, values, refusals; before, and after."""

    def part(split: str, metric: str) -> str:
        shares = (found.splits[split].figures[model][metric].share for model in (BASE, ADAPTER))
        return " → ".join(f"{100 * share:.0f}" for share in shares)

    for metric, what in (("tool", "The right tool of ten"), ("ast", "and the right arguments")):
        parts = (f"{part(split, metric)} % of {where}" for split, where in _WHERE.items())
        yield f"{what}: {', '.join(parts)}"
    yield (
        f"No tool fits, and it calls none: {part('no_call', 'abstained')} %; "
        f"one fits, and it calls none: {part('seen', 'abstained')} %"
    )
