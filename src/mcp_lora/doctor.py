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

from mcp_lora import dataset, engine, lengths
from mcp_lora.config import Machine, missing_model
from mcp_lora.errors import McpLoraError
from mcp_lora.records import Fault

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
    problems = engine.problems(dict(config))
    words = "; ".join(problems) or f"{len(config)} settings that LLaMA-Factory knows"
    yield Finding("recipe", "problem" if problems else "ok", words + (": mend it" if problems else ""))
    if not problems:
        yield from _model(config)
    yield _data(Path(str(config.get("dataset_dir") or dataset.FOLDER)), str(config.get("dataset")))


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
        AutoTokenizer.from_pretrained(
            model, trust_remote_code=bool(config.get("trust_remote_code")), local_files_only=True
        )
    except (OSError, ValueError) as error:
        if Path(model).is_dir():
            reason = str(error).split("\n")[0]
            yield Finding("model", "problem", f"no tokenizer in {model} ({reason}): copy the whole model")
        else:
            yield Finding("model", "warning", f"{model} is not here yet, training fetches it from the hub")
        return
    yield Finding("model", "ok", model)
    try:
        yield _stop_word(lengths.Lengths(lengths.budget(config)))
    except (McpLoraError, Fault) as error:
        yield Finding("template", "problem", str(error))


def _stop_word(counter: lengths.Lengths) -> Finding:
    """See whether an answer, as it is trained, ends with what ends the generation."""
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    trained = [
        token
        for token, is_trained in counter.encode({"conversations": turns, "system": "a", "tools": ""})
        if is_trained
    ]
    stops = counter.template.get_stop_token_ids(counter.tokenizer)
    end = counter.tokenizer.decode(trained[-2:])
    words = f"{counter.name}: an answer ends with {end!r}, eos is {counter.tokenizer.eos_token!r}"
    if counter.tokenizer.eos_token_id in trained[-2:]:
        return Finding("template", "ok", words)
    if set(trained[-2:]) & {*stops}:
        words += ", LLaMA-Factory stops there, and others do not know of it: set eos_token_id for them"
        return Finding("template", "warning", words)
    return Finding("template", "problem", f"{words}, generation would not stop: mcp-lora train template=NAME")


def _data(folder: Path, name: str) -> Finding:
    if name != dataset.TRAIN:
        return Finding("data", "ok", f"{name} in {folder}, which is not ours to look at")
    try:
        if not dataset.file_of(folder, name):
            return Finding("data", "warning", f"{folder} holds none yet: mcp-lora convert")
        newer = dataset.newer(folder)
    except McpLoraError as error:
        return Finding("data", "problem", str(error))
    if newer:
        return Finding("data", "warning", f"{newer[0]} is newer than what is in {folder}: mcp-lora convert")
    return Finding("data", "ok", f"{folder} is converted and up to date")
