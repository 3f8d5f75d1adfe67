"""The one shape that every reader yields and every writer takes."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Tool:
    """A tool that a server offers; known by (server, name), as names recur across servers.

    `parameters` is the JSON Schema that MCP calls `inputSchema`.
    """

    server: str
    name: str
    description: str
    parameters: dict[str, Any]


@dataclass(frozen=True)
class ToolCall:
    """A tool's name and the arguments it is called with, as a JSON object."""

    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True)
class Example:
    """One instruction, the tool that answers it and the right call.

    `file` and `row` (counted from 1) say where it was read and `record` holds it as it stood
    there, so that an example that is rejected later can still be pointed at.
    """

    instruction: str
    tool: Tool
    call: ToolCall
    file: str
    row: int
    record: Any


@dataclass(frozen=True)
class Rejected:
    """A row that cannot be used: where it stands, why, and the row itself.

    `reason` is a short phrase, the same for all rows with this fault, so that it can be counted.
    """

    file: str
    row: int
    reason: str
    record: Any
