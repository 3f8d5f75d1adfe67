"""The types that a conversion passes on: its settings, tools and turns; JSON and Python literals."""

import ast
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import jsonschema_rs
import msgspec

# The roles of a turn.
SYSTEM, USER, CALL, RESULT, ANSWER = "system", "user", "call", "result", "answer"
# The keys of a call's name and of its arguments, in all formats; the first that is present counts.
NAMES = ("name", "toolName", "tool_name", "tool", "action", "function")
ARGUMENTS = ("arguments", "args", "parameters", "input", "kwargs", "action_input", "tool_input")
_encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode


@dataclass(frozen=True)
class Settings:
    """The settings of a conversion; kept in stats.json, so that changed data is converted in the same way.

    Attributes:
        inputs: files, folders or globs; by default the newest data/filtered/filtered_*.json.
        tools: tool catalogues, files or folders.
        turns: "call" ends a sample at the first call, "all" keeps the whole conversation, "each" makes one
            sample per call, with the messages before it as context.
        max_observation: maximum characters of a tool's result.
        candidates: candidate tools per sample, including the gold tool: a number, or "4-10" to vary it from
            one training sample to the next, while held-out questions get the maximum.
        holdout_servers, holdout_tools: fraction of the servers and of the tools to hold out.
        test: fraction of the other rows to hold out, from 0 to below 1.
        no_call: fraction of rows that get an extra sample without the gold tool.
        questions_per_sample: questions in a training sample, if rows have one each.
        seed: decides what is held out, the candidate tools and their order.
        drop_reasoning: leave out the reasoning.
        strict_schema: reject calls with parameters that the tool's schema does not define.
        keep_failed: train on calls whose result is an error.
        keep_plain: train on conversations without tools, too, which are never held out.
        redact: replace keys, mail addresses and home folders; None redacts session logs only.
    """

    inputs: list[str] = field(default_factory=list)
    tools: list[str] = field(default_factory=list)
    turns: str = "call"
    max_observation: int = 4000
    candidates: int | str = 10
    holdout_servers: float = 0.0
    holdout_tools: float = 0.0
    test: float = 0.1
    no_call: float = 0.0
    questions_per_sample: int = 1
    seed: int = 42
    drop_reasoning: bool = False
    strict_schema: bool = False
    keep_failed: bool = False
    keep_plain: bool = False
    redact: bool | None = None


@dataclass
class Source:
    """Row counts of one format in one file: `read` is the sum of `written` (by split) and `rejected`."""

    file: str
    format: str
    read: int = 0
    cleaned: Counter[str] = field(default_factory=Counter)
    rejected: Counter[str] = field(default_factory=Counter)
    written: Counter[str] = field(default_factory=Counter)


@dataclass
class Statistics:
    """What a conversion has read and written, and from what: the content of stats.json.

    Attributes:
        read: number of rows, the sum of `written` (by split) and `rejected` (by reason).
        cleaned: what was normalized, left out or odd, by kind.
        samples: number of samples, by split; `no_call_samples` are the extra ones without the gold tool.
        tools, servers: the number of those that are called.
        sources: by file and format.
        inputs: the SHA-256 of each file that was read; empty if the conversion is not complete.
        files: that of each file that was written; None if the conversion is not complete.
    """

    read: int = 0
    written: dict[str, int] = field(default_factory=dict)
    rejected: dict[str, int] = field(default_factory=dict)
    cleaned: dict[str, int] = field(default_factory=dict)
    samples: dict[str, int] = field(default_factory=dict)
    no_call_samples: dict[str, int] = field(default_factory=dict)
    tools: int = 0
    servers: int = 0
    sources: list[Source] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    settings: Settings = field(default_factory=Settings)
    inputs: dict[str, str] = field(default_factory=dict)
    files: dict[str, str] | None = None


