"""An MCP server, by the official SDK: NAME MODE [PORT]; the mode is how it behaves."""

import os
import sys
from typing import Any

import anyio
import mcp_types as types
import uvicorn
from mcp.server import Server
from mcp.server.stdio import stdio_server

NAME, MODE = sys.argv[1:3]
BIG = "x" * (3 << 20)


def tool(name: str, reads: bool = True, kind: str = "string", description: str = "") -> types.Tool:
    schema = {"type": "object", "properties": {"name": {"type": kind}}, "required": ["name"]}
    hint = types.ToolAnnotations(read_only_hint=True) if reads else None
    return types.Tool(
        name=name, description=description or f"Does {name}.", input_schema=schema, annotations=hint
    )


TOOLS = [tool("greet"), tool("part", description="Says goodbye."), tool("erase", reads=False)]
CHANGED = [tool("greet", kind="integer"), tool("part", reads=False, description="Says farewell.")]
CHANGED += [tool("count")]


async def listed(context: Any, params: types.PaginatedRequestParams | None) -> types.ListToolsResult:
    if MODE == "hang":
        await anyio.sleep_forever()
    if MODE == "endless":
        return types.ListToolsResult(tools=[], next_cursor="again")
    if MODE == "pages":
        page = int(params.cursor) if params and params.cursor else 0
        after = str(page + 1) if page + 1 < len(TOOLS) else None
        return types.ListToolsResult(tools=[TOOLS[page]], next_cursor=after)
    if MODE == "big":
        return types.ListToolsResult(tools=[tool("greet", description=BIG)])
    return types.ListToolsResult(tools=CHANGED if MODE == "changed" else TOOLS)


async def called(context: Any, params: types.CallToolRequestParams) -> types.CallToolResult:
    name = str((params.arguments or {}).get("name"))
    if name == "Death":
        os._exit(1)
    if name == "Sleep":
        await anyio.sleep_forever()
    text = types.TextContent(type="text", text=f"{params.name} {name} \x1b[31m")
    return types.CallToolResult(content=[text], is_error=name == "Nobody")


SERVER: Server[Any] = Server(NAME, version="1.2.3", on_list_tools=listed, on_call_tool=called)


async def by_stdio() -> None:
    async with stdio_server() as (reader, writer):
        await SERVER.run(reader, writer, SERVER.create_initialization_options())


def by_http(port: int) -> None:
    app = SERVER.streamable_http_app()

    async def guarded(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and (b"x-key", b"secret") not in scope["headers"]:
            await send({"type": "http.response.start", "status": 401, "headers": []})
            await send({"type": "http.response.body", "body": b""})
        else:
            await app(scope, receive, send)

    uvicorn.run(guarded, host="127.0.0.1", port=port, log_level="error")


if __name__ == "__main__":
    if MODE == "fail":
        sys.exit("the server says why on its last line")
    if MODE == "http":
        by_http(int(sys.argv[3]))
    else:
        anyio.run(by_stdio)
