"""Our rules and the Berkeley leaderboard's: one verdict on its published cases, right and spoilt answers.

The leaderboard's checker takes a list of accepted values for each argument, ours the one right call. So of
each case the first accepted values are the right call, and its checker is told of these alone; what may be
left out is told to both by the schema's default. The answers are the right one, the case's other accepted
values, and every way of spoiling one argument.
"""

import json
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from mcp_lora.data.records import ToolCall
from mcp_lora.evaluate import benchmark
from mcp_lora.evaluate.score import judge

PARTS = ("simple_python", "multiple", "parallel", "parallel_multiple")
CATEGORIES = (*PARTS, "live_simple", "live_multiple", "live_parallel", "live_parallel_multiple")
JSON_TYPES = {"dict": "object", "float": "number", "tuple": "array", "any": "string"}

Checker = Callable[[list[Any], list[Any], list[Any], str], bool]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked wheel; without what it depends on, an old numpy among it."""
    folder = tmp_path_factory.mktemp("bfcl")
    with zipfile.ZipFile(benchmark.wheel()) as packed:
        packed.extractall(folder)
    return folder


@pytest.fixture(scope="module")
def checker() -> Checker:
    return benchmark.checker()


def cases(wheel: Path, category: str) -> Iterator[tuple[list[Any], list[Any]]]:
    data = wheel / "bfcl_eval/data"
    questions, answers = (
        (data / folder / f"BFCL_v4_{category}.json").read_text("utf-8").splitlines()
        for folder in ("", "possible_answer")
    )
    for question, answer in zip(map(json.loads, questions), map(json.loads, answers), strict=True):
        assert question["id"] == answer["id"]
        yield question["function"], answer["ground_truth"]


def schema_of(function: dict[str, Any]) -> dict[str, Any]:
    """The parameters as JSON Schema: the leaderboard has Python's names of types."""
    text = json.dumps(function["parameters"])
    for name, json_type in JSON_TYPES.items():
        text = text.replace(f'"type": "{name}"', f'"type": "{json_type}"')
    schema: dict[str, Any] = json.loads(text)
    return schema


def first(accepted: Any) -> Any:
    """An accepted value; a dict lists those of each of its keys, a dict within it does not."""
    if isinstance(accepted, dict):
        return {key: values[0] for key, values in accepted.items() if values[0] != ""}
    return [first(item) for item in accepted] if isinstance(accepted, list) else accepted


def as_accepted(value: Any) -> Any:
    """The reverse."""
    if isinstance(value, dict):
        return {key: [item] for key, item in value.items()}
    return [as_accepted(item) for item in value] if isinstance(value, list) else value


def accepted_for(arguments: dict[str, Any], schema: dict[str, Any]) -> dict[str, list[Any]]:
    """What the leaderboard's checker is told: the right values, and defaults that may be left out."""
    accepted = {name: [as_accepted(value)] for name, value in arguments.items()}
    for name, part in schema["properties"].items():
        if name in schema.get("required", []) or "default" not in part:
            continue
        if name not in arguments:
            accepted[name] = [as_accepted(part["default"]), ""]
        elif arguments[name] == part["default"]:
            accepted[name].append("")
    return accepted


def spoilt(value: Any) -> Iterator[Any]:
    """Values that differ from one by a little."""
    yield None
    yield [value]
    if isinstance(value, bool):
        yield from (not value, int(value), str(value))
    elif isinstance(value, int | float):
        yield from (value + 1, str(value), -value, bool(value), float(value))
        if value == int(value):
            yield int(value)
    elif isinstance(value, str):
        yield from (value.upper(), f" {value.replace(' ', '_')}. ", f"{value}x", value[:-1], f"{value}!", 1)
    elif isinstance(value, list):
        yield from (value[::-1], value[:-1], [*value, *value[:1]])
        yield from (
            [*value[:place], other, *value[place + 1 :]]
            for place in range(len(value))
            for other in spoilt(value[place])
        )
    elif isinstance(value, dict):
        yield from (value | {"zzz": 1}, {})
        for key in value:
            yield {other: value[other] for other in value if other != key}
            yield from (value | {key: other} for other in spoilt(value[key]))


