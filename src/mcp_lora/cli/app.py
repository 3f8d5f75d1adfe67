"""The command line: commands parse, call one function and print; `main` reports errors."""

import errno
import os
import re
import shlex
import signal
import sys
import traceback
from importlib.metadata import version
from typing import Annotated, Any

import typer
from typer import Option

from mcp_lora.cli import console, data, demo, evaluate, live, serve, train
from mcp_lora.errors import Interrupted, McpLoraError

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Tune a language model to call MCP tools.",
    context_settings={
        "help_option_names": ["-h", "--help"],
        # names of earlier versions
        "token_normalize_func": lambda name: {"out": "output", "to": "output"}.get(name, name),
    },
)
for command, name, example in (
    (data.convert, "convert", "data/filtered --holdout-tools 0.2"),
    (data.inspect, "inspect", "1 --split seen"),
    (train.train, "train", "--data my.jsonl --model Qwen/Qwen2.5-7B-Instruct num_train_epochs=3"),
    (train.recipe, "recipe", "qlora > my.yaml"),
    (train.doctor, "doctor", "--model Qwen/Qwen2.5-7B-Instruct"),
    (evaluate.evaluate, "eval", '--require "unseen_tool.ast>=0.6"'),
    (evaluate.report, "report", "outputs/mcp_lora"),
    (live.chat, "chat", '--mcp "python -m mcp_server_time" --yes'),
    (serve.export, "export", "outputs/mcp_lora --gguf f16"),
    (serve.serve, "serve", "outputs/mcp_lora --print vllm"),
    (serve.parity, "parity", "http://127.0.0.1:8000/v1 outputs/mcp_lora"),
    (live.collect, "collect", "--mcp-config mcp.json"),
    (live.generate, "generate", "--mcp-config mcp.json --endpoint http://127.0.0.1:8000/v1 --model NAME"),
    (demo.demo, "demo", "--minutes 60"),
):
    app.command(name, epilog=f"Example: mcp-lora {name} {example}".rstrip())(command)


_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)


def _print_version(wanted: bool) -> None:
    if wanted:
        console.show(f"mcp-lora {version('mcp-lora')}")
        raise typer.Exit


@app.callback()
def _options(
    quiet: Annotated[bool, Option("--quiet", "-q", help="Leave out mcp-lora's own notes.")] = False,
    version: Annotated[bool, Option("--version", is_eager=True, callback=_print_version)] = False,
) -> None:
    console.QUIET = quiet


def interrupted(number: int, frame: Any) -> None:
    """Handle a signal like any other error, so that started processes are stopped."""
    raise Interrupted(128 + number)


def _again(words: list[str], option: str | None) -> str:
    """Return the command that continues an interrupted one: the same, with another option for a training."""
    if option is not None and "train" in words:  # a demo starts over
        words = [word for word in words if word not in ("--resume", "--overwrite")] + [option] * bool(option)
    return shlex.join(["mcp-lora", *words])


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; an error is one line and an exit code.

    MCP_LORA_TRACEBACK=1 in the environment also prints the traceback.
    """
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):  # with which the engine would wait for other processes
        os.environ.pop(name, None)
    words = sys.argv[1:] if arguments is None else arguments
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupted)
    try:
        if empty := [place for place, word in enumerate(words) if not word or re.match(r"--\S+=$", word)]:
            what = " ".join(words[max(0, empty[0] - 1) : empty[0] + 1])
            raise McpLoraError(f"empty argument, an unset variable? {what}: see mcp-lora {words[0]} --help")
        try:
            # --quiet is the app's own option, but may also follow the command
            app(sorted(words, key=lambda word: word not in ("--quiet", "-q")))
        except OSError as error:  # the output or the temporary folder, on a full disk
            if error.errno not in _DISK:
                raise
            where = error.filename or "the output"
            what = f"{where} cannot be read or written ({error.strerror or error})"
            raise McpLoraError(f"{what}: see df -h and ls -l, and run again") from error
    except (McpLoraError, Interrupted) as error:
        if os.environ.get("MCP_LORA_TRACEBACK"):
            traceback.print_exc()
        hint = f"; to continue: {_again(words, error.option)}" if isinstance(error, Interrupted) else ""
        console.say(f"error: {error}{hint}")
        sys.exit(error.code)
