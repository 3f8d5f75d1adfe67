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


def judge(expected: ToolCall, predicted: Sequence[ToolCall]) -> Verdict:
    """Judge the calls of one answer.

    valid: the answer is one call or more that can be read. tool: it is one call, of the right
    tool. exact: with the right arguments too, equal as JSON (1 is not 1.0, nor true).
    """
    tool = len(predicted) == 1 and predicted[0].name == expected.name
    exact = tool and _canonical(predicted[0]) == _canonical(expected)
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
    return json.dumps(call.arguments, sort_keys=True)
