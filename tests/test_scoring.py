from dataclasses import replace
from typing import Any

import pytest

from mcp_lora.records import ToolCall
from mcp_lora.scoring import ERRORS, Verdict, judge

EXPECTED = ToolCall("get-sum", {"a": 1, "b": [True]})
SCHEMAS: dict[str, Any] = {
    "get-sum": {
        "type": "object",
        "properties": {
            "a": {"type": "number"},
            "b": {"type": "array"},
            "unit": {"type": "string", "default": "Metres"},
            "note": {"type": "string"},
        },
        "required": ["a"],
    },
    "echo": {"type": "object", "properties": {}},
}
RIGHT = Verdict(
    valid=True, schema=True, tool=True, param=True, ast=True, exact=True, abstained=False, error=None
)


def verdict(error: str | None, **changes: bool) -> Verdict:
    return replace(RIGHT, error=error, **changes)


NOT_EXACT = {"ast": False, "exact": False}
NOT_PARAM = {"param": False} | NOT_EXACT
NOT_TOOL = {"tool": False} | NOT_PARAM


def call(name: str = "get-sum", **arguments: Any) -> ToolCall:
    return ToolCall(name, arguments)


@pytest.mark.parametrize(
    ("predicted", "expected"),
    [
        ([EXPECTED], RIGHT),
        ([call(b=[True], a=1)], RIGHT),
        ([call(a=1.0, b=[True])], verdict(None, exact=False)),
        ([call(a=1, b=[True], unit="metres")], verdict(None, exact=False)),
        ([call(a=1, b=[True], unit="miles")], verdict("wrong value", **NOT_EXACT)),
        ([call(a=1, b=[1])], verdict("wrong value", **NOT_EXACT)),
        ([call(a="1", b=[True])], verdict("wrong type", **NOT_EXACT)),
        ([call(a=2, b="True")], verdict("wrong type", **NOT_EXACT)),
        ([call(a=1, b=[True], note="x")], verdict("unexpected argument", **NOT_PARAM)),
        ([call(a=1, b=[True], zzz=1)], verdict("unexpected argument", **NOT_PARAM)),
        ([call(a=1)], verdict("missing argument", **NOT_PARAM)),
        ([call(a=1, zzz=1)], verdict("missing argument", **NOT_PARAM)),
        ([call("echo")], verdict("wrong tool", **NOT_TOOL)),
        ([call("unknown")], verdict("wrong tool", schema=False, **NOT_TOOL)),
        ([EXPECTED, EXPECTED], verdict("wrong tool", **NOT_TOOL)),
        ([], verdict("no call", valid=False, schema=False, abstained=True, **NOT_TOOL)),
    ],
)
def test_an_answer_is_judged(predicted: list[ToolCall], expected: Verdict) -> None:
    assert judge([EXPECTED], predicted, SCHEMAS) == expected


def test_a_call_that_cannot_be_read_is_no_abstention() -> None:
    found = judge([EXPECTED], [], SCHEMAS, tried=True)
    assert found == verdict("unreadable call", valid=False, schema=False, **NOT_TOOL)
    assert not judge([EXPECTED], [EXPECTED], SCHEMAS, valid_arguments=False).schema


def test_where_no_tool_fits_no_call_is_right() -> None:
    nothing = verdict(None, valid=False, schema=False, abstained=True, **NOT_TOOL)
    assert judge([], [], SCHEMAS) == nothing
    for predicted, tried in [([EXPECTED], False), ([], True)]:
        found = judge([], predicted, SCHEMAS, tried)
        assert (found.abstained, found.ast, found.error) == (False, False, ERRORS[0])


@pytest.mark.parametrize(
    ("expected", "predicted", "error"),
    [
        ([call(a=1), call(a=2)], [call(a=1), call(a=1)], "wrong value"),
        ([call(a=1), call(a=2)], [call(), call(a=2)], "missing argument"),
        ([call(a=1), call(a=2)], [call(a=1)], "wrong tool"),
        ([call(a=1, unit="feet")], [call(a=1)], "missing argument"),
    ],
)
def test_the_first_error(expected: list[ToolCall], predicted: list[ToolCall], error: str) -> None:
    assert judge(expected, predicted, SCHEMAS).error == error


def test_what_is_right_without_being_equal() -> None:
    one, two = call(a=1), call(a=2)
    assert judge([one, two], [two, one], SCHEMAS) == RIGHT  # parallel calls, in any order
    node: dict[str, Any] = {"anyOf": [{"$ref": "#/$defs/node"}] * 30 + [{"type": "number"}]}
    endless = {"type": "object", "properties": {"a": {"$ref": "#/$defs/node"}}, "$defs": {"node": node}}
    for expected, predicted, schemas in [
        ([one, two], [call(a=1.0), two], SCHEMAS),
        ([call(a=1, unit="Metres")], [one], SCHEMAS),  # the default
        ([one], [call(a=1.0)], {"get-sum": endless}),  # a schema that refers to itself ends
    ]:
        assert judge(expected, predicted, schemas) == verdict(None, exact=False)
