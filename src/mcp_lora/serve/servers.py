"""Serve an adapter through OpenAI's protocol: the commands of the servers, and one that runs."""

import errno
import importlib.util
import json
import shutil
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mcp_lora.data.rows import Progress
from mcp_lora.engine import launch
from mcp_lora.errors import Interrupted, McpLoraError, advice, one_line
from mcp_lora.evaluate.parity import NAME
from mcp_lora.prompts import chat_template
from mcp_lora.serve import export as exports
from mcp_lora.serve import llama_cpp
from mcp_lora.serve.card import complete
from mcp_lora.serve.support import lora_options, parser
from mcp_lora.train import runs
from mcp_lora.train.machine import detect_machine

ShowsProgress = Callable[[], AbstractContextManager[Progress]]  # while a block runs


@dataclass(frozen=True)
class Request:
    """What is served, and where.

    Attributes:
        target: a run's folder, an exported model's folder, or a GGUF file.
        engine: vllm, sglang, llama.cpp or ollama (which is not started); by default one of the first two on
            a GPU if installed, else llama.cpp.
        host, port: where it listens.
        api_key: what requests must send, if anything.
        python: the interpreter of the environment with vLLM (by default) or SGLang.
    """

    target: Path
    engine: str | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    python: Path | None = None

    def __post_init__(self) -> None:
        """Raise McpLoraError if it would listen to other machines without a key."""
        if self.host not in ("127.0.0.1", "localhost", "::1") and not self.api_key:
            what = f"{self.host} can be reached from other machines"
            raise McpLoraError(f"{what}: mcp-lora serve --host {self.host} --api-key KEY")
        if self.python and self.engine in ("llama.cpp", "ollama"):
            raise McpLoraError(f"{self.engine} needs no --python: mcp-lora serve --engine {self.engine}")

    @property
    def is_run(self) -> bool:
        """Whether the target is a run's folder."""
        return (self.target / "run.yaml").is_file()


def command(request: Request, key_file: Path | None = None) -> list[str]:
    """Return the command that serves a request's target by its engine; files that it names are written.

    Other users can see arguments. vLLM finds the key in its environment, SGLang, which reads none there, in
    `key_file`, a file of options; without one it is an argument.

    Raises McpLoraError if the engine cannot serve the target, or no parser is known for its calls.
    """
    target = request.target
    where = ["--host", request.host, "--port", str(request.port)]
    if request.engine == "llama.cpp":
        words = ["llama-server", "--model", str(gguf_of(request)), "--alias", NAME, "--jinja"]
        words += ["--ctx-size", str(llama_cpp.CONTEXT), "--predict", str(llama_cpp.ANSWER)]
        return [*words, *where, *_key(request)]
    if request.engine == "ollama":
        if not (target / "Modelfile").is_file():
            what = f"{target} contains no Modelfile"
            again = advice("export", target if request.is_run else "RUN", "--ollama")
            raise McpLoraError(f"{what}: {again}, and mcp-lora serve outputs/ollama --print ollama")
        return ["ollama", "create", NAME, "--file", str(target / "Modelfile")]
    if target.suffix == ".gguf":
        again = advice("serve", target, "--engine", "llama.cpp")
        raise McpLoraError(f"{target} is a GGUF file: {again}")
    if request.engine == "sglang" and request.is_run:  # run-time LoRA loses calls (sgl-project/sglang#30744)
        again = f"{advice('export', target)}, and mcp-lora serve outputs/merged_model --engine sglang"
        raise McpLoraError(f"SGLang serves a merged model: {again}")
    config = _config(request)
    template = chat_template.load(config)
    vllm_parser, sglang_parser = parser(template)
    files = target  # the template and the tokens that end an answer, as an export has them
    if request.is_run:
        files = target / "serving"
        complete(files, template)
    words = ["--chat-template", str((files / runs.CHAT_TEMPLATE).absolute()), *where]
    named = ["--served-model-name", NAME]
    if request.engine == "sglang":
        words += ["--tool-call-parser", sglang_parser, *named, *_key(request, key_file)]
        python = str(request.python or (sys.executable if key_file else "python"))  # one that is printed
        return [python, "-m", "sglang.launch_server", "--model-path", str(target), *words]
    words += ["--enable-auto-tool-choice", "--tool-call-parser", vllm_parser]
    if request.is_run:
        model, words = str(config["model_name_or_path"]), [*lora_options(target), *words]
        words += ["--generation-config", str(files.absolute())]
        words += ["--revision", str(config["model_revision"])] if config.get("model_revision") else []
        words += ["--trust-remote-code"] if config.get("trust_remote_code") else []
        words += ["--quantization", "bitsandbytes"] if config.get("quantization_bit") == 4 else []
    else:
        model, words = str(target), [*named, *words]
    if request.python:
        return [str(request.python), "-m", "vllm.entrypoints.cli.main", "serve", model, *words]
    return ["vllm", "serve", model, *words]


