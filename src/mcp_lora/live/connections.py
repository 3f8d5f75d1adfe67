"""Connections to MCP servers, by the official SDK (package mcp, extra `mcp`).

Servers are named by a command or URL, or in the file that desktop clients read:

    {"mcpServers": {"time": {"command": "uvx", "args": ["mcp-server-time"], "env": {"TZ": "UTC"}},
                    "docs": {"url": "https://example.org/mcp", "headers": {"X-Key": "${DOCS_KEY}"}}}}
"""

import importlib.util
import logging
import math
import os
import re
import shlex
import tempfile
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from mcp_lora.data import files
from mcp_lora.data.records import RowError, Tool
from mcp_lora.data.tools import tools_in
from mcp_lora.errors import McpLoraError, one_line

TIMEOUT = 60.0  # seconds; `uvx` and `npx` fetch a server when it is first started


@dataclass(frozen=True)
class Address:
    """How a server is reached: a command to start it, or a URL; without a `name` the server's own counts."""

    name: str = ""
    command: Sequence[str] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    folder: str | None = None
    url: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name or self.url or shlex.join(self.command)


class Result(NamedTuple):
    """The result of a call as text, and whether the server calls it an error."""

    text: str
    is_error: bool


class Connection:
    """A connected server.

    Attributes:
        name: in the configuration, else the server's own.
        version: as the server says it.
        listed: its tools, as JSON objects in MCP's format.
        tools: the same as catalogue tools, by name.
        read_only: the names of those that change nothing, by the server's readOnlyHint.
    """

    def __init__(self, address: Address, client: Any, portal: Any, listed: list[Any], log: TextIO) -> None:
        info = client.server_info
        self.name = " ".join((address.name or (info and info.name) or str(address)).split())
        self.version = (info and info.version) or ""
        keys = {"name", "title", "description", "input_schema", "annotations"}
        dumped = [tool.model_dump(by_alias=True, exclude_none=True, include=keys) for tool in listed]
        self.listed: list[dict[str, Any]] = sorted(dumped, key=lambda tool: tool["name"])
        self.tools: dict[str, Tool] = {tool.name: tool for tool in tools_in(self.listed, self.name)}
        self.read_only = read_only(self.listed)
        self._client, self._portal, self._log = client, portal, log

    def call(self, name: str, arguments: dict[str, Any]) -> Result:
        """Call a tool; no answer in time is an error, too. Raises McpLoraError if the server has died."""
        from mcp.shared.exceptions import MCPError
        from mcp_types import CONNECTION_CLOSED

        future = self._portal.start_task_soon(self._client.call_tool, name, arguments)
        try:
            found = future.result()
        except Exception as error:
            if isinstance(error, MCPError | ValueError | RuntimeError) and (
                getattr(error, "code", None) != CONNECTION_CLOSED
            ):
                return Result(one_line(error), True)
            what = f"the server {self.name} has died{last_line(self._log)}"
            raise McpLoraError(f"{what}: start it by hand, and run again") from None
        except BaseException:  # Ctrl-C
            future.cancel()
            raise
        parts = (getattr(part, "resource", part) for part in found.content)  # a file's content, too
        texts = [
            getattr(part, "text", f"[{one.type}]") for one, part in zip(found.content, parts, strict=True)
        ]
        return Result("\n".join(texts), bool(found.is_error))


def read_only(listed: Iterable[Any]) -> set[str]:
    """Return the names of the tools that say that they change nothing; only MCP's format has that."""
    tools = [tool for tool in listed if isinstance(tool, dict)]
    return {str(tool.get("name")) for tool in tools if (tool.get("annotations") or {}).get("readOnlyHint")}


def addresses(servers: Sequence[str], configs: Sequence[Path]) -> list[Address]:
    """Return the servers that are named: by commands or URLs, and in configuration files.

    Raises McpLoraError if there are none, or a configuration cannot be used.
    """
    if importlib.util.find_spec("mcp") is None:
        raise McpLoraError("the MCP SDK is not installed in this environment: pip install -e '.[mcp]'")
    found = []
    for text in servers:
        try:
            words = shlex.split(text)
        except ValueError as error:
            raise McpLoraError(f"--mcp {text} cannot be read ({error}): quote it as in a shell") from None
        if not words:
            raise McpLoraError('--mcp is empty: mcp-lora collect --mcp "python -m mcp_server_time"')
        found.append(Address(url=text) if re.match("https?://", text) else Address(command=words))
    for file in configs:
        found += _configured(file)
    if not found:
        raise McpLoraError('no server is named: --mcp "python -m mcp_server_time", or --mcp-config FILE')
    return found


