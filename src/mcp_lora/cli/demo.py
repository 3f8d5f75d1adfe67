"""demo: the whole pipeline with the embedded model and the shipped sample, within a given time."""

import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Option

from mcp_lora import demo_model
from mcp_lora.cli import console, data, train
from mcp_lora.data import conversion, dataset
from mcp_lora.prompts import chat_template, render
from mcp_lora.train import recipe as recipes
from mcp_lora.train.machine import detect_machine

if TYPE_CHECKING:
    from mcp_lora.evaluate.evaluation import Evaluation

_SEED = "Of the training: the first weights, the order of the samples."
_MINUTES = "Minutes in all; by default 10, without bf16 in the processor 15."
_OUT, _RUN, _RECIPE = Path("data/demo"), Path("outputs/demo"), Path("demo")
_ENGINE = 0.7  # of that speed, with the optimizer and samples of all lengths: 279 tokens a second of 401
_LEAST = 0.1  # epochs
_START = 30  # seconds in which the engine starts and stops
_PREDICTED = 3  # an answer takes a third of the time of training on its prompt
_WHERE = {"seen": "questions about known tools", "unseen_tool": "new tools", "unseen_server": "a new server"}


def demo(
    minutes: Annotated[float | None, Option(min=5, help=_MINUTES)] = None,
    seed: Annotated[int, Option(min=0, help=_SEED)] = 42,
) -> None:
    """Run the whole pipeline on the CPU, with the embedded model and the shipped sample."""
    from mcp_lora.evaluate import evaluation, questions
    from mcp_lora.report.page import write

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
    config = recipes.resolve_here(_RECIPE, str(demo_model.ensure())) | {"seed": seed}
    rate = _ENGINE * demo_model.speed(config["lora_rank"], bf16)
    folder = _OUT / dataset.RENDERED
    _, made = render.render(chat_template.load(config), dataset.file_of(_OUT, "train"), folder, config)
    counts = [len(list(dataset.samples(_OUT, split))) for split in questions.SPLITS]
    left = end - time.monotonic()
    limit, epochs = plan(left, rate, made["lengths"]["tokens"], counts)
    if epochs == _LEAST:
        console.say(f"warning: this machine is slow, the demo takes longer than {minutes:g} minutes")
    samples, asked = round(epochs * made["samples"]), sum(min(limit, count) for count in counts)
    console.say(
        f"{rate:.0f} tokens a second: {samples} samples ({epochs:.2f} epochs), then {asked} questions"
    )
    words = [f"num_train_epochs={epochs:.2f}", f"seed={seed}"]
    train.train(words, config=_RECIPE, model=demo_model.NAME, output=_RUN, overwrite=True)
    console.say("3/4 eval: the held-out questions, put to the base model and to the adapter")
    with console.progress() as progress:
        found = evaluation.evaluate(evaluation.Request(_RUN, limit=limit), progress, console.say)
    console.say("4/4 report: the results as one HTML page")
    page = write([_RUN])
    for line in _learned(found):
        console.show(line)
    console.show(f"The page: {page}; next: mcp-lora chat {_RUN}")


def plan(seconds: float, rate: float, tokens: int, counts: Sequence[int]) -> tuple[int, float]:
    """Return how many questions of a split to ask at most, and how many epochs to train, in a given time.

    Both models are asked, which takes up to two fifths of the time: 5 questions of each split at least.

    Args:
        seconds: for training and evaluation.
        rate: tokens per second in training.
        tokens: of an epoch.
        counts: the number of questions of each split.
    """

    def asking(limit: int) -> float:
        asked = sum(min(limit, count) for count in counts)
        return 2 * (_START + asked * demo_model.SAMPLE / _PREDICTED / rate)

    limit = max([5, *(limit for limit in range(max(counts) + 1) if asking(limit) <= 0.4 * seconds)])
    return limit, max(_LEAST, rate * (seconds - asking(limit) - _START) / tokens)


def _learned(found: "Evaluation") -> Iterator[str]:
    """Yield what was learned: calls, values, refusals; before, and after."""

    def part(split: str, metric: str) -> str:
        rates = (metrics[metric].rate for metrics in found.splits[split].metrics.values())
        return " → ".join(f"{100 * rate:.0f}" for rate in rates)

    for metric, what in (("tool", "Gold tool among ten"), ("ast", "and the right arguments")):
        parts = (f"{part(split, metric)} % of {where}" for split, where in _WHERE.items())
        yield f"{what}: {', '.join(parts)}"
    yield (
        f"Answers that end without a call: {part('no_call', 'abstained')} % where no tool fits, "
        f"{part('seen', 'abstained')} % where one does"
    )
