"""Export a run's adapter: merged, by itself, as GGUF or for Ollama."""

import os
import shlex
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mcp_lora.data import files
from mcp_lora.data.rows import Progress
from mcp_lora.engine import api, launch
from mcp_lora.engine.topology import Topology
from mcp_lora.errors import McpLoraError, advice, explained, one_line
from mcp_lora.evaluate import evaluation
from mcp_lora.prompts import chat_template, render
from mcp_lora.prompts.chat_template import ChatTemplate
from mcp_lora.serve import llama_cpp
from mcp_lora.serve.card import check_ollama, complete, model_card, modelfile
from mcp_lora.serve.support import lora_options, parser
from mcp_lora.serve.verify import (
    OTHER_CALLS,
    Comparison,
    by_engine,
    by_llama_cpp,
    check_answers,
    compare,
    is_slow,
)
from mcp_lora.train import runs
from mcp_lora.train.machine import detect_machine

_ADAPTER = ("adapter_*", "tokenizer*", "*.jinja", "special_tokens_map.json", "vocab.*", "merges.txt")


@dataclass(frozen=True)
class Request:
    """What is exported, and where to.

    Attributes:
        run: the run's folder.
        output: a folder, or with `gguf` alone a file; by default one in outputs/.
        checkpoint: the checkpoint of the adapter; by default the newest.
        gguf: one of OTHER_CALLS, to write a GGUF file.
        adapter_only: without the base.
        ollama: write a folder with a GGUF file (by default f16) and a Modelfile for Ollama.
        questions: how many of each split are asked to check it, by default 5.
        push: OWNER/NAME on the Hugging Face hub, for `push`.
    """

    run: Path
    output: Path | None = None
    checkpoint: str | None = None
    gguf: str | None = None
    adapter_only: bool = False
    ollama: bool = False
    push: str | None = None
    questions: int | None = None

    @property
    def target(self) -> Path:
        """The file or folder to write."""
        if self.output:
            return self.output
        if self.ollama:
            return Path("outputs/ollama")
        default = "outputs/adapter" if self.adapter_only else "outputs/merged_model"
        return Path(f"{default}.gguf" if self.gguf else default)

    def command(self, **changes: Any) -> str:
        """Return the command for this request, with some of its attributes changed."""
        new = replace(self, **changes)
        words: list[object] = ["export", new.run]
        words += ["--adapter-only"] * new.adapter_only + ["--ollama"] * new.ollama
        for name in ("checkpoint", "gguf", "questions", "push", "output"):
            if value := getattr(new, name):
                words += [f"--{name}", value]
        return advice(*words)


def export(request: Request, progress: Progress = lambda step, fraction: None) -> str:
    """Export a run's adapter into the request's target, which appears only once it is complete and checked.

    Args:
        request: what is exported.
        progress: receives the fraction of the questions that a GGUF file has answered.

    Returns:
        A message on how it was checked.

    Raises McpLoraError if the run has no adapter, its base was quantized and is to be merged, the target
    exists, or the engine or a converter fails; with exit code 1 if what is exported is not equivalent.
    """
    api.require()
    adapter, target = runs.adapter(request.run, request.checkpoint), request.target
    other = request.command(output=Path("OTHER"))
    if runs.is_quantized(request.run) and not request.adapter_only:
        what = f"{request.run} was trained on a quantized base, and merging into it loses precision"
        raise McpLoraError(f"{what}: {request.command(adapter_only=True, ollama=False)}")
    if request.ollama and request.adapter_only:
        raise McpLoraError(f"Ollama serves a merged model: {request.command(adapter_only=False)}")
    with explained(f"{target.parent} cannot be written", other):
        target.parent.mkdir(parents=True, exist_ok=True)
        problem = f"{target} is in use by another mcp-lora export: {other}"
        lock = files.exclusive(target.parent / f".{target.name}.lock", problem)
    with lock:
        if target.exists():
            raise McpLoraError(f"{target} exists: {other}")
        if request.push:
            with _hub(request.push, request.command()) as hub:
                hub.whoami()
        if request.ollama:
            check_ollama(request.run, request.command(ollama=False, gguf="f16"))
        template = chat_template.load(runs.read_run(request.run))
        if request.gguf or request.ollama:
            llama_cpp.require()
            llama_cpp.converters()
        new = target.with_name(f".{target.name}.new")
        shutil.rmtree(new, ignore_errors=True)  # left by an export that was killed
        try:
            new.mkdir()
            made, note = _make(request, adapter, template, new, progress)
            made.rename(target)
        finally:
            shutil.rmtree(new, ignore_errors=True)
    return note