def _configured(file: Path) -> Iterator[Address]:
    example = '{"mcpServers": {"time": {"command": "uvx", "args": ["mcp-server-time"]}}}'

    def expanded(value: object) -> str:
        """Return a text with ${NAME} and ${env:NAME} replaced from the environment."""
        try:
            return re.sub(r"\$\{(?:env:)?(\w+)\}", lambda match: os.environ[match[1]], str(value))
        except KeyError as error:
            raise McpLoraError(f"{file} needs {error.args[0]}: export {error.args[0]}=…") from None

    if not file.is_file():
        raise McpLoraError(f"there is no {file}: --mcp-config FILE, with {example}")
    content = files.load(file, f"it has to be like {example}")
    servers = content.get("mcpServers", content.get("servers"))  # the latter is Visual Studio Code's
    if not isinstance(servers, dict):
        raise McpLoraError(f"{file} has no mcpServers: it has to be like {example}")
    for name, entry in servers.items():
        if not isinstance(entry, dict) or not (entry.get("command") or entry.get("url")):
            raise McpLoraError(f"{file}: {name} has no command and no url: it has to be like {example}")
        if entry.get("disabled"):
            continue
        words, environment, headers = (entry.get(key) or {} for key in ("args", "env", "headers"))
        if not isinstance(words or [], list) or not all(
            isinstance(one, dict) for one in (environment, headers)
        ):
            raise McpLoraError(f"{file}: the args of {name} are no list, or env or headers no object")
        yield Address(
            name,
            [*map(expanded, [entry["command"], *words])] if entry.get("command") else [],
            {key: expanded(value) for key, value in environment.items() if value is not None},
            expanded(entry["cwd"]) if entry.get("cwd") else None,
            expanded(entry.get("url") or ""),
            {key: expanded(value) for key, value in headers.items() if value is not None},
        )


@contextmanager
def connected(
    servers: Sequence[Address], failed: Callable[[Address, str], None], timeout: float = TIMEOUT
) -> Iterator[list[Connection]]:
    """Connect to servers while the block runs, and list their tools.

    Args:
        servers: their addresses.
        failed: receives each that cannot be used, and why; it may raise.
        timeout: seconds for a connection with its list of tools, and for a call.
    """
    from anyio.from_thread import start_blocking_portal

    logging.getLogger("mcp").setLevel(logging.CRITICAL)  # its tracebacks of servers that die
    with start_blocking_portal() as portal, ExitStack() as stack:
        found: list[Connection] = []
        for address in servers:
            # what a server writes on stderr is of interest only if it fails
            log = stack.enter_context(tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace"))
            running = portal.wrap_async_context_manager(_running(address, timeout, log))
            try:
                client, listed = running.__enter__()
            except Exception as error:
                failed(address, f"{_reason(error)}{last_line(log)}")
                continue
            stack.callback(_leave, running)
            try:
                connection = Connection(address, client, portal, listed, log)
            except RowError as error:
                failed(address, f"its tools cannot be used: {error}")
                continue
            if connection.name in (one.name for one in found):
                failed(address, f"another server has the name {connection.name}: name them in --mcp-config")
                continue
            found.append(connection)
        yield found


def _leave(running: Any) -> None:
    """Disconnect; a server may have died meanwhile, or a task been cancelled."""
    with suppress(Exception):
        running.__exit__(None, None, None)


def last_line(log: TextIO) -> str:
    """Return the last line that a server has written on stderr, in brackets.

    It goes on writing where the file's position is, which is its own, too, and is left alone.
    """
    start = max(0, os.fstat(log.fileno()).st_size - 2000)
    line = os.pread(log.fileno(), 2000, start).decode(errors="replace").strip().rpartition("\n")[2]
    return f" ({line})" if line else ""


@asynccontextmanager
async def _running(address: Address, timeout: float, log: TextIO) -> AsyncIterator[tuple[Any, list[Any]]]:
    import anyio
    import httpx2
    from mcp import Client, StdioServerParameters
    from mcp.client.stdio import stdio_client
    from mcp.client.streamable_http import streamable_http_client

    with anyio.fail_after(timeout) as limit:
        async with AsyncExitStack() as stack:
            if address.url:
                made = httpx2.AsyncClient(headers=dict(address.headers), timeout=httpx2.Timeout(timeout))
                http = await stack.enter_async_context(made)
                transport: Any = streamable_http_client(address.url, http_client=http)
            else:
                command, *words = address.command
                named = StdioServerParameters(
                    command=command,
                    args=words,
                    env=dict(address.environment),
                    cwd=address.folder,
                    encoding_error_handler="replace",
                )
                transport = stdio_client(named, errlog=log)
            client = await stack.enter_async_context(Client(transport, read_timeout_seconds=timeout))
            page = await client.list_tools()
            listed = page.tools
            while page.next_cursor:
                page = await client.list_tools(cursor=page.next_cursor)
                listed += page.tools
            limit.deadline = math.inf
            yield client, listed


def _reason(error: BaseException) -> str:
    """Return an error of the SDK in one line, without the groups around it."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    if isinstance(error, TimeoutError):
        return "it does not answer in time"
    return one_line(error)
