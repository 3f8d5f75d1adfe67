"""Export a run's adapter: merged, by itself, as GGUF or for Ollama."""

import os
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

from mcp_lora.engine import api, launch
from mcp_lora.engine.topology import Topology
from mcp_lora.errors import McpLoraError, explained, one_line
from mcp_lora.prompts import chat_template, render
from mcp_lora.serve import llama_cpp
from mcp_lora.serve.card import check_ollama, complete, model_card, modelfile
from mcp_lora.serve.verify import (
    OTHER_CALLS,
    Comparison,
    by_llama_cpp,
    check_answers,
    check_merged,
    compare,
    is_slow,
)
from mcp_lora.train import runs
from mcp_lora.train.machine import detect_machine

_ADAPTER = ("adapter_*", "tokenizer*", "*.jinja", "special_tokens_map.json", "vocab.*", "merges.txt")


def export(
    run: Path,
    output: Path,
    checkpoint: str | None = None,
    gguf: str | None = None,
    adapter_only: bool = False,
    ollama: bool = False,
    progress: Callable[[str, float], None] = lambda step, fraction: None,
) -> str:
    """Export a run's adapter into `output`, which appears only once it is complete and checked.

    Args:
        run: the run's folder.
        output: a folder, or with `gguf` alone a file.
        checkpoint: the checkpoint of the adapter; by default the newest.
        gguf: one of OTHER_CALLS, to write a GGUF file.
        adapter_only: without the base.
        ollama: write a folder with a GGUF file (by default f16) and a Modelfile for Ollama.
        progress: receives the fraction of the questions that a GGUF file has answered.

    Returns:
        A message on how it was checked.

    Raises McpLoraError if the run has no adapter, its base was quantized and is to be merged, `output`
    exists, or the engine or a converter fails; with exit code 1 if what is exported is not equivalent.
    """
    api.require()
    adapter = runs.adapter(run, checkpoint)
    words = ["--ollama"] * ollama
    again = shlex.join(["mcp-lora", "export", str(run), *words, "--output", "OTHER"])
    if runs.is_quantized(run) and not adapter_only:
        why = "was trained on a quantized base, and merging into it loses precision"
        raise McpLoraError(f"{run} {why}: mcp-lora export {run} --adapter-only")
    if output.exists():
        raise McpLoraError(f"{output} exists: {again}")
    config = runs.read_run(run)
    if ollama:
        check_ollama(run, adapter_only)
    template = chat_template.load(config)
    gguf = gguf or ("f16" if ollama else None)
    if gguf:
        llama_cpp.require()
        llama_cpp.converters()
    new = output.with_name(f".{output.name}.new")
    shutil.rmtree(new, ignore_errors=True)  # left by an export that was killed
    try:
        with explained(f"{output.parent} cannot be written", again):
            new.mkdir(parents=True)
        folder, file, base = new / "model", new / "model.gguf", new / "base.gguf"
        dtype = ""
        if adapter_only:
            copy_adapter(adapter, folder)
            note = "the adapter as it was trained"
        else:
            found = _merge(run, adapter, folder)
            note, dtype = str(found), found.dtype
        complete(folder, template, ollama)
        (folder / "README.md").write_text(model_card(run, adapter), encoding="utf-8")
        if gguf:
            if adapter_only:
                source = chat_template.model_folder(config)
                llama_cpp.convert_adapter(folder, source, file, gguf)
                llama_cpp.convert(source, base, gguf)
            else:
                llama_cpp.convert(folder, file, gguf)
            served = (base, file, template.frozen()) if adapter_only else (file, None, None)
            answers = by_llama_cpp(template, served, progress)
            exact = f"mcp-lora export {run} --gguf f32"
            compared = check_answers(run, adapter, template, answers, exact, OTHER_CALLS[gguf])
            note = f"the same prompts as in training; {compared}"
        elif not adapter_only and is_slow(str(config["model_name_or_path"]), dtype):
            note += "; warning: its answers are not compared, as that would take long without a GPU"
        elif not adapter_only:
            note += f"; {check_merged(run, adapter, template, folder, dtype)}"
        made = file if gguf else folder
        if ollama:
            made = new / "ollama"
            made.mkdir()
            file.rename(made / "model.gguf")
            (folder / "README.md").rename(made / "README.md")
            (made / "Modelfile").write_text(modelfile(template), encoding="utf-8")
        made.rename(output)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    return note


def push(name: str, exported: Path | None = None, card: str = "") -> str:
    """Create a private repository on the Hugging Face hub, or use one's own, and upload what was exported.

    Args:
        name: OWNER/NAME.
        exported: a folder, or a file that `card` describes; without it nothing is uploaded yet.
        card: the model card of a file.

    Returns:
        The repository's address. Raises McpLoraError if the hub rejects it or cannot be reached.
    """
    import httpx
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    hub = HfApi()
    try:
        address = str(hub.create_repo(name, private=True, exist_ok=True))
        if exported and exported.is_dir():
            hub.upload_folder(repo_id=name, folder_path=exported)
        elif exported:
            hub.upload_file(repo_id=name, path_or_fileobj=exported, path_in_repo=exported.name)
            hub.upload_file(repo_id=name, path_or_fileobj=card.encode(), path_in_repo="README.md")
    except (HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OSError, httpx.HTTPError) as error:
        what = f"{name} cannot be written on the hub ({one_line(error)})"
        again = f"hf upload {name} {exported}" if exported else "mcp-lora export --push OWNER/NAME"
        raise McpLoraError(f"{what}: hf auth login, and {again}") from None
    return address


def copy_adapter(adapter: Path, folder: Path) -> None:
    """Copy an adapter and its tokenizer, without checkpoints and optimizer states, into a new folder."""
    folder.mkdir()
    for name in _ADAPTER:
        for file in adapter.glob(name):
            shutil.copy(file, folder)


def _merge(run: Path, adapter: Path, folder: Path) -> Comparison:
    """Let the engine merge an adapter into its base; return how the two compare."""
    settings = runs.serving_config(run, adapter) | {"export_dir": str(folder), "export_size": 1}
    settings |= {"template": render.TEMPLATE}  # which keeps the tokenizer's chat template
    gpus = detect_machine().gpus
    environment = launch.engine_environment(settings, Topology(gpus or 1), gpus, os.environ)
    outcome = launch.run_engine("export", settings, environment)
    if outcome.code:
        raise outcome.error(f"mcp-lora export {run}")
    # the engine's supports no tools, and uses the engine's template
    (folder / "Modelfile").unlink(missing_ok=True)
    found = compare(settings, adapter, folder)
    if found.difference > found.tolerance:
        raise McpLoraError(f"the merged model is not equivalent, nothing is exported ({found})", code=1)
    return found
