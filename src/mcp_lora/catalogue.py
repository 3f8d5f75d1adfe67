r"""The tools that are known: from catalogues, and from the rows that bring their own.

A catalogue is a JSON file: a list, or {server_info, tools}; the schema is in `parameters` or in
`inputSchema`. The server is the file's name where it is not said:

    {"server_info": {"name": "calculator", "description": "Evaluates arithmetic"},
     "tools": [{"name": "calculate", "description": "Evaluates the expression",
                "inputSchema": {"type": "object", "properties": {"expression": {"type": "string"}}}}]}
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema_rs

from mcp_lora import files
from mcp_lora.records import Fault, Tool, as_json


class Catalogue:
    """Tools by number, one for each (server, name): the first definition that was met counts.

    A row that brings another definition of the same tool keeps its own; see `number`.
    """

    def __init__(self) -> None:
        self.tools: list[Tool] = []
        self.by_server: dict[str, list[int]] = {}
        self.broken: dict[tuple[str, str], str] = {}  # tools with a schema that is no schema
        self._numbers: dict[tuple[str, str], int] = {}
        self._by_name: dict[str, list[int]] = {}
        self._validators: list[jsonschema_rs.Validator | None | bool] = []

    def number(self, tool: Tool) -> int | None:
        """Return the tool's number, adding it if it is new; None if another definition has its place.

        Raises:
            Fault: it cannot be written as JSON.
        """
        key = tool.server, tool.name
        number = self._numbers.get(key)
        if number is not None:
            return number if self.tools[number] == tool else None
        as_json(tool)
        number = len(self.tools)
        self.tools.append(tool)
        self._validators.append(False)
        self._numbers[key] = number
        self.by_server.setdefault(tool.server, []).append(number)
        self._by_name.setdefault(tool.name, []).append(number)
        return number

    def find(self, name: str, server: str) -> Tool:
        """Return the tool of a name, of this server if it has one, else of the only one that has.

        Raises:
            Fault: there is none, or it is not clear which.
        """
        number = self._numbers.get((server, name))
        if number is not None:
            return self.tools[number]
        found = [self.tools[number] for number in self._by_name.get(name, [])]
        if not found:
            raise Fault("not-in-catalogue", f"{name} is in no catalogue that --tools names")
        if any(tool.parameters != found[0].parameters for tool in found):
            servers = ", ".join(tool.server for tool in found[:5])
            raise Fault("ambiguous-tool", f"{name} is in the catalogues of several servers: {servers}")
        return found[0]

    def problem(self, tool: Tool, arguments: dict[str, Any]) -> str | None:
        """Say how arguments break the tool's schema; None if they do not, or if it is no schema."""
        number = self._numbers.get((tool.server, tool.name))
        if number is None or self.tools[number] is not tool:
            validator = self._validator(tool)
        else:
            known = self._validators[number]
            if known is False:
                known = self._validators[number] = self._validator(tool)
            validator = known  # type: ignore[assignment]  # False is gone
        try:
            if validator is None or validator.is_valid(arguments):
                return None
            validator.validate(arguments)
        except jsonschema_rs.ValidationError as error:
            place = "/".join(map(str, error.instance_path))
            return f"{place}: {error.message}" if place else str(error.message)
        except ValueError as error:  # nested deeper than the validator goes
            return str(error)
        return None

    def _validator(self, tool: Tool) -> jsonschema_rs.Validator | None:
        try:
            return jsonschema_rs.validator_for(tool.parameters, validate_formats=False, offline=True)
        except ValueError as error:
            self.broken[tool.server, tool.name] = str(error).split("\n")[0]
            return None


def tool_of(server: Any, item: Any) -> Tool:
    """Read a tool: {name, description, parameters}, MCP's {name, description, inputSchema}.

    Raises:
        Fault: it has no name, or no schema.
    """
    if not isinstance(item, dict):
        raise Fault("no-tool", "a tool is no object")
    schema = item.get("parameters", item.get("inputSchema", item.get("input_schema")))
    return new_tool(server, item.get("name"), item.get("description"), schema)


def new_tool(server: Any, name: Any, description: Any, schema: Any) -> Tool:
    """Return a tool of values that have not been looked at.

    Raises:
        Fault: it has no name, or no schema.
    """
    if not isinstance(name, str) or not name:
        raise Fault("no-tool", "a tool has no name")
    if not isinstance(schema, dict) or not isinstance(schema.get("properties", {}), dict):
        raise Fault("no-schema", f"{name} has no input schema")
    if "type" not in schema or "properties" not in schema:
        # LLaMA-Factory's tool formats read parameters["properties"] without asking.
        schema = {"type": "object", "properties": {}} | schema
    return Tool(str(server), name, str(description or ""), schema)


def load(found: list[Path], catalogue: Catalogue) -> list[str]:
    """Add the tools of catalogue files; return what could not be used, in words."""
    notes = []
    for file in found:
        tools = 0
        for server, item in _items(file):
            try:
                catalogue.number(tool_of(server, item))
                tools += 1
            except Fault as fault:
                notes.append(f"{file}: {fault.sentence}")
        if not tools:
            notes.append(f"{file} holds no tools")
    return notes


def _items(file: Path) -> Iterator[tuple[str, Any]]:
    for record in files.read(file):
        if isinstance(record, dict) and isinstance(tools := record.get("tools"), list):
            info = record.get("server_info")
            server = (info.get("name") if isinstance(info, dict) else None) or file.stem
            yield from ((str(server), tool) for tool in tools)
        elif isinstance(record, files.Broken) or record:
            yield file.stem, record
