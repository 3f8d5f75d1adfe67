"""The tools that are known: from catalogues, and from the rows that bring their own."""

from pathlib import Path
from typing import Any

import jsonschema_rs
import msgspec

from mcp_lora.data import files
from mcp_lora.data.records import Fault, Tool, as_json
from mcp_lora.data.tools import tools_in


class Catalogue:
    """Tools by number, one for each (server, name): the first definition that was met counts.

    A row that brings another definition of the same tool keeps its own; see `number`.
    """

    def __init__(self) -> None:
        self.tools: list[Tool] = []
        self.by_server: dict[str, list[Tool]] = {}
        self.consulted = 0  # how often a row had no tools of its own
        self.broken: dict[tuple[str, str], str] = {}  # tools with a schema that is no schema
        self._numbers: dict[tuple[str, str], int] = {}
        self._by_name: dict[str, list[Tool]] = {}

    def number(self, tool: Tool) -> int | None:
        """Return the tool's number, adding it if it is new; None if another definition has its place.

        Raises Fault where it cannot be written as JSON.
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

        Raises Fault where there is none, or it is not clear which.
        """
        self.consulted += 1
        number = self._numbers.get((server, name))
        if number is not None:
            return self.tools[number]
        found = self._by_name.get(name)
        if not found:
            raise Fault(
                "not-in-catalogue", f"{name} is called, and no tool is on offer: name it with --tools"
            )
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


def load(found: list[Path], catalogue: Catalogue) -> list[str]:
    """Add the tools of catalogue files (see mcp_lora.data.tools); return what could not be used, in words.

    The server is the file's name where it is not said.
    """
    notes = []
    for file in found:
        count = 0
        for record in files.read(file):
            try:
                if isinstance(record, files.Broken):
                    raise Fault("not-json", record.sentence)
                for tool in tools_in(record, file.stem):
                    catalogue.number(tool)
                    count += 1
            except Fault as fault:
                notes.append(f"{file}: {fault}")
        if not count:
            notes.append(f"{file} holds no tools")
    return notes
