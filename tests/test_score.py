from dataclasses import replace
from typing import Any

import pytest

from mcp_lora.data.records import ToolCall
from mcp_lora.evaluate.score import ERRORS, Verdict, judge

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
RIGHT = Verdict(*[True] * 6, abstained=False, error=None)
NOT_EXACT = {"ast": False, "exact": False}
NOT_PARAM = {"param": False} | NOT_EXACT
NOT_TOOL = {"tool": False} | NOT_PARAM


def verdict(error: str | None, **changes: bool) -> Verdict:
    return replace(RIGHT, error=error, **changes)


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


def test_parallel_calls_are_right_in_any_order() -> None:
    one, two = call(a=1), call(a=2)
    assert judge([one, two], [two, one], SCHEMAS) == RIGHT
    assert judge([one, two], [call(a=1.0), two], SCHEMAS) == verdict(None, exact=False)
    for predicted, error in (
        ([one, one], "wrong value"),
        ([call(), two], "missing argument"),
        ([one], "wrong tool"),
    ):
        assert judge([one, two], predicted, SCHEMAS).error == error


def test_an_optional_argument_at_its_default_may_be_left_out() -> None:
    assert judge([call(a=1, unit="Metres")], [call(a=1)], SCHEMAS) == verdict(None, exact=False)
    assert judge([call(a=1, unit="feet")], [call(a=1)], SCHEMAS).error == "missing argument"


def test_a_schema_that_refers_to_itself_ends() -> None:
    node: dict[str, Any] = {"anyOf": [{"$ref": "#/$defs/node"}] * 30 + [{"type": "number"}]}
    schema = {"type": "object", "properties": {"a": {"$ref": "#/$defs/node"}}, "$defs": {"node": node}}
    assert judge([call(a=1)], [call(a=1.0)], {"get-sum": schema}) == verdict(None, exact=False)
