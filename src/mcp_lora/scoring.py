"""Predicted against expected calls: the figures of an evaluation."""

import json
from collections.abc import Sequence
from dataclasses import dataclass

from mcp_lora.records import ToolCall


@dataclass(frozen=True)
class Verdict:
    """What is right about one answer; each figure implies the ones before it."""

    valid: bool
    tool: bool
    exact: bool


@dataclass(frozen=True)
class Figures:
    """Shares from 0 to 1 over `count` answers: valid calls, right tool, exact call."""

    count: int
    valid: float
    tool: float
    exact: float


def judge(expected: Sequence[ToolCall], predicted: Sequence[ToolCall]) -> Verdict:
    """Judge the calls of one answer.

    valid: the answer is one call or more that can be read. tool: it calls the right tools, each as
    often as is right, parallel ones in any order. exact: with the right arguments too, equal as JSON
    (1 is not 1.0, nor true).
    """
    tool = sorted(call.name for call in predicted) == sorted(call.name for call in expected)
    exact = tool and sorted(map(_canonical, predicted)) == sorted(map(_canonical, expected))
    return Verdict(bool(predicted), tool, exact)


def summarise(verdicts: Sequence[Verdict]) -> Figures:
    """Return the shares of right answers; there must be at least one."""
    count = len(verdicts)
    return Figures(
        count,
        sum(verdict.valid for verdict in verdicts) / count,
        sum(verdict.tool for verdict in verdicts) / count,
        sum(verdict.exact for verdict in verdicts) / count,
    )


def _canonical(call: ToolCall) -> str:
    return json.dumps([call.name, call.arguments], sort_keys=True)
