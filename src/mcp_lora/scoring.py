"""Predicted against expected calls: what is right about an answer, and what goes wrong first.

Values are compared by the rules of the Berkeley Function Calling Leaderboard's AST evaluation (Patil et
al., gorilla.cs.berkeley.edu), carried over to JSON Schema: texts without case, spaces and most
punctuation, a whole number where a number is wanted, an optional argument at its default given or left
out, lists in order, parallel calls in any order. tests/test_leaderboard.py holds them against the
leaderboard's own checker.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from mcp_lora.records import ToolCall

# What can go wrong with an answer, in the order in which it is looked for.
ERRORS = (
    "call where none fits",
    "no call",
    "unreadable call",
    "wrong tool",
    "missing argument",
    "unexpected argument",
    "wrong type",
    "wrong value",
)
_IGNORED = re.compile(r"[ ,./\-_*^]")


@dataclass(frozen=True)
class Verdict:
    """What is right about one answer; each of valid, tool, param, ast and exact implies those before it.

    Attributes:
        valid: it is one call or more that can be read.
        schema: every call is to a tool on offer, and its arguments validate against the tool's schema.
        tool: it calls the right tools, each as often as is right.
        param: and with the right arguments by name.
        ast: and every value is right by the leaderboard's rules.
        exact: and equal as JSON (1 is not 1.0, nor true).
        abstained: it calls nothing, and does not try to.
        error: the first of ERRORS; None if it is right (`ast`, or `abstained` where no tool fits).
    """

    valid: bool
    schema: bool
    tool: bool
    param: bool
    ast: bool
    exact: bool
    abstained: bool
    error: str | None


def judge(
    expected: Sequence[ToolCall],
    predicted: Sequence[ToolCall],
    schemas: Mapping[str, Mapping[str, Any]],
    tried: bool = False,
    valid_arguments: bool = True,
) -> Verdict:
    """Judge the calls of one answer.

    Args:
        expected: the right calls; none where no tool on offer fits.
        predicted: the calls that could be read from the answer.
        schemas: the parameters' JSON Schema of each tool on offer, by name.
        tried: the answer holds a call that could not be read.
        valid_arguments: every predicted call validates against its schema.
    """
    exact = bool(expected) and sorted(map(_canonical, predicted)) == sorted(map(_canonical, expected))
    error = None if exact else _first_error(expected, predicted, schemas, tried)
    reached = _rank(error) if expected else 0
    return Verdict(
        valid=bool(predicted),
        schema=bool(predicted) and valid_arguments and all(call.name in schemas for call in predicted),
        tool=reached > _rank("wrong tool"),
        param=reached > _rank("unexpected argument"),
        ast=reached > _rank("wrong value"),
        exact=exact,
        abstained=not predicted and not tried,
        error=error,
    )


def _first_error(
    expected: Sequence[ToolCall],
    predicted: Sequence[ToolCall],
    schemas: Mapping[str, Mapping[str, Any]],
    tried: bool,
) -> str | None:
    if not expected:
        return "call where none fits" if predicted or tried else None
    if not predicted:
        return "unreadable call" if tried else "no call"
    if sorted(call.name for call in predicted) != sorted(call.name for call in expected):
        return "wrong tool"
    left = list(predicted)
    errors = []
    for call in expected:
        # The nearest of those that are left, so that the order of parallel calls does not count.
        found = [
            (_error(call.arguments, other.arguments, schemas.get(call.name, {})), place)
            for place, other in enumerate(left)
            if other.name == call.name
        ]
        error, place = max(found, key=lambda pair: (_rank(pair[0]), -pair[1]))
        errors.append(error)
        del left[place]
    return min(errors, key=_rank)


def _rank(error: str | None) -> int:
    return len(ERRORS) if error is None else ERRORS.index(error)


def _error(expected: Mapping[str, Any], given: Mapping[str, Any], schema: Mapping[str, Any]) -> str | None:
    """Return the first thing that is wrong with the arguments of a call of the right tool."""
    properties = _properties(schema, schema)
    required = schema.get("required")
    optional = set(properties) - set(required if isinstance(required, list) else [])
    defaults = {name: properties[name]["default"] for name in optional if "default" in properties[name]}

    left_out = expected.keys() - given.keys()
    if any(name not in defaults or expected[name] != defaults[name] for name in left_out):
        return "missing argument"
    if any(name not in expected and name not in defaults for name in given):
        return "unexpected argument"
    pairs = [
        (expected[name] if name in expected else defaults[name], given[name], properties.get(name, {}))
        for name in given
    ]
    wrong = [(right, value) for right, value, part in pairs if not same(right, value, part, schema)]
    if any(_kind(right) != _kind(value) for right, value in wrong):
        return "wrong type"
    return "wrong value" if wrong else None


def same(
    expected: Any, given: Any, schema: Mapping[str, Any] | bool = True, root: Mapping[str, Any] | None = None
) -> bool:
    """Tell whether two values of an argument are the same by the leaderboard's rules.

    Args:
        expected, given: values as JSON gives them.
        schema: the argument's, as far as it is known; says whether a number may have a fraction.
        root: the schema that `$ref` refers to.
    """
    parts = list(_parts(schema, root or {}))
    if isinstance(expected, bool) or isinstance(given, bool):
        return expected is given
    if isinstance(expected, str) and isinstance(given, str):
        return _bare(expected) == _bare(given)
    if isinstance(expected, int | float) and isinstance(given, int | float):
        types = {kind for part in parts for kind in _types(part)}
        whole = "integer" in types and "number" not in types
        return expected == given and not (whole and isinstance(given, float))
    if isinstance(expected, list) and isinstance(given, list):
        items = next((part["items"] for part in parts if isinstance(part.get("items"), dict)), True)
        return len(expected) == len(given) and all(
            same(one, other, items, root) for one, other in zip(expected, given, strict=True)
        )
    if isinstance(expected, dict) and isinstance(given, dict):
        properties = {name: part for whole in parts for name, part in _properties(whole, root or {}).items()}
        return expected.keys() == given.keys() and all(
            same(value, given[name], properties.get(name, True), root) for name, value in expected.items()
        )
    return bool(expected is None and given is None)


def _bare(text: str) -> str:
    """Return a text as the leaderboard compares it (its standardize_string)."""
    return _IGNORED.sub("", text).lower().replace("'", '"')


def _kind(value: Any) -> str:
    """Return the JSON type of a value; a number is one kind, with or without a fraction."""
    for kind, types in (("boolean", bool), ("number", int | float), ("text", str), ("list", list)):
        if isinstance(value, types):
            return kind
    return "object" if isinstance(value, dict) else "null"


def _properties(schema: Mapping[str, Any], root: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for part in _parts(schema, root):
        properties = part.get("properties")
        if isinstance(properties, dict):
            found |= {name: value for name, value in properties.items() if isinstance(value, dict)}
    return found


def _parts(schema: Any, root: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield a schema and those that it is made of, each once: `$ref` within it, anyOf, oneOf, allOf."""
    waiting, met = [schema], set()
    while waiting:
        part = waiting.pop()
        if not isinstance(part, Mapping) or id(part) in met:
            continue
        met.add(id(part))
        yield part
        reference = part.get("$ref")
        if isinstance(reference, str) and reference.startswith("#/"):
            found: Any = root
            for step in reference[2:].split("/"):
                step = step.replace("~1", "/").replace("~0", "~")
                found = found.get(step) if isinstance(found, Mapping) else None
            waiting.append(found)
        for key in ("anyOf", "oneOf", "allOf"):
            waiting += parts if isinstance(parts := part.get(key), list) else []


def _types(schema: Mapping[str, Any]) -> list[Any]:
    types = schema.get("type", [])
    return types if isinstance(types, list) else [types]


def _canonical(call: ToolCall) -> bytes:
    return msgspec.json.encode([call.name, call.arguments], order="sorted")
