"""export, serve, parity."""

import shlex
from pathlib import Path
from typing import Annotated, Literal

from typer import Argument, Option

from mcp_lora.cli import console
from mcp_lora.cli.options import Checkpoint, Run
from mcp_lora.errors import McpLoraError, advice
from mcp_lora.train import runs
from mcp_lora.train.runs import DEFAULT

_OUTPUT = "Folder or .gguf file to write; outputs/merged_model, outputs/adapter or outputs/ollama by default."
_QUESTIONS = "Held-out questions of each split that check it; 5 by default."
_PYTHON = "Python of the environment with vLLM (default) or SGLang."
_KEY = "A key that every request must send."
_PUSH = "Upload it to the Hugging Face hub, into a private repository."
_TARGET = "A run's folder, an exported model's folder, or a GGUF file."
_PRINT = "Print the command for this server instead."
_HOST = "Address to listen on; any non-local address requires --api-key."
_MODEL = "Its model's name; mcp-lora by default, or the only one."


def export(
    run: Run = DEFAULT,
    output: Annotated[Path | None, Option("--output", "-o", help=_OUTPUT)] = None,
    checkpoint: Checkpoint = None,
    gguf: Annotated[Literal["f32", "f16", "bf16", "q8_0"] | None, Option(help="Write a GGUF file.")] = None,
    adapter_only: Annotated[bool, Option("--adapter-only", help="Without the base model.")] = False,
    ollama: Annotated[bool, Option("--ollama", help="Write a GGUF file and a Modelfile for Ollama.")] = False,
    questions: Annotated[int | None, Option(min=1, help=_QUESTIONS)] = None,
    push: Annotated[str | None, Option(metavar="OWNER/NAME", help=_PUSH)] = None,
) -> None:
    """Merge the adapter into the base model, or export it by itself, and check the result."""
    from mcp_lora.serve import export as exports

    request = exports.Request(run, output, checkpoint, gguf, adapter_only, ollama, push, questions)
    with console.progress() as progress:
        note = exports.export(request, progress)
    console.say(f"{request.target}: {note}")
    if push:
        console.say(f"pushed to {exports.push(request)}, which is private if it is new")


def serve(
    target: Annotated[Path, Argument(metavar="TARGET", help=_TARGET)] = DEFAULT,
    engine: Annotated[Literal["vllm", "sglang", "llama.cpp"] | None, Option(help="The server.")] = None,
    host: Annotated[str, Option(help=_HOST)] = "127.0.0.1",
    port: Annotated[int, Option(min=0, max=65535, help="Port to listen on.")] = 8000,
    api_key: Annotated[str | None, Option(envvar="MCP_LORA_API_KEY", help=_KEY)] = None,
    python: Annotated[Path | None, Option(help=_PYTHON)] = None,
    show: Annotated[
        Literal["vllm", "sglang", "llama.cpp", "ollama"] | None, Option("--print", help=_PRINT)
    ] = None,
) -> None:
    """Serve the adapter through OpenAI's protocol, with tool calls."""
    from mcp_lora.serve import servers

    request = servers.Request(target, show or engine, host, port, api_key, python)
    if show:
        argv = servers.command(request)
        secret = ["env", f"VLLM_API_KEY={api_key}"] if show == "vllm" and api_key else []
        console.show(shlex.join([*secret, *argv]))
        if show == "ollama":
            then = "then ask it: ollama run mcp-lora, or http://127.0.0.1:11434/v1"
            console.say(f"{then} (OLLAMA_HOST sets its address, not --host or --port; it has no key)")
        if show == "llama.cpp" and not Path(argv[2]).is_file():
            made = ["export", target, "--gguf", "f16", "--output", argv[2]]
            again = advice(*(made if request.is_run else ["serve", target, "--engine", "llama.cpp"]))
            console.say(f"to make this file: {again}")
        return
    servers.serve(request, console.say, console.progress)


def parity(
    url: Annotated[str, Argument(metavar="URL", help="The server's base URL, with /v1.")],
    run: Run = DEFAULT,
    endpoint_model: Annotated[str | None, Option(metavar="NAME", help=_MODEL)] = None,
) -> None:
    """Compare the prompts that a server makes of conversations with those of training."""
    from mcp_lora.evaluate import parity as parities
    from mcp_lora.prompts import chat_template

    found = parities.parity(url, chat_template.load(runs.read_run(run)), endpoint_model)
    for difference in found.differences:
        console.show(difference)
    what = f"{found.count} conversations compared by {found.compared}, {len(found.differences)} differ"
    if found.left_out:
        what += f"; {found.left_out} are rejected by the chat template"
    what = f"{found.model}: {what}"
    if found.differences:
        named = advice("serve", run, "--print", "vllm")
        again = f"serve it with the chat template that is named by {named}"
        raise McpLoraError(f"{what}: {again}", 1)
    console.say(what)
