"""Is all well for a training? What mcp-lora doctor looks at, one line each."""

import contextlib
import importlib
import importlib.metadata
import io
import os
import platform
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from packaging.requirements import Requirement

from mcp_lora import dataset, training
from mcp_lora.config import Machine, missing_model
from mcp_lora.errors import McpLoraError
from mcp_lora.prompts import render

Verdict = Literal["ok", "warning", "problem"]
_ROOM = 20e9  # bytes: a 7B model's weights in bf16, and some checkpoints


@dataclass(frozen=True)
class Finding:
    """What was looked at, how it is, and what to do where it is not well."""

    what: str
    verdict: Verdict
    words: str


def examine(config: Mapping[str, Any], machine: Machine) -> Iterator[Finding]:
    """Look at everything that a training with this configuration needs; nothing is fetched or written."""
    yield from _packages()
    yield from _machine(machine)
    yield from _programs()
    yield _disk(Path(str(config.get("output_dir") or ".")))
    problems = training.settings_problems(dict(config))
    words = "; ".join(problems) or f"{len(config)} settings that LLaMA-Factory knows"
    yield Finding("recipe", "problem" if problems else "ok", words + (": fix it" if problems else ""))
    if not problems:
        yield from _model(config)
    yield _data(Path(str(config.get("dataset_dir") or dataset.FOLDER)))


def _packages() -> Iterator[Finding]:
    version = platform.python_version()
    wanted = importlib.metadata.metadata("mcp-lora")["Requires-Python"]
    yield Finding("Python", "ok", f"{version} ({wanted})")
    for line in importlib.metadata.requires("mcp-lora") or []:
        requirement = Requirement(line)
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        install = f"pip install '{requirement.name}{requirement.specifier}'"
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            yield Finding(requirement.name, "problem", f"is not installed: {install}")
            continue
        if requirement.specifier.contains(version, prereleases=True):
            yield Finding(requirement.name, "ok", f"{version} ({requirement.specifier})")
        else:
            yield Finding(
                requirement.name, "problem", f"{version}, tested {requirement.specifier}: {install}"
            )


def _machine(machine: Machine) -> Iterator[Finding]:
    import torch

    if not machine.gpus:
        yield Finding("GPU", "warning", "none is visible, only small models train: nvidia-smi")
    for number in range(machine.gpus):
        name = torch.cuda.get_device_name(number)
        free, total = torch.cuda.mem_get_info(number)
        verdict: Verdict = "ok" if free > 0.9 * total else "warning"
        rest = "" if verdict == "ok" else ", others use it: nvidia-smi"
        yield Finding(
            f"GPU {number}", verdict, f"{name}, {free / 1e9:.0f} of {total / 1e9:.0f} GB free{rest}"
        )
    what = "fp16" if machine.gpus else "fp32"
    yield Finding("bf16", "ok", "yes" if machine.bf16 else f"no, training is in {what}")
    if machine.deepspeed:
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # it tells of accelerators there
                importlib.import_module("deepspeed")
            yield Finding("DeepSpeed", "ok", "can be imported")
        except Exception as error:  # it compiles and looks for compilers on import
            reason = " ".join(str(error).split())
            yield Finding("DeepSpeed", "problem", f"{reason}: or train without it: deepspeed=null")


def _programs() -> Iterator[Finding]:
    folder = Path(sys.executable).parent
    for name in ("llamafactory-cli", "torchrun"):
        found = shutil.which(name, path=str(folder))
        words = found or f"is not in {folder}: pip install -e ."
        yield Finding(name, "ok" if found else "problem", words)


def _disk(output: Path) -> Finding:
    there = next(folder for folder in (output, *output.absolute().parents) if folder.exists())
    if not os.access(there, os.W_OK):
        return Finding("disk", "problem", f"{there} cannot be written: mcp-lora train --output FOLDER")
    free = shutil.disk_usage(there).free
    words = f"{free / 1e9:.0f} GB free in {there}"
    if free < _ROOM:
        return Finding("disk", "warning", f"{words}, little for weights and checkpoints: df -h")
    return Finding("disk", "ok", words)


def _model(config: Mapping[str, Any]) -> Iterator[Finding]:
    model = str(config.get("model_name_or_path"))
    if missing := missing_model(model):
        yield Finding("model", "problem", f"{missing}: mcp-lora doctor --model FOLDER")
        return
    from transformers import AutoTokenizer

    try:
        AutoTokenizer.from_pretrained(model, **render.hub_arguments(config), local_files_only=True)
    except (OSError, ValueError) as error:
        if Path(model).is_dir():
            reason = str(error).split("\n")[0]
            yield Finding("model", "problem", f"no tokenizer in {model} ({reason}): copy the whole model")
        else:
            yield Finding("model", "warning", f"{model} is not here yet, training fetches it from the hub")
        return
    yield Finding("model", "ok", model)
    try:
        yield _template(render.load(config, local_files_only=True))
    except McpLoraError as error:
        yield Finding("chat template", "problem", str(error))


def _template(template: render.ChatTemplate) -> Finding:
    """See which chat template is trained, and whether its answers end with what ends the generation."""
    ends = " or ".join(sorted({*template.ends.values()}))
    words = f"{template.note}; an answer ends with {ends}"
    if not template.is_own:
        return Finding("chat template", "warning", f"{words}; serve it with the adapter")
    eos = template.tokenizer.eos_token
    if {*template.ends.values()} != {eos}:
        words += f", eos is {eos}: a server needs both, in generation_config.json"
        return Finding("chat template", "warning", words)
    return Finding("chat template", "ok", words)


def _data(folder: Path) -> Finding:
    try:
        if not dataset.statistics(folder):
            return Finding("data", "warning", f"{folder} holds none yet: mcp-lora convert")
        if not dataset.is_up_to_date(folder):
            return Finding("data", "warning", f"the inputs of {folder} have changed: mcp-lora convert")
    except McpLoraError as error:
        return Finding("data", "problem", str(error))
    return Finding("data", "ok", f"{folder} is converted and up to date")