class Tool(msgspec.Struct, frozen=True, dict=True):
    """A tool of a server, identified by (server, name), as several servers may use the same name.

    `parameters` is the JSON Schema that MCP calls `inputSchema`, with `properties`. `server` is
    empty if the data does not name it.
    """

    server: str
    name: str
    description: str
    parameters: dict[str, Any]

    @cached_property
    def validator(self) -> jsonschema_rs.Validator | str:
        """The validator of arguments, or why `parameters` is an invalid schema. Nothing is fetched."""
        try:
            return jsonschema_rs.validator_for(self.parameters, validate_formats=False, offline=True)
        except ValueError as error:
            return str(error).split("\n")[0]

    @cached_property
    def words(self) -> str:
        """The words of its name, sorted, so that convertCurrency and currency_convert are the same."""
        words = re.sub(r"(?<=[a-z])(?=[A-Z])|[\W_]+", " ", self.name).lower().split()
        return " ".join(sorted(words))

    @property
    def function(self) -> dict[str, Any]:
        """The tool as OpenAI's format has it."""
        # The schema's dialect is of no use to a model; hosts leave it out, too.
        parameters = {key: value for key, value in self.parameters.items() if key != "$schema"}
        return {"name": self.name, "description": self.description, "parameters": parameters}

    @cached_property
    def described(self) -> dict[str, Any]:
        """A candidate in OpenAI's format, encoded once, as most tools are candidates many times."""
        return {"type": "function", "function": msgspec.Raw(msgspec.json.encode(self.function))}


class ToolCall(NamedTuple):
    """A tool's name and the arguments of the call, a JSON object."""

    name: str
    arguments: dict[str, Any]


class Turn(NamedTuple):
    """One turn of a conversation.

    Attributes:
        role: SYSTEM, USER, CALL, RESULT or ANSWER.
        text: the message's content; for a CALL, the text beside the calls.
        calls: the parallel calls of a CALL.
        ids: the id of each call, or of the call that a result belongs to; "" if the data has none.
        reasoning: the reasoning before a CALL or an ANSWER.
        failed: whether the result is an error.
        trained: whether a CALL or an ANSWER is trained on; otherwise it is context.
    """

    role: str
    text: str = ""
    calls: tuple[ToolCall, ...] = ()
    ids: tuple[str, ...] = ()
    reasoning: str = ""
    failed: bool = False
    trained: bool = True


@dataclass
class Content:
    """A row's conversation, and the tools in it.

    Attributes:
        cleaned: what was normalized in it, left out of it, or is odd about it.
        error: why the conversation was cut short, if it was.
    """

    turns: list[Turn]
    tools: list[Tool] = field(default_factory=list)
    cleaned: list[str] = field(default_factory=list)
    error: "RowError | None" = None


def first(record: Mapping[str, Any], keys: Iterable[str]) -> Any:
    """Return the first value under any of these keys, ignoring null and empty strings."""
    return next((record[key] for key in keys if record.get(key) not in (None, "")), None)


def mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    """Return a value with everything in it changed, at any depth, that is neither an object nor a list."""
    if isinstance(value, dict):
        return {key: mapped(item, change) for key, item in value.items()}
    return [mapped(item, change) for item in value] if isinstance(value, list) else change(value)


class RowError(Exception):
    """Why a row cannot be used: a reason code, and a message about this row."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def as_json(value: Any) -> bytes:
    """Return a value as JSON that every parser accepts.

    Raises RowError if it contains a lone surrogate, NaN or is nested too deeply. Python's json accepts the
    first two, and they would crash the engine later.
    """
    try:
        text = msgspec.json.encode(value)
        # msgspec encodes NaN as null; Python's json rejects it.
        return _encode(value).encode() if b"null" in text else text
    except (ValueError, TypeError, RecursionError):
        raise RowError("not-json-value", "it contains a string or a number that is not valid JSON") from None


class _Constants(ast.NodeTransformer):
    """Replaces true, false and null by Python's constants."""

    def visit_Name(self, node: ast.Name) -> ast.expr:
        known = {"true": True, "false": False, "null": None}
        return ast.Constant(known[node.id]) if node.id in known else node


def value_of(node: ast.expr) -> Any:
    """Return the value of a Python literal, which may contain JSON's true, false and null."""
    return ast.literal_eval(_Constants().visit(node))


def literal(text: str) -> Any:
    """Return the value of a JSON text or a Python literal; nothing is executed.

    Raises ValueError if it is neither.
    """
    with suppress(ValueError, RecursionError):
        return json.loads(text)
    try:
        return value_of(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, TypeError, RecursionError, MemoryError) as error:
        raise ValueError(str(error)) from None
