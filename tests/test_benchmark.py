"""The leaderboard's own questions, put to a model and judged by its own checker."""

from collections import Counter

import pytest

from mcp_lora.errors import McpLoraError
from mcp_lora.evaluate import benchmark, gates
from mcp_lora.evaluate.questions import Question
from mcp_lora.evaluate.score import Verdict, judge

COUNTS = {"simple": 400, "multiple": 200, "parallel": 200, "parallel_multiple": 200, "irrelevance": 240}
COUNTS |= {"live_simple": 258, "live_multiple": 1053, "live_parallel": 16, "live_parallel_multiple": 24}
COUNTS |= {"live_irrelevance": 884}


@pytest.fixture(scope="module")
def every() -> list[Question]:
    return benchmark.questions()


def verdict(question: Question, **changes: object) -> Verdict:
    """The verdict on the gold calls, the first of them with other arguments."""
    first, *others = question.expected
    calls = [first._replace(arguments=first.arguments | changes), *others]
    return benchmark.judged(question, calls, judge(question.expected, calls, {}))


def test_all_questions_of_the_leaderboard_are_asked(every: list[Question]) -> None:
    assert Counter(question.split for question in every) == {f"bfcl.{name}": n for name, n in COUNTS.items()}
    assert len({question.key for question in every}) == len(every)
    assert all("." not in name for question in every for name in question.tools)
    called = [question for question in every if question.expected]
    assert {question.split for question in every} - {question.split for question in called} == {
        "bfcl.irrelevance",
        "bfcl.live_irrelevance",
    }
    # the others' first accepted calls break the rules themselves
    assert (sum(verdict(question).ast for question in called), len(called)) == (2333, 2351)


def test_an_answer_is_right_if_the_leaderboard_accepts_it(every: list[Question]) -> None:
    triangle = every[0]
    assert triangle.expected[0].arguments == {"base": 10, "height": 5}
    assert verdict(triangle, unit="units").ast  # accepted, but not our first
    assert verdict(triangle, unit="units").error is None
    wrong = verdict(triangle, base=11)
    assert not wrong.ast and wrong.error == "wrong value" and wrong.tool
    assert not verdict(triangle, unit="miles").ast
    two = next(question for question in every if question.split == "bfcl.parallel")
    answer = two.expected[::-1]
    assert benchmark.judged(two, answer, judge(two.expected, answer, {})).ast
    assert not benchmark.judged(two, answer[:1], judge(two.expected, answer[:1], {})).ast


def test_a_call_where_no_tool_fits_is_wrong(every: list[Question]) -> None:
    question = next(question for question in every if question.split == "bfcl.irrelevance")
    silent, calling = judge([], [], {}), judge([], every[0].expected, {})
    assert benchmark.judged(question, [], silent).abstained
    assert benchmark.judged(question, every[0].expected, calling) == calling and calling.error


def test_text_that_does_not_end_is_no_call_either(every: list[Question]) -> None:
    question = next(question for question in every if question.split == "bfcl.irrelevance")
    cut, broken = (judge([], [], {}, tried, failed="cut off") for tried in (False, True))
    assert not cut.abstained and benchmark.judged(question, [], cut).abstained
    assert benchmark.judged(question, [], cut).error is None
    assert not benchmark.judged(question, [], broken).abstained


def test_a_number_that_python_cannot_hold_is_wrong(every: list[Question]) -> None:
    def takes_fraction(question: Question) -> bool:
        schema = next(iter(question.tools.values())).parameters["properties"].get("rate", {})
        return schema.get("type") == "number" and bool(question.expected)

    assert not verdict(next(filter(takes_fraction, every)), rate=10**400).ast


def test_a_category_can_be_required() -> None:
    required = gates.requirement("bfcl.irrelevance >= 70%")
    assert required.split == required.metric == "bfcl.irrelevance" and required.bound == 0.7
    with pytest.raises(McpLoraError, match="a metric is SPLIT.NAME"):
        gates.requirement("bfcl.java>=0.1")


def test_another_file_than_the_pinned_one_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: object
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(benchmark, "SHA256", "0" * 64)
    benchmark.wheel.cache_clear()
    with pytest.raises(McpLoraError, match="with SHA-256 000"):
        benchmark.wheel()
    benchmark.wheel.cache_clear()