def _key(request: Request, key_file: Path | None = None) -> list[str]:
    if not request.api_key:
        return []
    return ["--config", str(key_file)] if key_file else ["--api-key", request.api_key]


def serve(request: Request, say: Callable[[str], None], progress: ShowsProgress) -> None:
    """Serve until it is interrupted; say when a request with a tool has been answered.

    Args:
        request: what is served, and where.
        say: logs a message.
        progress: shows the progress of an export.

    Raises McpLoraError if the port is in use, the server is not installed, cannot load the model, or ends by
    itself.
    """
    request = replace(request, engine=request.engine or _present(request))
    check_address(request)
    if request.engine == "llama.cpp":
        _serve_gguf(request, say, progress)
    else:
        _serve_by_command(request, say)
    say("the server is stopped")


def _serve_gguf(request: Request, say: Callable[[str], None], progress: ShowsProgress) -> None:
    """Serve with llama.cpp in this process; a run is exported first, unless it has been."""
    gguf = gguf_of(request)
    llama_cpp.require()
    if not gguf.is_file():
        say(f"exporting {request.target} as {gguf}, once")
        if request.is_run:
            with progress() as show:
                say(f"{gguf}: {exports.export(exports.Request(request.target, gguf, gguf='f16'), show)}")
            for other in gguf.parent.glob(_KEPT.format("*")):  # of earlier adapters
                if other != gguf:
                    other.unlink()
        else:

            def converted(scratch: Path) -> Path:
                llama_cpp.convert(request.target, scratch / gguf.name, "f16")
                return scratch / gguf.name

            launch.cached(gguf, converted, f"copy {request.target} to another folder, and serve that")
    where = (request.host, request.port, request.api_key)
    with llama_cpp.running(gguf, None, None, *where) as url, suppress(Interrupted):
        announce(url, request.api_key, say)
        threading.Event().wait()


def _serve_by_command(request: Request, say: Callable[[str], None]) -> None:
    """Start vLLM or SGLang, and wait for its end."""
    if not request.port:
        raise McpLoraError("only llama.cpp finds a free port: mcp-lora serve --port 8000")
    again = "mcp-lora serve --python PATH, or --engine llama.cpp"
    missing = McpLoraError(f"{request.engine} is not installed here: {again}")
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as key_file:  # that other users cannot read
        json.dump({"api-key": request.api_key}, key_file)
        key_file.flush()
        argv = command(request, Path(key_file.name))
        if not shutil.which(argv[0]):
            raise missing
        host = f"[{request.host}]" if ":" in request.host else request.host
        arguments = (f"http://{host}:{request.port}/v1", request.api_key, say)
        threading.Thread(target=announce, args=arguments, daemon=True).start()
        with suppress(Interrupted):
            outcome = launch.run(argv, {"VLLM_API_KEY": request.api_key} if request.api_key else {})
            error = launch.real_error(outcome.stderr)
            if f"No module named '{request.engine}'" in error:
                raise missing
            named = advice("serve", request.target, "--print", request.engine)
            raise McpLoraError(f"the server has ended:\n{error}\nIts command: {named}", outcome.code or 1)


