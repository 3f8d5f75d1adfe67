"""Collect the tools of live MCP servers as catalogues, and show what has changed since the last time.

FOLDER/NAME.json, which `convert --tools FOLDER` reads, has the format of tool lists in the user guide:

    {"server_info": {"name": "time", "version": "2026.10.19"}, "collected": "2026-11-28T22:00:00+00:00",
     "sha256": "5e8d…", "tools": [{"name": "get_current_time", "description": "Get current time in …",
                                   "inputSchema": {"type": "object", "properties": {…}}}]}
"""

import hashlib
import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

from mcp_lora.data import dataset, files
from mcp_lora.data.catalogue import Catalogue
from mcp_lora.data.records import RowError, Tool
from mcp_lora.data.tools import tools_in
from mcp_lora.errors import McpLoraError, explained
from mcp_lora.live.connections import TIMEOUT, Address, Connection, connected, read_only
from mcp_lora.prompts.chat_template import called


def collect(
    servers: Sequence[Address],
    folder: Path,
    trained: Path,
    say: Callable[[str], None],
    timeout: float = TIMEOUT,
) -> int:
    """Write a catalogue file for each server, and say one line about each; return how many were collected.

    The file of a server that fails is kept as it is.

    Args:
        servers: where they are.
        folder: of the catalogues.
        trained: a dataset's folder; its calls are validated against the schemas that have changed.
        say: receives the lines.
        timeout: seconds for a server to answer.

    Raises McpLoraError if no server can be used, or the folder cannot be written.
    """

    def failed(address: Address, why: str) -> None:
        kept = f"; {file} is kept as it is" if (file := _file(folder, str(address))).is_file() else ""
        say(f"warning: {address} cannot be collected: {why}{kept}")

    with connected(servers, failed, timeout) as connections:
        for connection in connections:
            with explained(f"{folder} cannot be written", "mcp-lora collect --output OTHER_FOLDER"):
                say(_write(connection, _file(folder, connection.name), trained))
        if not connections:
            raise McpLoraError("no server can be used: start it by hand, or a longer --timeout")
        return len(connections)


def _file(folder: Path, name: str) -> Path:
    quoted = quote(name, safe=" @")
    return folder / f"{re.sub('^[.]', '%2E', quoted)}.json"  # convert skips hidden files


def _write(connection: Connection, file: Path, trained: Path) -> str:
    """Write a server's catalogue; return the line about it."""
    text = json.dumps(connection.listed, ensure_ascii=False, sort_keys=True)
    content = {
        "server_info": {"name": connection.name, "version": connection.version},
        "collected": datetime.now(UTC).isoformat(timespec="seconds"),
        "sha256": hashlib.sha256(text.encode()).hexdigest(),
        "tools": connection.listed,
    }
    line = f"{connection.name} {connection.version}: {len(connection.listed)} tools → {file}"
    try:
        if old := files.load(file, "mcp-lora collect"):
            before = {tool.name: tool for tool in tools_in(old)}
            changes = _changes(before, connection.tools, trained)
            was = read_only(old.get("tools") or [])
            for name in sorted((was ^ connection.read_only) & before.keys() & connection.tools.keys()):
                changes.append(f"{name} {'no longer' if name in was else 'now'} says that it only reads")
            line += f"; since {old.get('collected', 'then')}: {', '.join(changes) or 'unchanged'}"
    except (McpLoraError, RowError) as error:
        line = f"warning: {line}; what has changed is not known ({error})"
    file.parent.mkdir(parents=True, exist_ok=True)
    new = file.with_name(f"{file.name}.new")
    dataset.dump(content, new)
    os.replace(new, file)
    return line


def _changes(before: Mapping[str, Tool], now: Mapping[str, Tool], trained: Path) -> list[str]:
    gone = [name for name in before if name not in now]
    both = [name for name in before if name in now]
    schemas = [name for name in both if _schema(now[name]) != _schema(before[name])]
    calls, invalid = _affected({name: before[name] for name in gone + schemas}, now, trained)
    lines = [f"{name} is new" for name in now if name not in before]
    lines += [f"{name} is gone" + f" ({calls[name]} calls in {trained})" * bool(calls[name]) for name in gone]
    for name in schemas:
        rows = invalid[name]
        of = f": {len(rows)} of {calls[name]} calls in {trained} no longer validate"
        first = f" (row {', '.join(map(str, sorted({*rows})[:3]))})" * bool(rows)
        lines.append(f"{name} has another schema" + (of + first) * bool(calls[name]))
    texts = [name for name in both if now[name].description != before[name].description]
    return lines + [f"{name} has another description" for name in texts]


def _schema(tool: Tool) -> Any:
    return tool.function["parameters"]  # as samples have it


def _affected(
    changed: Mapping[str, Tool], now: Mapping[str, Tool], trained: Path
) -> tuple[Counter[str], dict[str, list[int]]]:
    """Return how often the training data calls each changed tool, and in which rows that is invalid now."""
    calls, catalogue = Counter[str](), Catalogue()
    invalid: dict[str, list[int]] = defaultdict(list)
    if not changed or "train" not in dataset.names(trained):
        return calls, invalid
    old = {name: _schema(tool) for name, tool in changed.items()}
    for row, sample in enumerate(dataset.samples(trained, "train"), start=1):
        candidates = (tool["function"] for tool in sample["tools"])
        # a tool of another server may have the same name
        known = {tool["name"] for tool in candidates if tool["parameters"] == old.get(tool["name"])}
        for call in (one for message in sample["messages"] for one in called(message)):
            if call.name in known:
                calls[call.name] += 1
                if call.name in now and catalogue.problem(now[call.name], call.arguments):
                    invalid[call.name].append(row)
    return calls, invalid