def answers(calls: list[ToolCall], truth: list[Any], schemas: dict[str, Any]) -> Iterator[list[ToolCall]]:
    yield calls
    yield calls[::-1]
    yield calls[:-1]
    yield [*calls, calls[0]]
    for place, call in enumerate(calls):
        others = [call.arguments | {"zzz": 1}]
        for name, values in given(next(iter(truth[place].values()))).items():
            others += [call.arguments | {name: first(value)} for value in values]
        for name, part in schemas[call.name]["properties"].items():
            if "default" in part:
                others.append(call.arguments | {name: part["default"]})
        for name, value in call.arguments.items():
            others.append({other: call.arguments[other] for other in call.arguments if other != name})
            others += [call.arguments | {name: other} for other in spoilt(value)]
        changed = [call._replace(arguments=other) for other in others]
        for other in (call._replace(name=f"{call.name}_x"), *changed):
            yield [*calls[:place], other, *calls[place + 1 :]]


def verdicts(
    wheel: Path, checker: Checker, every: int
) -> Iterator[tuple[bool, bool, list[ToolCall], list[ToolCall]]]:
    """Ours, theirs, the right calls and the answer, for every answer to every nth case."""
    for category in CATEGORIES:
        for functions, truth in islice(cases(wheel, category), 0, None, every):
            schemas = {function["name"]: schema_of(function) for function in functions}
            calls = [
                ToolCall(name, {key: first(values[0]) for key, values in given(arguments).items() if values})
                for accepted in truth
                for name, arguments in accepted.items()
            ]
            told = [{call.name: accepted_for(call.arguments, schemas[call.name])} for call in calls]
            for answer in answers(calls, truth, schemas):
                theirs = checker(functions, [{call.name: call.arguments} for call in answer], told, category)
                yield judge(calls, answer, schemas).ast, theirs, calls, answer
                if answer is calls and not theirs:
                    break  # the case does not pass itself


def given(arguments: dict[str, list[Any]]) -> dict[str, list[Any]]:
    return {name: [value for value in values if value != ""] for name, values in arguments.items()}


# Where our verdict is another one than the leaderboard's, and why.
NUMBERS = "theirs takes 2.0 for 2 and true for 1 in lists and objects, but not 1 for 1.0"
TEXTS = "theirs wants every letter of texts in lists of an object, and where the schema has no text"
EMPTY = "theirs takes an empty list or text for an argument that may be left out"
BROKEN = "the case does not pass itself: its right answer breaks its schema"


def why(ours: bool, right: list[ToolCall], answer: list[ToolCall]) -> str:
    if right is answer:
        return BROKEN
    if right == answer:  # as Python compares numbers and truth values
        return NUMBERS
    return TEXTS if ours else EMPTY


@pytest.mark.parametrize(
    ("every", "agree", "right", "other"),
    [
        (10, 12_168, 3_515, {NUMBERS: 6, TEXTS: 2}),
        pytest.param(
            1,
            120_449,
            34_648,
            {NUMBERS: 66, TEXTS: 72, EMPTY: 3, BROKEN: 7},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_the_verdicts_are_the_leaderboards(
    wheel: Path, checker: Checker, every: int, agree: int, right: int, other: dict[str, int]
) -> None:
    found = list(verdicts(wheel, checker, every))
    agreed = [ours for ours, theirs, *_ in found if ours == theirs]
    differ = Counter(why(ours, gold, answer) for ours, theirs, gold, answer in found if ours != theirs)
    assert (len(agreed), sum(agreed)) == (agree, right)
    assert dict(differ) == other


@pytest.mark.parametrize(
    ("schema", "right", "value", "verdict"),
    [
        ({"type": "number"}, 1.0, 1, True),
        ({"type": ["integer", "null"]}, 1, 1.0, False),
        ({"type": ["string", "null"]}, "New York", "new york", True),
        ({"type": ["string", "null"]}, None, None, True),
        ({"anyOf": [{"type": "integer"}, {"type": "number"}]}, 2, 2.0, True),
        ({"type": "object", "properties": {"a": {"type": "integer"}}}, {"a": 1}, {"a": 1.0}, False),
        ({}, {"a": ["X"]}, {"a": ["x"]}, True),
        ({"$ref": "#/$defs/place"}, {"city": "Rome"}, {"city": "rome."}, True),
        ({"$ref": "#/$defs/place"}, {"zip": 1}, {"zip": 1.0}, False),
    ],
)
def test_json_schema_that_the_leaderboard_does_not_know(
    schema: dict[str, Any], right: Any, value: Any, verdict: bool
) -> None:
    place = {"type": "object", "properties": {"city": {"type": "string"}, "zip": {"type": "integer"}}}
    whole = {"type": "object", "properties": {"x": schema}, "$defs": {"place": place}}
    found = judge([ToolCall("f", {"x": right})], [ToolCall("f", {"x": value})], {"f": whole})
    assert found.ast == verdict
