"""The checks of mcp-lora doctor, one line each."""

import contextlib
import importlib
import importlib.metadata
import io
import os
import platform
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from packaging.requirements import Requirement
from packaging.version import Version

from mcp_lora import demo_model
from mcp_lora.data import conversion, dataset
from mcp_lora.engine import launch
from mcp_lora.engine.api import number
from mcp_lora.errors import McpLoraError, one_line
from mcp_lora.prompts import chat_template
from mcp_lora.train import manifest, memory, training
from mcp_lora.train.machine import Machine
from mcp_lora.train.recipe import missing_model

_ROOM = 20e9  # bytes: a 7B model's weights in bf16, and some checkpoints
_SHARED = 1e9  # bytes; NCCL takes some 10 MB for each pair of GPUs, and data loaders pass batches there


@dataclass(frozen=True)
class Finding:
    """What was checked, the verdict, and what to do if there is a problem."""

    what: str
    verdict: Literal["ok", "warning", "problem"]
    words: str


def examine(config: Mapping[str, Any], machine: Machine) -> Iterator[Finding]:
    """Check everything that a training with this configuration requires; nothing is fetched or written."""
    yield from _packages()
    yield from _machine(machine)
    yield _disk({**config, **demo_model.located(config, fetch=False)})
    if problems := training.settings_problems(config):
        yield Finding("recipe", "problem", f"{'; '.join(problems)}: fix it")
    else:
        yield Finding("recipe", "ok", f"{len(config)} valid LLaMA-Factory settings")
        yield from _model(config)
    yield _data(Path(str(config.get("dataset_dir") or dataset.FOLDER)))


def _packages() -> Iterator[Finding]:
    required = importlib.metadata.metadata("mcp-lora")["Requires-Python"]
    yield Finding("Python", "ok", f"{platform.python_version()} ({required})")
    for line in importlib.metadata.requires("mcp-lora") or []:
        requirement = Requirement(line)
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        name, tested = requirement.name, requirement.specifier
        again = f"pip install '{name}{tested}'"
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield Finding(name, "problem", f"is not installed: {again}")
            continue
        if tested.contains(version, prereleases=True):
            yield Finding(name, "ok", f"{version} ({tested})")
        else:
            yield Finding(name, "problem", f"{version}, tested {tested}: {again}")
    folder = Path(sys.executable).parent
    for name in ("llamafactory-cli", "torchrun"):
        found = shutil.which(name, path=str(folder))
        yield Finding(name, "ok" if found else "problem", found or f"is not in {folder}: pip install -e .")


def _machine(machine: Machine) -> Iterator[Finding]:
    import torch

    driver = re.search(r"CUDA Version: ([\d.]+)", launch.output(["nvidia-smi"]) or "")
    built = torch.version.cuda
    if not machine.gpus and driver and not built:
        words = f"torch {torch.__version__} is built for the CPU: install the build for CUDA (pytorch.org)"
        yield Finding("GPU", "problem", words)
    elif not machine.gpus and driver and Version(driver[1]).major < Version(str(built)).major:
        words = (
            f"the driver supports CUDA {driver[1]}, torch is built for {built}: update the driver, or install"
        )
        yield Finding("GPU", "problem", f"{words} torch for CUDA {driver[1]} (pytorch.org)")
    elif not machine.gpus:
        yield Finding("GPU", "warning", "none is visible, only small models can be trained: nvidia-smi")
    for device in range(machine.gpus):
        free, total = torch.cuda.mem_get_info(device)
        words = f"{torch.cuda.get_device_name(device)}, {free / 1e9:.0f} of {total / 1e9:.0f} GB free"
        if free > 0.9 * total:
            yield Finding(f"GPU {device}", "ok", words)
        else:
            yield Finding(f"GPU {device}", "warning", f"{words}, in use by other processes: nvidia-smi")
    if machine.gpus > 1 or os.environ.get("NNODES", "1") != "1":
        yield _network()
        yield _shared_memory()
    lower = f"no, training is in {'fp16' if machine.gpus else 'fp32'}"
    yield Finding("bf16", "ok", "yes" if machine.bf16 else lower)
    if machine.deepspeed:
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # it logs accelerators to stdout
                importlib.import_module("deepspeed")
            yield Finding("DeepSpeed", "ok", "can be imported")
        except Exception as error:  # it compiles and looks for compilers on import
            yield Finding("DeepSpeed", "problem", f"{one_line(error)}: or train without it: deepspeed=null")


