"""llama.cpp: its converters, of a pinned version, and its server (package xllamacpp, extra `serve`)."""

import importlib.util
import sys
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mcp_lora.engine import launch
from mcp_lora.errors import McpLoraError
from mcp_lora.evaluate.parity import NAME

# The sdist contains llama.cpp with its converters, which are plain Python. pip prepares the sdist's metadata,
# for which it fetches scikit-build-core; nothing is compiled.
PACKAGE = "llama-cpp-python==0.3.36"
SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
_PARTS = ("conversion/", "convert_hf_to_gguf.py", "convert_lora_to_gguf.py", "gguf-py/gguf/")
CONTEXT = 16384  # tokens, shared by all requests of a server
# Tokens of an answer, at most, to a request without max_tokens: small models may never end one.
ANSWER = 2048
_SMALLER = "mcp-lora eval, to see the longest questions"
_PARALLEL = 4  # requests that are answered at the same time; others wait


def convert(folder: Path, target: Path, dtype: str, base: Path | None = None) -> None:
    """Write a model's folder as a GGUF file, with its tokenizer and chat template, or an adapter's.

    `dtype` is one that the converter writes: f32, f16, bf16 or q8_0; `base` is the folder of the config
    of an adapter's base. Raises McpLoraError if it fails.
    """
    script, words = ("lora", ["--base", str(base)]) if base else ("hf", [])
    argv = [sys.executable, str(converters() / f"convert_{script}_to_gguf.py"), *words]
    outcome = launch.run([*argv, "--outfile", str(target), "--outtype", dtype, str(folder)], {})
    if outcome.code or not target.is_file():
        what = f"llama.cpp cannot convert {folder}:\n{launch.real_error(outcome.stderr)}"
        raise McpLoraError(f"{what}\nServe it without GGUF: mcp-lora serve --print vllm", outcome.code or 1)


def converters() -> Path:
    """Return the folder of the converters; fetch them if they are missing.

    Raises McpLoraError if they cannot be fetched.
    """

    def extracted(scratch: Path) -> Path:
        options = ("mcp-lora export", "--no-binary", "llama-cpp-python")
        sdist = launch.download(PACKAGE, scratch, SHA256, *options)
        with tarfile.open(sdist) as archive:
            for one in archive.getmembers():
                one.name = one.name.partition("/vendor/llama.cpp/")[2]
                if one.name.startswith(_PARTS):
                    archive.extract(one, scratch / "converters", filter="data")
        return scratch / "converters"

    return launch.cached(launch.cache(PACKAGE), extracted)


def require() -> None:
    """Raise McpLoraError if llama.cpp's server is not installed."""
    if importlib.util.find_spec("xllamacpp") is None:
        raise McpLoraError("llama.cpp's server is not installed: pip install -e '.[serve]'")


@contextmanager
def running(
    model: Path,
    adapter: Path | None,
    chat_template: str | None,
    host: str = "127.0.0.1",
    port: int = 0,
    api_key: str | None = None,
    context: int = CONTEXT,
) -> Iterator[str]:
    """Serve a GGUF file while the block runs; yields the base URL, with /v1.

    Args:
        model: the GGUF file.
        adapter: the GGUF file of an adapter, if it is not merged.
        chat_template: the template to use instead of the file's own.
        host, port: where it listens; by default on any free port.
        api_key: what a request must send, if anything.
        context: tokens that all requests share.

    Raises McpLoraError if xllamacpp is not installed, the file cannot be loaded or the port is in use.
    """
    require()
    import xllamacpp
    from gguf import GGUFReader

    params = xllamacpp.CommonParams()
    params.model.path, params.model_alias = str(model), {NAME}
    params.hostnames, params.port = [host], port
    params.api_keys = [api_key] if api_key else []
    params.chat_template = chat_template or ""
    params.use_jinja, params.ui = True, False
    params.n_ctx, params.n_parallel, params.kv_unified = context, _PARALLEL, True
    params.n_predict = ANSWER
    params.cpuparams.poll = 0  # threads that wait do not keep other processes from the cores
    params.verbosity = 1  # errors
    if adapter:
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(adapter), 1.0)]
    try:
        server = xllamacpp.Server(params)
    except RuntimeError as error:
        with suppress(ValueError, LookupError):  # it is no GGUF file
            if GGUFReader(model).fields["general.type"].contents() == "adapter":
                what = f"{model} is an adapter without its base"
                raise McpLoraError(f"{what}: mcp-lora serve RUN, or as in docs/serving.md") from None
        what = f"{model} cannot be served on {host}:{port} ({error})"
        raise McpLoraError(
            f"{what}: is it a GGUF file, is the port free? mcp-lora serve --port 8001"
        ) from None
    try:
        yield f"{server.listening_address}/v1"
    finally:
        del server  # which stops it


def complete(url: str, prompt: list[int], length: int) -> list[int]:
    """Return the greedy answer of a running server, at most `length` tokens, to the token ids of a prompt.

    Raises McpLoraError if it does not answer.
    """
    import httpx

    body = {"prompt": prompt, "n_predict": length, "temperature": 0, "return_tokens": True}
    try:
        reply = httpx.post(f"{url.removesuffix('/v1')}/completion", json=body, timeout=None)
        if reply.is_error:
            raise McpLoraError(
                f"llama.cpp rejects a prompt of {len(prompt)} tokens ({reply.text}): {_SMALLER}"
            )
        return list(reply.json()["tokens"])
    except (httpx.HTTPError, LookupError, ValueError) as error:
        raise McpLoraError(f"llama.cpp does not answer ({error}): is there enough memory? free -h") from None
