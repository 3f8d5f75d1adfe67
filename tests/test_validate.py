from typing import Any

import pytest

from mcp_lora.data.catalogue import Catalogue
from mcp_lora.data.records import (
    ANSWER,
    CALL,
    RESULT,
    SYSTEM,
    USER,
    Content,
    RowError,
    Settings,
    ToolCall,
    Turn,
)
from mcp_lora.data.tools import tools_in
from mcp_lora.data.validate import check

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
(SUM,) = tools_in({"name": "sum", "parameters": SCHEMA}, "s")


def call(*values: Any, name: str = "sum") -> Turn:
    return Turn(CALL, "", tuple(ToolCall(name, {"a": value}) for value in values), ("",) * len(values))


def checked(*turns: Turn, whole: bool = True, **options: bool) -> tuple[list[Turn], list[str]]:
    content = Content(list(turns), [SUM])
    return kept(content, whole, **options), content.cleaned


def kept(content: Content, whole: bool = False, **options: bool) -> list[Turn]:
    settings = Settings(turns="all" if whole else "call", max_observation=100, **options)
    return check(content, Catalogue(), settings)


@pytest.mark.parametrize(
    ("written", "read", "cleaned"),
    [
        ("Add.", "Add.", []),
        (" Add.\n", "Add.", ["white-space"]),
        (": Add.", "Add.", ["leading-colon"]),
        (":) Add.", ":) Add.", []),
        (":smile: Add.", ":smile: Add.", []),
    ],
)
def test_questions_are_cleaned_and_counted(written: str, read: str, cleaned: list[str]) -> None:
    assert checked(Turn(USER, written), call(1)) == ([Turn(USER, read), call(1)], cleaned)


QUESTION, RESULT_3, ANSWER_3 = Turn(USER, "Add."), Turn(RESULT, "3"), Turn(ANSWER, "It is 3.")


def test_up_to_the_first_call_or_the_whole() -> None:
    turns = (Turn(USER, "Hello"), Turn(ANSWER, "Hi"), QUESTION, call(1), RESULT_3, ANSWER_3)
    assert checked(*turns, whole=False) == (list(turns[:4]), [])
    assert checked(*turns) == (list(turns), [])


def test_without_a_call_up_to_the_first_answer() -> None:
    turns = (QUESTION, ANSWER_3, QUESTION, ANSWER_3)
    assert checked(*turns, whole=False)[0] == list(turns[:2])


def test_what_has_no_answer_is_left_off_and_counted() -> None:
    assert checked(QUESTION, call(1), RESULT_3) == ([QUESTION, call(1)], ["trailing-result"])
    assert checked(QUESTION, ANSWER_3, QUESTION) == ([QUESTION, ANSWER_3], ["trailing-user"])


def test_parallel_calls_are_one_turn_and_each_result_its_own() -> None:
    four = Turn(RESULT, "4")
    turns, cleaned = checked(QUESTION, call(1), call(2), RESULT_3, four, ANSWER_3)
    assert turns == [QUESTION, call(1, 2), RESULT_3, four, ANSWER_3]
    assert cleaned == []


def test_what_an_assistant_says_in_a_row_is_one_turn() -> None:
    well, named = Turn(ANSWER, "Well …", reasoning="Hm."), call(1)._replace(ids=("x",))
    assert checked(QUESTION, well, named) == (
        [QUESTION, named._replace(text="Well …", reasoning="Hm.")],
        [],
    )
    assert checked(QUESTION, Turn(ANSWER, " "), call(1)) == ([QUESTION, call(1)], [])
    assert checked(QUESTION, well, ANSWER_3)[0] == [
        QUESTION,
        Turn(ANSWER, "Well …\n\nIt is 3.", reasoning="Hm."),
    ]


def test_a_long_result_is_shortened_visibly_and_counted() -> None:
    turns, cleaned = checked(QUESTION, call(1), Turn(RESULT, "x" * 150), ANSWER_3)
    assert turns[2].text == "x" * 100 + "\n[… 50 more characters]"
    assert cleaned == ["shortened-result"]


def test_system_messages_stand_where_they_stood() -> None:
    system, later = Turn(SYSTEM, "Be brief."), Turn(SYSTEM, "It is ten.")
    turns = [system, QUESTION, call(1), RESULT_3, later, ANSWER_3]
    assert checked(*turns) == (turns, [])
    assert checked(*turns, whole=False) == (turns[:3], [])
    assert checked(system, system, QUESTION, call(1))[0][0].text == "Be brief.\n\nBe brief."


def test_results_come_in_the_order_of_their_calls() -> None:
    calls, four = call(1, 2)._replace(ids=("x", "y")), Turn(RESULT, "4", ids=("y",))
    three = RESULT_3._replace(ids=("x",))
    assert checked(QUESTION, calls, four, three, ANSWER_3)[0] == [QUESTION, calls, three, four, ANSWER_3]


