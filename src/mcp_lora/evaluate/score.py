"""Compare predicted with gold calls: what is right about an answer, and its first error.

Values are compared by the rules of the Berkeley Function Calling Leaderboard's AST evaluation (Patil et
al., gorilla.cs.berkeley.edu), adapted to JSON Schema: strings ignoring case, spaces and most punctuation,
an integer where a number is expected, an optional argument with its default value given or omitted, lists
in order, parallel calls in any order. tests/test_leaderboard.py compares with the leaderboard's own checker.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from mcp_lora.data.records import ToolCall
from mcp_lora.data.tools import parts_of, types_of

# The errors of an answer, in the order in which they are checked.
ERRORS = (
    "call where none fits",
    "no reply",
    "cut off",
    "no call",
    "unreadable call",
    "wrong tool",
    "missing argument",
    "unexpected argument",
    "wrong type",
    "wrong value",
)
METRICS = ("valid", "schema", "tool", "param", "ast", "exact", "abstained")
_IGNORED = re.compile(r"[ ,./\-_*^]")

Schema = Mapping[str, Any]
Calls = Sequence[ToolCall]


@dataclass(frozen=True)
class Verdict:
    """What is right about one answer; each of valid, tool, param, ast and exact implies those before it.

    Attributes:
        valid: it contains at least one call that can be parsed.
        schema: every call is of a candidate tool, and its arguments validate against the tool's schema.
        tool: it calls the gold tools, each the right number of times.
        param: and with the right argument names.
        ast: and every value is right by the leaderboard's rules.
        exact: and equal as JSON (1 is not 1.0, nor true).
        abstained: it contains no call, not even a broken one.
        error: the first of ERRORS; None if it is right (`ast`, or `abstained` if no tool fits).
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
    expected: Calls,
    predicted: Calls,
    schemas: Mapping[str, Schema],
    tried: bool = False,
    valid_arguments: bool = True,
    failed: str | None = None,
) -> Verdict:
    """Score the calls that were parsed from one answer; none are expected if no candidate tool fits.

    `schemas` are the parameters' JSON Schema of each candidate tool, by name; `tried` is whether the answer
    contains a call that could not be parsed, `valid_arguments` whether all calls validate against schemas.
    `failed` is why the answer is incomplete, "no reply" or "cut off": without a call that is no abstention.
    """
    exact = bool(expected) and sorted(map(_canonical, predicted)) == sorted(map(_canonical, expected))
    error = None if exact else _first_error(expected, predicted, schemas, tried, failed)
    reached = _rank(error) if expected else 0
    return Verdict(
        valid=bool(predicted),
        schema=bool(predicted) and valid_arguments and all(call.name in schemas for call in predicted),
        tool=reached > _rank("wrong tool"),
        param=reached > _rank("unexpected argument"),
        ast=reached > _rank("wrong value"),
        exact=exact,
        abstained=not predicted and not tried and not failed,
        error=error,
    )


def _first_error(
    expected: Calls, predicted: Calls, schemas: Mapping[str, Schema], tried: bool, failed: str | None
) -> str | None:
    if not expected:
        return "call where none fits" if predicted or tried else failed
    if not predicted:
        return failed or ("unreadable call" if tried else "no call")
    if sorted(call.name for call in predicted) != sorted(call.name for call in expected):
        return "wrong tool"
    left = list(predicted)
    errors = []
    for call in expected:
        # The best match of the remaining calls, so that the order of parallel calls does not matter.
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


def _error(expected: Mapping[str, Any], given: Mapping[str, Any], schema: Schema) -> str | None:
    """Return the first error in the arguments of a call of the gold tool."""
    properties = _properties(schema, schema)
    required = schema.get("required")
    optional = set(properties) - set(required if isinstance(required, list) else [])
    defaults = {name: properties[name]["default"] for name in optional if "default" in properties[name]}

    left_out = expected.keys() - given.keys()
    if any(name not in defaults or expected[name] != defaults[name] for name in left_out):
        return "missing argument"
    gold = defaults | dict(expected)
    if given.keys() - gold.keys():
        return "unexpected argument"
    wrong = [name for name in given if not same(gold[name], given[name], properties.get(name, {}), schema)]
    if any(_kind(gold[name]) is not _kind(given[name]) for name in wrong):
        return "wrong type"
    return "wrong value" if wrong else None


def same(expected: Any, given: Any, schema: Schema | bool = True, root: Schema | None = None) -> bool:
    """Tell whether two JSON values of an argument are the same by the leaderboard's rules.

    `schema` is the argument's, if known, and decides whether a number may have a fraction; `root` is the
    schema that `$ref` refers to.
    """
    root = root or {}
    if _kind(expected) is not _kind(given):
        return False
    if isinstance(expected, str):
        return _bare(expected) == _bare(given)
    if isinstance(expected, list):
        schemas = [part["items"] for part in parts_of(schema, root) if isinstance(part.get("items"), dict)]
        items = schemas[0] if schemas else True
        pairs = zip(expected, given, strict=False)
        return len(expected) == len(given) and all(same(*pair, items, root) for pair in pairs)
    if isinstance(expected, dict):
        known = _properties(schema, root)
        if expected.keys() != given.keys():
            return False
        return all(same(expected[name], given[name], known.get(name, True), root) for name in expected)
    kinds = types_of(schema, root)
    whole = "integer" in kinds and "number" not in kinds
    return bool(expected == given) and not (whole and isinstance(given, float))


def _bare(text: str) -> str:  # the leaderboard's standardize_string
    return _IGNORED.sub("", text).lower().replace("'", '"')


def _kind(value: Any) -> type:
    """Return the type of a JSON value, float for every number."""
    return float if type(value) is int else type(value)


def _properties(schema: Any, root: Schema) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for part in parts_of(schema, root):
        properties = part.get("properties")
        if isinstance(properties, dict):
            found |= {name: value for name, value in properties.items() if isinstance(value, dict)}
    return found


def _canonical(call: ToolCall) -> bytes:
    return msgspec.json.encode([call.name, call.arguments], order="sorted")
