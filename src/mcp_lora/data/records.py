"""What readers yield and the rest of a conversion takes: its settings, tools, turns, and what is JSON."""

import ast
import json
import re
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import jsonschema_rs
import msgspec

# The roles of a turn.
SYSTEM, USER, CALL, RESULT, ANSWER = "system", "user", "call", "result", "answer"


@dataclass(frozen=True)
class Settings:
    """How to convert; kept in stats.json, so that changed data is converted in the same way.

    Attributes:
        inputs: files, folders or globs; none means the newest data/filtered/filtered_*.json.
        tools: tool catalogues, files or folders.
        turns: "call" goes up to and with the first call, "all" keeps the whole conversation, "each" makes a
            sample of every call in it, with what stands before as context.
        max_observation: characters that a tool's result may have.
        candidates: candidate tools of a sample, the gold tool included.
        holdout_servers, holdout_tools: share of the servers and of the tools that is held out.
        test: share of the other rows that is held out, from 0 to below 1.
        no_call: share of extra samples in which the gold tool is missing.
        seed: decides what is held out, the candidate tools and their order.
        drop_reasoning: leave out what was thought.
        strict_schema: reject calls with parameters that the tool's schema does not know.
        keep_failed: train on calls of which the result is an error.
        redact: replace keys, mail addresses and home folders; None does it in session logs.
    """

    inputs: list[str] = field(default_factory=list)
    tools: list[str] = field(default_factory=list)
    turns: str = "call"
    max_observation: int = 4000
    candidates: int = 10
    holdout_servers: float = 0.0
    holdout_tools: float = 0.0
    test: float = 0.1
    no_call: float = 0.0
    seed: int = 42
    drop_reasoning: bool = False
    strict_schema: bool = False
    keep_failed: bool = False
    redact: bool | None = None


class Tool(msgspec.Struct, frozen=True, dict=True):
    """A tool that a server offers; known by (server, name), as names recur across servers.

    `parameters` is the JSON Schema that MCP calls `inputSchema`, with `properties`. `server` is
    empty where the data does not name it.
    """

    server: str
    name: str
    description: str
    parameters: dict[str, Any]

    @cached_property
    def validator(self) -> jsonschema_rs.Validator | str:
        """What checks arguments, or why `parameters` is no schema. Nothing is fetched for it."""
        try:
            return jsonschema_rs.validator_for(self.parameters, validate_formats=False, offline=True)
        except ValueError as error:
            return str(error).split("\n")[0]

    @cached_property
    def words(self) -> str:
        """The words of its name, sorted: convertCurrency and currency_convert are alike."""
        words = re.sub(r"(?<=[a-z])(?=[A-Z])|[\W_]+", " ", self.name).lower().split()
        return " ".join(sorted(words))

    @cached_property
    def described(self) -> dict[str, Any]:
        """The tool in OpenAI's form, encoded: most tools are candidates many times."""
        # The schema's own dialect tells a model nothing; hosts leave it out too.
        parameters = {key: value for key, value in self.parameters.items() if key != "$schema"}
        function = {"name": self.name, "description": self.description, "parameters": parameters}
        return {"type": "function", "function": msgspec.Raw(msgspec.json.encode(function))}


class ToolCall(NamedTuple):
    """A tool's name and the arguments it is called with, as a JSON object."""

    name: str
    arguments: dict[str, Any]


class Turn(NamedTuple):
    """One turn of a conversation.

    Attributes:
        role: SYSTEM, USER, CALL, RESULT or ANSWER.
        text: the message's content; beside the calls where the role is CALL.
        calls: in parallel, where the role is CALL.
        ids: one of each call, or that of the call that a result belongs to; "" where the data has none.
        reasoning: what was thought before, where the role is CALL or ANSWER.
        failed: whether the result is an error.
        trained: whether the data wants a CALL or an ANSWER trained on; it is context otherwise.
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
    """A row's conversation, and the tools that it brings.

    Attributes:
        cleaned: what was normalized in it.
        unknown: the tools that it calls with parameters which their schemas do not know.
        later: calls after the first, where only that is kept.
        fault: why the conversation ends where it does, if not at its end.
    """

    turns: list[Turn]
    tools: list[Tool] = field(default_factory=list)
    cleaned: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    later: int = 0
    fault: "Fault | None" = None


class Fault(Exception):
    """Why a row cannot be used: a code, the same for all rows with this fault, and a sentence."""

    def __init__(self, reason: str, sentence: str) -> None:
        super().__init__(sentence)
        self.reason = reason


def as_json(value: Any) -> bytes:
    """Return a value as JSON that every reader takes.

    Raises Fault where it holds half a surrogate pair, NaN or nesting without end. Python's json lets the
    first two pass, and they kill the engine later.
    """
    try:
        text = msgspec.json.encode(value)
        # It makes null of NaN; Python's json says so.
        return _encode(value).encode() if b"null" in text else text
    except (ValueError, TypeError, RecursionError):
        raise Fault("not-json-value", "a text or a number in it is not JSON") from None


_encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode


class _Constants(ast.NodeTransformer):
    """Replaces JSON's words in Python's syntax."""

    def visit_Name(self, node: ast.Name) -> ast.expr:
        known = {"true": True, "false": False, "null": None}
        return ast.Constant(known[node.id]) if node.id in known else node


def value_of(node: ast.expr) -> Any:
    """Return a Python literal's value, JSON's words for true, false and null included."""
    return ast.literal_eval(_Constants().visit(node))


def literal(text: str) -> Any:
    """Return the value of a text of JSON, or in Python's syntax; nothing of it is run.

    Raises ValueError where it is neither.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    try:
        return value_of(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, TypeError, RecursionError, MemoryError) as error:
        raise ValueError(str(error)) from None