def test_a_call_that_failed_is_context() -> None:
    failed, again = RESULT_3._replace(failed=True), call(2)
    turns, cleaned = checked(QUESTION, call(1), failed, again, whole=False)
    assert turns == [QUESTION, call(1)._replace(trained=False), failed, again] and cleaned == ["failed-call"]
    assert checked(QUESTION, call(1), failed, again, keep_failed=True)[0][1].trained
    later = checked(QUESTION, call(1), RESULT_3, call(2), failed, again, whole=False)
    assert later == ([QUESTION, call(1)], [])  # of what is left off nothing is counted
    with pytest.raises(RowError) as caught:
        checked(QUESTION, call(1), failed)
    assert caught.value.reason == "failed-call"
    says_so = Turn(RESULT, "Error: no such value")
    assert not checked(QUESTION, call(1), says_so, again)[0][1].trained  # called again, otherwise
    assert checked(QUESTION, call(1), says_so, ANSWER_3)[0][1].trained  # an answer may be about an error


def test_what_was_thought_can_be_left_out() -> None:
    thinking = call(1)._replace(reasoning="Hm.")
    assert checked(QUESTION, thinking) == ([QUESTION, thinking], [])
    assert checked(QUESTION, thinking, drop_reasoning=True) == ([QUESTION, call(1)], ["dropped-reasoning"])


@pytest.mark.parametrize(
    ("schema", "given", "left"),
    [
        ({"type": "integer"}, {"a": None}, {}),
        ({"type": ["integer", "null"]}, {"a": None}, {"a": None}),
        ({"anyOf": [{"type": "integer"}, {"type": "null"}]}, {"a": None}, {"a": None}),
        ({}, {"a": None}, {"a": None}),
        ({"type": "object", "properties": {"b": {"type": "string"}}}, {"a": {"b": None}}, {"a": {}}),
        (
            {"type": "array", "items": {"properties": {"b": {"type": "string"}, "c": {"type": "string"}}}},
            {"a": [{"b": "x", "c": None}, None]},
            {"a": [{"b": "x"}, None]},
        ),
        ({"type": "integer"}, {"a": 1, "z": None}, {"a": 1}),
        ({"type": {"type": "string"}}, {"a": None}, {}),
    ],
)
def test_nulls_that_a_table_has_filled_in_are_no_arguments(
    schema: dict[str, Any], given: dict[str, Any], left: dict[str, Any]
) -> None:
    parameters = {"type": "object", "properties": {"a": schema}}
    content = Content([QUESTION, Turn(CALL, "", (ToolCall("t", given),), ("",))])
    content.tools = list(tools_in({"name": "t", "parameters": parameters}))
    assert kept(content, False)[1].calls[0].arguments == left
    assert content.cleaned == ["null-argument"] * (left != given)


def test_parameters_that_the_schema_does_not_know_are_counted_or_refused() -> None:
    turn = Turn(CALL, "", (ToolCall("sum", {"a": 1, "z": 2}),), ("",))
    content = Content([QUESTION, turn], [SUM])
    kept(content, False)
    assert content.cleaned == ["unknown-parameter"]
    with pytest.raises(RowError, match="sum has no z"):
        checked(QUESTION, turn, strict_schema=True)


def test_a_broken_message_later_on_costs_what_comes_after_it() -> None:
    content = Content([QUESTION, call(1), RESULT_3], [SUM], error=RowError("bad-json", "x"))
    assert kept(content, False) == [QUESTION, call(1)] and content.cleaned == []
    content = Content([QUESTION, call(1), RESULT_3], [SUM], error=RowError("bad-json", "x"))
    assert kept(content, True) == [QUESTION, call(1)]
    assert content.cleaned == ["trailing-result", "ends-at-a-broken-message"]
    assert checked(QUESTION, call(1), ANSWER_3) == ([QUESTION, call(1)], ["ends-at-a-broken-message"])
    with pytest.raises(RowError, match="x"):
        kept(Content([QUESTION], [SUM], error=RowError("bad-json", "x")), False)


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        ([], "no-instruction"),
        ([QUESTION], "no-instruction"),
        ([Turn(USER, " : "), call(1)], None),
        ([Turn(USER, " "), call(1)], "no-instruction"),
        ([call(1)], "bad-order"),
        ([ANSWER_3, QUESTION, call(1)], "bad-order"),
        ([QUESTION, RESULT_3, ANSWER_3], "bad-order"),
        ([QUESTION, call(1), QUESTION, RESULT_3], None),
        ([QUESTION, call(1, name="other")], "unknown-tool"),
        ([QUESTION, call("one")], "schema"),
        ([QUESTION, call(1), RESULT_3, call("two")], "schema"),
    ],
)
def test_what_cannot_be_trained_on_is_a_fault(turns: list[Turn], reason: str | None) -> None:
    if reason is None:
        checked(*turns)
    else:
        with pytest.raises(RowError) as caught:
            checked(*turns)
        assert caught.value.reason == reason


def test_without_tools_there_is_nothing_to_learn() -> None:
    with pytest.raises(RowError) as caught:
        kept(Content([QUESTION, ANSWER_3], []), True)
    assert caught.value.reason == "no-tool"


def test_an_empty_question_is_told_before_what_comes_after_it() -> None:
    with pytest.raises(RowError) as caught:
        checked(Turn(USER, " "), RESULT_3, call(1))
    assert caught.value.reason == "no-instruction"
