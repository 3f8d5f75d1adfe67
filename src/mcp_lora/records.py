"""The shapes that every reader yields and every writer takes."""

import json
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import msgspec

# The roles of a turn.
USER, CALL, RESULT, ANSWER = "user", "call", "result", "answer"


class Tool(NamedTuple):
    """A tool that a server offers; known by (server, name), as names recur across servers.

    `parameters` is the JSON Schema that MCP calls `inputSchema`, with `properties`. `server` is
    empty where the data does not name it.
    """

    server: str
    name: str
    description: str
    parameters: dict[str, Any]


class ToolCall(NamedTuple):
    """A tool's name and the arguments it is called with, as a JSON object."""

    name: str
    arguments: dict[str, Any]


class Turn(NamedTuple):
    """One turn of a conversation.

    Attributes:
        role: USER, CALL, RESULT or ANSWER.
        text: what is said; beside the calls where the role is CALL.
        calls: in parallel, where the role is CALL.
        ids: of the calls, or of the call that a result belongs to; empty where the data has none.
        reasoning: what was thought before, where the role is CALL or ANSWER.
    """

    role: str
    text: str = ""
    calls: tuple[ToolCall, ...] = ()
    ids: tuple[str, ...] = ()
    reasoning: str = ""


class Origin(NamedTuple):
    """Where a row stands: `row` counts from 1; `record` holds it as it stood there."""

    file: str
    row: int
    shape: str
    record: Any


@dataclass
class Content:
    """What a row holds: a conversation and the tools that it brings, the called ones among them.

    `system` is the row's own system message, if any; `cleaned` names what was normalized in the row.
    """

    turns: list[Turn]
    tools: list[Tool]
    system: str = ""
    cleaned: list[str] = field(default_factory=list)


class Rejected(NamedTuple):
    """A row that cannot be used: a code, the same for all rows with this fault, and a sentence."""

    origin: Origin
    reason: str
    sentence: str


class Fault(Exception):
    """What makes a row unusable, where it is found; it becomes a Rejected."""

    def __init__(self, reason: str, sentence: str) -> None:
        super().__init__(sentence)
        self.reason = reason
        self.sentence = sentence


def as_json(value: Any) -> bytes:
    """Return a value as JSON that every reader takes.

    Raises:
        Fault: it holds half a surrogate pair, NaN or nesting without end. Python's json lets the
            first two pass, and they kill the engine later.
    """
    try:
        text = msgspec.json.encode(value)
        # It makes null of NaN; Python's json says so.
        return _encode(value).encode() if b"null" in text else text
    except (ValueError, TypeError, RecursionError):
        raise Fault("not-json-value", "a text or a number in it is not JSON") from None


_encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode
