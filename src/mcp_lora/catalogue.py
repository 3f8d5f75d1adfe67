r"""The tools that are known: from catalogues, and from the rows that bring their own.

A catalogue is a JSON file: a list, or {server_info, tools}; the schema is in `parameters` or in
`inputSchema`. The server is the file's name where it is not said:

    {"server_info": {"name": "calculator", "description": "Evaluates arithmetic"},
     "tools": [{"name": "calculate", "description": "Evaluates the expression",
                "inputSchema": {"type": "object", "properties": {"expression": {"type": "string"}}}}]}
"""

from pathlib import Path
from typing import Any

import jsonschema_rs
import msgspec

from mcp_lora import files
from mcp_lora.records import Fault, Tool, as_json


class Catalogue:
    """Tools by number, one for each (server, name): the first definition that was met counts.

    A row that brings another definition of the same tool keeps its own; see `number`.
    """

    def __init__(self) -> None:
        self.tools: list[Tool] = []
        self.by_server: dict[str, list[Tool]] = {}
        self.broken: dict[tuple[str, str], str] = {}  # tools with a schema that is no schema
        self._numbers: dict[tuple[str, str], int] = {}
        self._by_name: dict[str, list[Tool]] = {}

    def number(self, tool: Tool) -> int | None:
        """Return the tool's number, adding it if it is new; None if another definition has its place.

        Raises:
            Fault: it cannot be written as JSON.
        """
        key = tool.server, tool.name
        number = self._numbers.get(key)
        if number is not None and self.tools[number] == tool:
            return number
        as_json(msgspec.structs.astuple(tool))
        if number is not None:
            return None
        number = self._numbers[key] = len(self.tools)
        self.tools.append(tool)
        self.by_server.setdefault(tool.server, []).append(tool)
        self._by_name.setdefault(tool.name, []).append(tool)
        return number

    def find(self, name: str, server: str) -> Tool:
        """Return the tool of a name, of this server if it has one, else of the only one that has.

        Raises:
            Fault: there is none, or it is not clear which.
        """
        number = self._numbers.get((server, name))
        if number is not None:
            return self.tools[number]
        found = self._by_name.get(name)
        if not found:
            raise Fault("not-in-catalogue", f"{name} is in no catalogue that --tools names")
        if any(tool.parameters != found[0].parameters for tool in found):
            servers = ", ".join(tool.server for tool in found[:5])
            raise Fault("ambiguous-tool", f"{name} is in the catalogues of several servers: {servers}")
        return found[0]

    def problem(self, tool: Tool, arguments: dict[str, Any]) -> str | None:
        """Say how arguments break the tool's schema; None if they do not, or if it is no schema."""
        validator = tool.validator
        if isinstance(validator, str):
            self.broken[tool.server, tool.name] = validator
            return None
        try:
            if not validator.is_valid(arguments):
                validator.validate(arguments)
        except jsonschema_rs.ValidationError as error:
            place = "/".join(map(str, error.instance_path))
            return f"{place}: {error.message}" if place else str(error.message)
        except ValueError as error:  # nested deeper than the validator goes
            return str(error)
        return None


def tool_of(server: str, item: Any, schema: Any = None) -> Tool:
    """Read a tool: {name, description, parameters}, MCP's with inputSchema, OpenAI's {type, function}.

    `schema` is that of a tool which says none.

    Raises:
        Fault: it has no name, or no schema.
    """
    if isinstance(item, dict) and isinstance(item.get("function"), dict):
        item = item["function"]
    if not isinstance(item, dict):
        raise Fault("no-tool", "a tool is no object")
    name, description = item.get("name"), item.get("description")
    if not isinstance(name, str) or not name:
        raise Fault("no-tool", "a tool has no name")
    schema = item.get("parameters", item.get("inputSchema", item.get("input_schema", schema)))
    if not isinstance(schema, dict) or not isinstance(schema.get("properties", {}), dict):
        raise Fault("no-schema", f"{name} has no input schema")
    if "type" not in schema or "properties" not in schema:
        # LLaMA-Factory's tool formats read parameters["properties"] without asking.
        schema = {"type": "object", "properties": {}} | schema
    return Tool(server, name, str(description or ""), schema)


def load(found: list[Path], catalogue: Catalogue) -> list[str]:
    """Add the tools of catalogue files; return what could not be used, in words."""
    notes = []
    for file in found:
        tools = 0
        for record in files.read(file):
            server, items = file.stem, [record]
            if isinstance(record, dict) and isinstance(record.get("tools"), list):
                info = record.get("server_info")
                named = info.get("name") if isinstance(info, dict) else None
                server, items = str(named or server), record["tools"]
            elif not record:
                continue
            for item in items:
                try:
                    catalogue.number(tool_of(server, item))
                    tools += 1
                except Fault as fault:
                    notes.append(f"{file}: {fault}")
        if not tools:
            notes.append(f"{file} holds no tools")
    return notes
