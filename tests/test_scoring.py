import pytest

from mcp_lora.records import ToolCall
from mcp_lora.scoring import Figures, Verdict, judge, summarise

EXPECTED = ToolCall("get-sum", {"a": 1, "b": [True]})


@pytest.mark.parametrize(
    ("predicted", "verdict"),
    [
        ([], Verdict(False, False, False)),
        ([ToolCall("echo", {"a": 1, "b": [True]})], Verdict(True, False, False)),
        ([ToolCall("get-sum", {"a": 1})], Verdict(True, True, False)),
        ([ToolCall("get-sum", {"a": 1, "b": [1]})], Verdict(True, True, False)),
        ([ToolCall("get-sum", {"b": [True], "a": 1})], Verdict(True, True, True)),
        ([EXPECTED, EXPECTED], Verdict(True, False, False)),
    ],
)
def test_an_answer_is_judged(predicted: list[ToolCall], verdict: Verdict) -> None:
    assert judge([EXPECTED], predicted) == verdict


def test_parallel_calls_are_right_in_any_order() -> None:
    one, two = ToolCall("get-sum", {"a": 1}), ToolCall("get-sum", {"a": 2})
    assert judge([one, two], [two, one]) == Verdict(True, True, True)
    assert judge([one, two], [one, one]) == Verdict(True, True, False)
    assert judge([one, two], [one]) == Verdict(True, False, False)


def test_shares_are_over_all_answers() -> None:
    verdicts = [Verdict(True, True, True), Verdict(True, True, False), Verdict(True, False, False)]
    assert summarise([*verdicts, Verdict(False, False, False)]) == Figures(4, 0.75, 0.5, 0.25)