def _make(
    request: Request, adapter: Path, template: ChatTemplate, new: Path, progress: Progress
) -> tuple[Path, str]:
    """Make what is exported in a new folder, and check it; return its path and how it was checked."""
    run, again, dtype = request.run, request.command(), ""
    folder, file = new / "model", new / "model.gguf"
    asked = evaluation.Request(run, limit=request.questions or 5)
    if request.adapter_only:
        copy_adapter(adapter, folder)
        note = "the adapter as it was trained"
    else:
        found = _merge(run, adapter, folder, again)
        note, dtype = str(found), found.dtype
    complete(folder, template, request.ollama)
    (folder / "README.md").write_text(model_card(run, adapter, _serving(request, adapter)), encoding="utf-8")
    if kind := request.gguf or ("f16" if request.ollama else None):
        answers = by_llama_cpp(template, _convert(request, template, folder, file, kind), progress)
        expected = by_engine(run, template, adapter, again)
        exact = request.command(gguf="f32")
        compared = check_answers(asked, template, expected, answers, exact, OTHER_CALLS[kind])
        note = f"the same prompts as in training; {compared}"
    elif not request.adapter_only and is_slow(str(runs.read_run(run)["model_name_or_path"]), dtype):
        note += "; warning: its answers are not compared, as that would take long without a GPU"
    elif not request.adapter_only:
        answers = by_engine(run, template, None, again, dtype, folder)
        expected = by_engine(run, template, adapter, again, dtype)
        alone = request.command(adapter_only=True)
        note += f"; {check_answers(asked, template, expected, answers, alone, OTHER_CALLS['bf16'])}"
    if request.ollama:
        made = new / "ollama"
        made.mkdir()
        file.rename(made / "model.gguf")
        (folder / "README.md").rename(made / "README.md")
        (made / "Modelfile").write_text(modelfile(template), encoding="utf-8")
        return made, note
    return file if kind else folder, note


def _serving(request: Request, adapter: Path) -> str:
    """Return the command that serves what is exported, in its folder."""
    if request.ollama:
        return "ollama create mcp-lora --file Modelfile"
    if request.gguf:
        base = ["BASE.gguf", "--lora"] * request.adapter_only
        return shlex.join(["llama-server", "--jinja", "--model", *base, request.target.name])
    with suppress(McpLoraError):  # vLLM has no parser for its calls, or rejects the adapter
        config, words = runs.read_run(request.run), ["."]
        if request.adapter_only:
            words = ["BASE", *lora_options(adapter)[:-1], "mcp-lora=.", "--generation-config", "."]
        words += ["--chat-template", runs.CHAT_TEMPLATE, "--enable-auto-tool-choice"]
        words += ["--trust-remote-code"] * bool(config.get("trust_remote_code"))
        words += ["--tool-call-parser", parser(chat_template.load(config))[0]]
        return shlex.join(["vllm", "serve", *words])
    return "mcp-lora serve ."


def _convert(
    request: Request, template: ChatTemplate, folder: Path, file: Path, kind: str
) -> tuple[Path, Path | None, str | None]:
    """Write a model's or an adapter's folder as a GGUF file.

    Returns:
        What llama.cpp serves to check it: a model, and an adapter and a chat template that are not in it.
    """
    if not request.adapter_only:
        llama_cpp.convert(folder, file, kind)
        return file, None, None
    source, base = chat_template.model_folder(runs.read_run(request.run)), file.with_name("base.gguf")
    llama_cpp.convert(folder, file, kind, source)
    llama_cpp.convert(source, base, kind)
    return base, file, template.frozen()


def push(request: Request) -> str:
    """Upload what was exported to the Hugging Face hub, into a repository of one's own or a new private one.

    Returns the repository's address. Raises McpLoraError if the hub rejects it or cannot be reached.
    """
    name, exported = str(request.push), request.target
    with _hub(name, shlex.join(["hf", "upload", "--private", name, str(exported)])) as hub:
        address = str(hub.create_repo(name, private=True, exist_ok=True))
        if exported.is_dir():
            hub.upload_folder(repo_id=name, folder_path=exported)
        else:
            hub.upload_file(repo_id=name, path_or_fileobj=exported, path_in_repo=exported.name)
            adapter = runs.adapter(request.run, request.checkpoint)
            card = model_card(request.run, adapter, _serving(request, adapter))
            hub.upload_file(repo_id=name, path_or_fileobj=card.encode(), path_in_repo="README.md")
    return address


@contextmanager
def _hub(name: str, again: str) -> Iterator[Any]:
    """Yield the hub; raise McpLoraError if a repository's name is invalid, or the hub rejects something."""
    import httpx
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
        yield HfApi()
    except HFValidationError as error:
        raise McpLoraError(f"{one_line(error)}: mcp-lora export --push OWNER/NAME") from None
    except (HfHubHTTPError, LocalTokenNotFoundError, OSError, httpx.HTTPError) as error:
        what = f"{name} cannot be written on the hub ({one_line(error)})"
        raise McpLoraError(f"{what}: hf auth login, and {again}") from None


def copy_adapter(adapter: Path, folder: Path) -> None:
    """Copy an adapter and its tokenizer, without checkpoints and optimizer states, into a new folder."""
    folder.mkdir()
    for name in _ADAPTER:
        for file in adapter.glob(name):
            shutil.copy(file, folder)


def _merge(run: Path, adapter: Path, folder: Path, again: str) -> Comparison:
    """Let the engine merge an adapter into its base; return how the two compare."""
    settings = runs.serving_config(run, adapter) | {"export_dir": str(folder), "export_size": 1}
    settings |= {"template": render.TEMPLATE}  # which keeps the tokenizer's chat template
    gpus = detect_machine().gpus
    environment = launch.engine_environment(settings, Topology(gpus or 1), gpus, os.environ)
    outcome = launch.run_engine("export", settings, environment)
    if outcome.code:
        raise outcome.error(again)
    # the engine's supports no tools, and uses the engine's template
    (folder / "Modelfile").unlink(missing_ok=True)
    found = compare(settings, adapter, folder)
    if found.difference > found.tolerance:
        raise McpLoraError(f"the merged model is not equivalent, nothing is exported ({found})", code=1)
    return found
