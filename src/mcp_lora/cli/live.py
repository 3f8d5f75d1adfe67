"""collect, generate, chat: what is done with live MCP servers."""

import shlex
import signal
from pathlib import Path
from typing import Annotated, Any

from typer import Option

from mcp_lora.cli import console
from mcp_lora.cli.options import Checkpoint, Run
from mcp_lora.data import catalogue, conversion, dataset, files
from mcp_lora.errors import Interrupted, McpLoraError
from mcp_lora.live import connections
from mcp_lora.train.runs import DEFAULT

_MCP = "An MCP server: the command that starts it, or its URL; repeatable."
_CONFIG = "Servers as desktop clients have them, a JSON file with mcpServers; repeatable."
_TRAINED = "A converted dataset: its calls are validated against schemas that have changed."
_TIMEOUT = "Seconds for a server to answer."
_ALLOW = "A tool that is called although it does not say that it only reads; repeatable."
_TOOLS = "A tool catalogue: tools that the adapter may choose, and that are not run; repeatable."
_YES = "Run without asking what says that it only reads."
_TRANSCRIPT = "File for the conversations, which convert reads as data: .jsonl."

_CTRL_C = 128 + signal.SIGINT

Servers = Annotated[list[str] | None, Option("--mcp", metavar="SERVER", help=_MCP)]
Configs = Annotated[list[Path] | None, Option("--mcp-config", metavar="FILE", help=_CONFIG)]
Timeout = Annotated[float, Option(min=1, help=_TIMEOUT)]


def collect(
    mcp: Servers = None,
    mcp_config: Configs = None,
    output: Annotated[Path, Option("--output", "-o", help="Folder to write.")] = Path("data/tools"),
    trained: Annotated[Path, Option("--data", metavar="FOLDER", help=_TRAINED)] = dataset.FOLDER,
    timeout: Timeout = connections.TIMEOUT,
) -> None:
    """Collect the tools of live MCP servers as catalogues for convert --tools, and show what has changed."""
    from mcp_lora.live.collect import collect as collected

    servers = connections.addresses(mcp or [], mcp_config or [])
    count = collected(servers, output, trained, console.say, timeout)
    console.say(
        f"{count} of {len(servers)} servers; to use them: mcp-lora convert --tools {shlex.quote(str(output))}"
    )


def generate(
    endpoint: Annotated[str, Option(metavar="URL", help="The teacher: an OpenAI-compatible server.")],
    model: Annotated[str, Option(metavar="NAME", help="The teacher's name on it.")],
    mcp: Servers = None,
    mcp_config: Configs = None,
    rows: Annotated[int, Option(min=1, help="Rows to generate, spread over the tools.")] = 500,
    language: Annotated[list[str] | None, Option(help="Of the instructions; repeatable.")] = None,
    allow: Annotated[list[str] | None, Option(metavar="TOOL", help=_ALLOW)] = None,
    output: Annotated[Path, Option("--output", "-o", help="Folder to write.")] = conversion.FILTERED_FOLDER,
    seed: Annotated[int, Option(help="Sent to the teacher.")] = 42,
    timeout: Timeout = connections.TIMEOUT,
) -> None:
    """Let a teacher write instructions and follow them with the tools of live MCP servers."""
    from mcp_lora.evaluate.evaluation import Endpoint
    from mcp_lora.live.generate import Request
    from mcp_lora.live.generate import generate as generated

    servers = connections.addresses(mcp or [], mcp_config or [])
    request = Request(rows, Endpoint(endpoint, model), language or ["English"], allow or [], seed)
    with connections.connected(servers, _required, timeout) as connected, console.progress() as progress:
        file, lines = generated(request, connected, output, progress, console.say)
    console.show_generated(lines)
    console.say(
        f"to train on them: mcp-lora convert {shlex.quote(str(file))} --tools data/tools, of mcp-lora collect"
    )


def _required(address: connections.Address, why: str) -> None:
    raise McpLoraError(f"{address} cannot be used: {why}. Start it by hand, or try a longer --timeout")


def chat(
    run: Run = DEFAULT,
    checkpoint: Checkpoint = None,
    mcp: Servers = None,
    mcp_config: Configs = None,
    tools: Annotated[list[str] | None, Option(metavar="PATH", help=_TOOLS)] = None,
    endpoint: Annotated[str | None, Option(metavar="URL", help="The server that has the adapter.")] = None,
    endpoint_model: Annotated[str, Option(metavar="NAME", help="The adapter's name on it.")] = "mcp-lora",
    yes: Annotated[bool, Option("--yes", "-y", help=_YES)] = False,
    transcript: Annotated[Path | None, Option(metavar="FILE", help=_TRANSCRIPT)] = None,
    timeout: Timeout = connections.TIMEOUT,
) -> None:
    """Chat with the adapter in the terminal, with the tools of live MCP servers.

    /clear starts a new conversation, exit ends the chat; Ctrl-C stops an answer.
    """
    from mcp_lora.evaluate.evaluation import Endpoint
    from mcp_lora.live import chat as chats

    known = catalogue.Catalogue()
    again = "mcp-lora chat --tools OTHER_FILE"
    for note in catalogue.load(files.find([Path(name) for name in tools or []], again)[0], known):
        console.say(f"warning: {note}")
    servers = connections.addresses(mcp or [], mcp_config or []) if mcp or mcp_config else []

    def confirm(server: connections.Connection, name: str, arguments: dict[str, Any]) -> bool:
        if yes and name in server.read_only:
            return True
        what = "only reads" if name in server.read_only else "may change something"
        said = console.ask(f"run {' '.join(name.split())} of {server.name}, which {what}? [y/N] ")
        return (said or "").lower() in ("y", "yes")

    with connections.connected(servers, _required, timeout) as connected:
        named = Endpoint(endpoint, endpoint_model) if endpoint else None
        answer = chats.by_endpoint(run, named, console.say) if named else chats.here(run, checkpoint)
        chat = chats.Chat(run, answer, connected, known.tools, confirm, console.show_turn, transcript)
        while (text := _prompt()) not in (None, "exit", "/exit"):
            try:
                if text == "/clear":
                    chat.clear()
                elif text:
                    chat.say(text)
            except Interrupted as error:
                if error.code != _CTRL_C:
                    raise
                console.say("stopped")
            except McpLoraError as error:
                console.say(f"error: {error}")


def _prompt() -> str | None:
    """Return what the user says, None at the end of the input or on Ctrl-C."""
    try:
        return console.ask("You: ")
    except Interrupted as error:
        if error.code != _CTRL_C:
            raise
        return None