_KEPT = "merged-{}-f16.gguf"  # in a run's folder, by the hash of its adapter


def _present(request: Request) -> str:
    """Return the engine to use if none is named."""
    if request.python:
        return "vllm"
    if request.target.suffix != ".gguf" and detect_machine().gpus:
        if shutil.which("vllm"):
            return "vllm"
        if importlib.util.find_spec("sglang") and not request.is_run:
            return "sglang"
    return "llama.cpp"


def check_address(request: Request) -> None:
    """Raise McpLoraError if no server can listen where it is wanted."""
    family = socket.AF_INET6 if ":" in request.host else socket.AF_INET
    try:
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a closed connection is not in use
            probe.bind((request.host, request.port))
    except OSError as error:
        if error.errno in (errno.EADDRINUSE, errno.EACCES):
            what = f"port {request.port} cannot be used ({error.strerror})"
            raise McpLoraError(f"{what}: mcp-lora serve --port {max(8000, request.port + 1)}") from None
        what = f"{request.host} is not an address of this machine ({error.strerror})"
        raise McpLoraError(f"{what}: mcp-lora serve --host 127.0.0.1") from None


def gguf_of(request: Request) -> Path:
    """Return the GGUF file that is served: the target, or the one that is kept in its folder."""
    if request.target.suffix == ".gguf":
        if request.target.is_file():
            return request.target
        again = advice("export", "RUN", "--gguf", "f16", "--output", request.target)
        raise McpLoraError(f"there is no {request.target}: {again}")
    if not request.is_run:
        kept = request.target / "model.gguf"  # export --ollama writes it, too
        if not kept.is_file():
            _config(request)
        return kept
    if runs.is_quantized(request.target):
        what = f"the base of {request.target} is quantized, and llama.cpp needs a merged model"
        raise McpLoraError(f"{what}: {advice('serve', request.target, '--print', 'vllm')}")
    return request.target / _KEPT.format(runs.adapter_hash(runs.adapter(request.target))[:8])


def _config(request: Request) -> dict[str, Any]:
    """Return the configuration that names the model of a folder."""
    if request.is_run:
        return runs.read_run(request.target)
    if not (request.target / "config.json").is_file():
        what = f"{request.target} is neither a run's folder, nor an exported model's, nor a GGUF file"
        raise McpLoraError(f"{what}: mcp-lora train, or mcp-lora serve outputs/merged_model")
    return {"model_name_or_path": str(request.target)}


PROBE: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the current weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


def _probe(url: str, api_key: str | None) -> str:
    """Send a question with a tool, and return a message on the answer."""
    from openai import OpenAI

    client = OpenAI(base_url=url, api_key=api_key or "none", max_retries=0)
    messages: Sequence[Any] = [{"role": "user", "content": "What is the weather like in Tokyo?"}]
    reply = client.chat.completions.create(
        model=NAME, messages=messages, tools=[PROBE], temperature=0, max_tokens=128
    )
    made = reply.choices[0].message.tool_calls or []
    function = getattr(made[0], "function", None) if made else None
    if not function:
        return f"warning: ready at {url}, but a question with a tool was answered without a call"
    return f"ready at {url}, model {NAME}: it has called {function.name} {function.arguments}"


def announce(url: str, api_key: str | None, say: Callable[[str], None]) -> None:
    """Wait until a server answers, and say how."""
    from openai import APIConnectionError, OpenAIError

    while True:
        try:
            return say(_probe(url, api_key))
        except APIConnectionError:  # it is starting
            time.sleep(1)
        except OpenAIError as error:
            return say(f"warning: {url} answers, but rejects a question with a tool ({one_line(error)})")
