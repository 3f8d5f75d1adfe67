"""Bounds on the metrics of an evaluation, for CI: `--require "unseen_tool.ast>=0.6"`."""

import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mcp_lora.errors import McpLoraError
from mcp_lora.evaluate import benchmark, questions
from mcp_lora.evaluate.score import METRICS

if TYPE_CHECKING:
    from mcp_lora.evaluate.evaluation import Evaluation

_SIGNS = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}


@dataclass(frozen=True)
class Requirement:
    """A bound on a split's metric, or on a category of the benchmark, and its text: unseen_tool.ast>=0.6."""

    text: str
    split: str
    metric: str
    holds: Callable[[float, float], bool]
    bound: float


def requirement(text: str) -> Requirement:
    """Parse `SPLIT.METRIC>=VALUE`, or with >, <=, <; the value is from 0 to 1, or in %.

    Raises McpLoraError if it has another form.
    """
    found = re.fullmatch(r"\s*((\w+)\.(\w+))\s*(>=|<=|>|<)\s*(\d*\.?\d+)(%?)\s*", text)
    if not found:
        example = 'mcp-lora eval --require "unseen_tool.ast>=0.6"'
        raise McpLoraError(f"--require {text} is not SPLIT.METRIC>=VALUE: {example}")
    metric, split, name, sign, bound, percent = found.groups()
    of_benchmark = split == benchmark.NAME and name in benchmark.CATEGORIES
    if not of_benchmark and (split not in questions.SPLITS or name not in METRICS):
        splits, names = " or ".join(questions.SPLITS), " or ".join(METRICS)
        what = f"a metric is SPLIT.NAME, with {splits} and {names}, or {benchmark.NAME}.CATEGORY"
        raise McpLoraError(f"--require {text}: {what}: see docs/evaluation.md")
    rate = float(bound) / (100 if percent else 1)
    if rate > 1:
        again = f'mcp-lora eval --require "{metric}{sign}{min(float(bound), 100):g}%"'
        raise McpLoraError(f"--require {text}: {bound}{percent} is not between 0 and 1: {again}")
    return Requirement(text.strip(), metric if of_benchmark else split, metric, _SIGNS[sign], rate)


def unmet(evaluation: "Evaluation", requirements: Sequence[Requirement]) -> list[str]:
    """Return messages on the requirements that the last model's metrics do not meet.

    Raises McpLoraError if a metric was not computed.
    """
    name = list(evaluation.answers)[-1]
    there: dict[str, float] = {}
    for split, each in evaluation.splits.items():
        rates = {metric: found.rate for metric, found in each.metrics[name].items()}
        if benchmark.is_asked_in(split):
            there[split] = rates[metrics_of(split)[-1]]
        else:
            there |= {f"{split}.{metric}": rate for metric, rate in rates.items()}
    for one in requirements:
        if one.metric not in there:
            raise McpLoraError(f"--require {one.text}: no {one.metric}, only {', '.join(there)}")
    return [
        f"{one.metric} is {there[one.metric]:.3f}, and {one.text} is required"
        for one in requirements
        if not one.holds(there[one.metric], one.bound)
    ]


def metrics_of(split: str) -> tuple[str, ...]:
    """Return the metrics of a split; in the benchmark the last one is the leaderboard's verdict."""
    if split == "no_call" or split.endswith("irrelevance"):
        return ("abstained",)
    return ("valid", "schema", "tool", "ast") if benchmark.is_asked_in(split) else METRICS
