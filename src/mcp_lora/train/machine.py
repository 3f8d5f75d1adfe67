"""This machine, and how a configuration is adapted to it."""

import importlib.util
import os
import re
import sys
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from mcp_lora.engine.api import number
from mcp_lora.errors import McpLoraError

DEMO = "mcp-lora demo"
# Even the embedded model, with 0.135 billion, trains at about 280 tokens per second on two cores, and
# the time is proportional to the number of parameters.
CPU_PARAMETERS = 2e9


@dataclass(frozen=True)
class Machine:
    """What decides how a configuration can run: CUDA devices, bf16, installed packages.

    `memory` has the bytes of each GPU, in the order in which they are used.
    """

    gpus: int
    bf16: bool
    deepspeed: bool
    flash_attention: bool = False
    liger: bool = False
    memory: tuple[float, ...] = ()


def detect_machine(imagined: int | None = None, memory: float | None = None) -> Machine:
    """Inspect this machine; a dry run may assume `imagined` GPUs, which are taken to support bf16.

    `memory` is assumed of each of them, in bytes.

    On a CPU bf16 counts only if the processor supports it natively. Else PyTorch emulates it: on two AVX2
    cores `a @ b.T`, (2048, 576) by (1536, 576), ran at 20 GFLOP/s in bf16 and at 143 in fp32.
    """
    import torch

    gpus = count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if imagined and imagined > gpus:
        gpus, bf16 = imagined, True
    elif gpus:
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    found = (memory,) * gpus if memory else ()
    if not memory and gpus == count:
        found = tuple(torch.cuda.get_device_properties(one).total_memory for one in range(count))
    packages = ("deepspeed", "flash_attn", "liger_kernel")
    deepspeed, flash, liger = (importlib.util.find_spec(package) is not None for package in packages)
    return Machine(gpus, bf16, deepspeed, flash, liger, found)


def fitted(
    config: Mapping[str, Any], machine: Machine, given: Collection[str]
) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield the changes that fit a configuration to the machine, each with a message; `given` keys stay.

    By default the engine uses neither flash attention (which, like bf16, requires Ampere or later) nor liger
    kernels. On a CPU one sample at a time keeps the cores busy and needs no padding; the global batch size
    stays. PyTorch samples dropout masks on one core: 0.7 of 3.3 s for a sample of SmolLM2, at 0.1.
    DeepSpeed's stage 0 shards nothing, and learns less in bf16, as it casts the adapter and starts with an
    empty step of AdamW (its fp16/unfused_optimizer.py): after 5 steps of SmolLM2 the held-out loss was 0.298
    with it and 0.282 without (tests/bench/test_train.py). Gradient checkpointing takes 20 to 30 % longer.
    """
    if config.get("bf16") and not machine.bf16:
        lower = {"fp16": True} if machine.gpus else {}
        yield {"bf16": False, **lower}, f"bf16 is not supported: training in {'fp16' if lower else 'fp32'}"
    if machine.gpus:
        if machine.flash_attention and machine.bf16 and "flash_attn" not in config:
            yield {"flash_attn": "fa2"}, "using flash attention (to disable: flash_attn=auto)"
        if machine.liger and "enable_liger_kernel" not in config:
            note = "using liger kernels, which store no logits (to disable: enable_liger_kernel=false)"
            yield {"enable_liger_kernel": True}, note
    else:
        apple = " (Apple's GPU is not used)" if sys.platform == "darwin" else ""
        yield {"use_cpu": True, "fp16": False}, f"no CUDA device{apple}: training on the CPU"
        if (key := "disable_gradient_checkpointing") not in config:
            yield {key: True}, f"no gradient checkpointing, which is slower (to enable: {key}=false)"
        per_device, accumulated = "per_device_train_batch_size", "gradient_accumulation_steps"
        size = number(config, per_device, 8)
        if size > 1 and not {per_device, accumulated} & {*given}:
            batch = int(size * number(config, accumulated, 1))
            note = f"one sample at a time, without padding (as on a GPU: {per_device}={size})"
            yield {per_device: 1, accumulated: batch}, note
        if (dropout := config.get("lora_dropout")) and "lora_dropout" not in given:
            note = f"no dropout, whose masks are slow on a CPU (as on a GPU: lora_dropout={dropout})"
            yield {"lora_dropout": 0.0}, note
        if Path(str(config.get("deepspeed"))).name == "ds_z0_config.json" and "deepspeed" not in given:
            yield {"deepspeed": None}, "no DeepSpeed, as stage 0 shards nothing (as on a GPU: --zero 0)"
    if os.name == "nt" and number(config, "preprocessing_num_workers", 1) > 1:
        yield {"preprocessing_num_workers": 1}, "one preprocessing worker, as Windows cannot fork"
    if config.get("deepspeed") and not machine.deepspeed:
        note = "DeepSpeed is not installed: training without it (stages 2 and 3 save memory)"
        yield {"deepspeed": None}, note


def too_big(model: str, machine: Machine) -> str | None:
    """Return a message if a model is too big to be trained without a GPU."""
    count = parameters(model)
    if machine.gpus or count is None or count <= CPU_PARAMETERS:
        return None
    size = f"{model} has {count / 1e9:.1f} billion parameters"
    return f"{size}, which would take weeks to train without a GPU. Try a small model first: {DEMO}"


def parameters(model: str) -> float | None:
    """Return a model's number of parameters: from its safetensors files, else from its name."""
    from safetensors import SafetensorError, safe_open

    folder, count = Path(os.path.expanduser(model)), 0
    for file in folder.glob("*.safetensors"):
        try:
            with safe_open(file, framework="np") as tensors:
                for name in tensors.keys():  # noqa: SIM118  # not a mapping
                    count += prod(tensors.get_slice(name).get_shape())
        except SafetensorError as error:
            raise McpLoraError(f"{file} is damaged ({error}): copy the model again") from None
    named = re.search(r"(\d+(?:\.\d+)?)b\b", folder.name.lower())
    return count or (float(named[1]) * 1e9 if named else None)