def _network() -> Finding:
    """Check the network interface that NCCL connects nodes with."""
    import psutil

    up = [name for name, state in psutil.net_if_stats().items() if state.isup]
    named = os.environ.get("NCCL_SOCKET_IFNAME", "")
    wanted = [name for name in named.lstrip("=").split(",") if name]
    if not named or named.startswith("^"):
        return Finding(
            "NCCL", "ok", f"chooses from {', '.join(up) or 'no interface'}, else NCCL_SOCKET_IFNAME"
        )
    if any(name.startswith(tuple(wanted)) for name in up):  # NCCL takes the words for prefixes
        return Finding("NCCL", "ok", f"uses {named}")
    words = f"NCCL_SOCKET_IFNAME={named}, but the interfaces are {', '.join(up)}: export another, or unset it"
    return Finding("NCCL", "problem", words)


def _shared_memory() -> Finding:
    """Check the memory that the processes of a training share, 64 MB in a container by default."""
    folder = "/dev/shm"
    if not os.path.isdir(folder):
        return Finding(folder, "warning", "is not there, NCCL needs it on Linux")
    size = shutil.disk_usage(folder).total
    if size < _SHARED:
        words = f"{size / 1e6:.0f} MB, several GPUs need more: docker run --ipc=host, or --shm-size=8g"
        return Finding(folder, "problem", words)
    return Finding(folder, "ok", f"{size / 1e9:.0f} GB")


def _disk(config: Mapping[str, Any]) -> Finding:
    output = Path(str(config.get("output_dir") or "."))
    there = next(folder for folder in (output, *output.absolute().parents) if folder.exists())
    if not os.access(there, os.W_OK):
        return Finding("disk", "problem", f"{there} cannot be written: mcp-lora train --output FOLDER")
    free = shutil.disk_usage(there).free
    words, needed = f"{free / 1e9:.0f} GB free in {there}", _ROOM
    with contextlib.suppress(Exception):  # building an unusual model may raise any exception
        if found := memory.estimate(config, 1):
            kept = int(number(config, "save_total_limit", 100)) + 2  # the one being written, and the adapter
            needed = kept * 12 * found.trained  # fp32 weights and AdamW's two moments
            words += f", {kept - 2} checkpoints take up to {needed / 1e9:.1f} GB"
    if free < needed:
        return Finding("disk", "warning", f"{words}, too little: df -h, or save_total_limit=1")
    return Finding("disk", "ok", words)


def _model(config: Mapping[str, Any]) -> Iterator[Finding]:
    config = {**config, **demo_model.located(config, fetch=False)}
    model = str(config.get("model_name_or_path"))
    is_there = Path(model).is_dir() or manifest.cached(config, "tokenizer_config.json")
    if model != str(demo_model.folder()) and (missing := missing_model(model)):
        yield Finding("model", "problem", f"{missing}: mcp-lora doctor --model FOLDER")
    elif not is_there:
        yield Finding("model", "warning", f"{model} is not on this machine, training fetches it")
    else:
        yield Finding("model", "ok", model)
        yield _template(config)


def _template(config: Mapping[str, Any]) -> Finding:
    """Check which chat template is used, and whether generation stops where its answers end."""
    try:
        template = chat_template.load(config, local_files_only=True)
    except McpLoraError as error:
        return Finding("chat template", "problem", str(error))
    ends, eos = sorted({*template.ends.values()}), template.tokenizer.eos_token
    words = f"{template.note}; an answer ends with {' or '.join(ends)}"
    if not template.is_own:
        return Finding("chat template", "warning", f"{words}; serve it with the adapter")
    if ends != [eos]:
        words += f", eos is {eos}: a server requires both, in generation_config.json"
    return Finding("chat template", "ok" if ends == [eos] else "warning", words)


def _data(folder: Path) -> Finding:
    try:
        if not dataset.statistics(folder):
            return Finding("data", "warning", f"{folder} contains none: mcp-lora convert")
        if not conversion.is_up_to_date(folder):
            return Finding("data", "warning", f"the inputs of {folder} have changed: mcp-lora convert")
    except McpLoraError as error:
        return Finding("data", "problem", str(error))
    return Finding("data", "ok", f"{folder} is converted and up to date")
