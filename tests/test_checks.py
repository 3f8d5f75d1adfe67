from typing import Any

import pytest

from mcp_lora.catalogue import Catalogue, tool_of
from mcp_lora.checks import check
from mcp_lora.records import ANSWER, CALL, RESULT, USER, Content, Fault, ToolCall, Turn

SUM = tool_of("s", {"name": "sum", "parameters": {"properties": {"a": {"type": "integer"}}}})


def call(*values: Any, name: str = "sum") -> Turn:
    return Turn(CALL, "", tuple(ToolCall(name, {"a": value}) for value in values), ("",) * len(values))


def checked(*turns: Turn, whole: bool = True) -> tuple[list[Turn], list[str]]:
    content = Content(list(turns), [SUM])
    return check(content, Catalogue(), whole, 100), content.cleaned


@pytest.mark.parametrize(
    ("written", "read", "cleaned"),
    [
        ("Add.", "Add.", []),
        (" Add.\n", "Add.", ["white-space"]),
        (": Add.", "Add.", ["leading-colon"]),
        (":) Add.", ":) Add.", []),
        (":smile: Add.", ":smile: Add.", []),
        (" : ", ":", ["white-space"]),
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


def test_a_system_message_that_lists_the_tools_is_not_kept() -> None:
    for system, kept in [("You are a clerk.", "You are a clerk."), ('… "parameters": …', "")]:
        content = Content([QUESTION, call(1)], [SUM], system)
        check(content, Catalogue(), True, 100)
        assert content.system == kept


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        ([], "no-instruction"),
        ([QUESTION], "no-instruction"),
        ([Turn(USER, " "), call(1)], "no-instruction"),
        ([Turn(USER, " "), RESULT_3, call(1)], "no-instruction"),  # before what comes after it
        ([call(1)], "bad-order"),
        ([ANSWER_3, QUESTION, call(1)], "bad-order"),
        ([QUESTION, RESULT_3, ANSWER_3], "bad-order"),
        ([QUESTION, call(1), ANSWER_3], "bad-order"),
        ([QUESTION, call(1, name="other")], "unknown-tool"),
        ([QUESTION, call("one")], "schema"),
        ([QUESTION, call(1), RESULT_3, call("two")], "schema"),
    ],
)
def test_what_cannot_be_trained_on_is_a_fault(turns: list[Turn], reason: str) -> None:
    with pytest.raises(Fault) as caught:
        checked(*turns)
    assert caught.value.reason == reason


def test_without_tools_there_is_nothing_to_learn() -> None:
    with pytest.raises(Fault) as caught:
        check(Content([QUESTION, ANSWER_3]), Catalogue(), True, 100)
    assert caught.value.reason == "no-tool"
