"""All known tools: from catalogue files, and from the rows that bring their own."""

from pathlib import Path
from typing import Any

import jsonschema_rs
import msgspec

from mcp_lora.data import files
from mcp_lora.data.records import RowError, Tool, as_json
from mcp_lora.data.tools import tools_in


class Catalogue:
    """Tools by number, one for each (server, name): the first definition counts.

    A row that brings another definition of the same tool keeps its own; see `number`.
    """

    def __init__(self) -> None:
        self.tools: list[Tool] = []
        self.by_server: dict[str, list[Tool]] = {}
        self.broken: dict[tuple[str, str], str] = {}  # tools with an invalid schema, and why
        self._numbers: dict[tuple[str, str], int] = {}
        self._by_name: dict[str, list[Tool]] = {}

    def number(self, tool: Tool) -> int | None:
        """Return the tool's number, adding it if it is new; None if it is defined differently already.

        Raises RowError if it cannot be written as JSON.
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
        """Return the tool of this name: the one of this server, else the only one.

        Raises RowError if there is none, or it is ambiguous.
        """
        number = self._numbers.get((server, name))
        if number is not None:
            return self.tools[number]
        found = self._by_name.get(name)
        if not found:
            what = f"{name} is called, but the row has no tools: add its catalogue with --tools"
            raise RowError("not-in-catalogue", what)
        if any(tool.parameters != found[0].parameters for tool in found):
            servers = ", ".join(tool.server for tool in found[:5])
            raise RowError("ambiguous-tool", f"{name} is in the catalogues of several servers: {servers}")
        return found[0]

    def problem(self, tool: Tool, arguments: dict[str, Any]) -> str | None:
        """Return how arguments violate the tool's schema; None if they do not, or the schema is invalid."""
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
        except ValueError as error:  # nested deeper than the validator supports
            return str(error)
        return None


def load(found: list[Path], catalogue: Catalogue) -> list[str]:
    """Add the tools of catalogue files (see mcp_lora.data.tools); return messages on what could not be used.

    If a tool does not name its server, the file's name is used.
    """
    notes = []
    for file in found:
        count = 0
        for record in files.read(file):
            try:
                if isinstance(record, files.Broken):
                    raise RowError("not-json", record.message)
                for tool in tools_in(record, file.stem):
                    catalogue.number(tool)
                    count += 1
            except RowError as error:
                notes.append(f"{file}: {error}")
        if not count:
            notes.append(f"{file} contains no tools")
    return notes
