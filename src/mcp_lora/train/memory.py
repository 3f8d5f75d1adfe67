"""Estimate how much GPU memory a training needs, without reading any weights.

Parameters are counted on PyTorch's meta device and are exact. The rest is an estimate for choosing a GPU,
in bytes per GPU:

    weights      2 per parameter of the base, 4 in fp32, 0.52 in 4 bits (with scales); ZeRO-3 shards them
    adapter      16 per trained parameter: fp32 weight 4, gradient 4, AdamW's two moments 8 (2 in 8 bits);
                 ZeRO-2 shards all but the weight, ZeRO-3 all
    activations  tokens × layers × (12h + 4q + 4k + 8f + c(5h + q + f)), where h is hidden_size, q and k the
                 widths of queries and keys, f intermediate_size; c is 2, or 3 with LoRA dropout (its mask).
                 With gradient checkpointing: tokens × 2h × layers, and one layer in full
    logits       12 per token and vocabulary entry: bf16, log-softmax in fp32, both gradients;
                 none with liger's fused loss

The activations are what transformers' Llama layer keeps for the backward pass under bf16 autocast with
flash attention (norms' inputs in fp32, linear layers' inputs, a copy of each for its lora_A), counted in
the manner of Korthikanti et al., "Reducing Activation Recomputation in Large Transformer Models"
(arXiv:2205.05198). Not counted: CUDA's context (about 1 GB), fragmentation, DeepSpeed's and NCCL's buffers.
"""

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mcp_lora.engine.api import number
from mcp_lora.prompts.chat_template import hub_arguments
from mcp_lora.train.recipe import ZERO, find, read_config

_SIZE = "per_device_train_batch_size"


@dataclass(frozen=True)
class Estimate:
    """Parameters of the base and of the adapter, which are exact, and estimated bytes per GPU.

    `experts` tells whether the model has experts without adapter: in transformers 5 those of one layer are a
    single parameter, and LLaMA-Factory adapts linear layers (its model/model_utils/misc.py).
    """

    base: int
    trained: int
    weights: float
    adapter: float
    activations: float
    logits: float
    experts: bool = False

    @property
    def total(self) -> float:
        """Bytes per GPU."""
        return self.weights + self.adapter + self.activations + self.logits

    def __str__(self) -> str:
        parts = ("weights", "adapter", "activations", "logits")
        text = " + ".join(f"{part} {getattr(self, part) / 1e9:.1f}" for part in parts)
        return f"{text} = about {self.total / 1e9:.1f}"


def usable(memory: float) -> float:
    """Return what a training may use of a GPU: 90 %, for fragmentation, without 1 GB of CUDA's context."""
    return 0.9 * memory - 1e9


def fit(config: Mapping[str, Any], processes: int, memory: float, longest: int) -> int | None:
    """Return the largest per-device batch size, halving a configuration's, that is estimated to fit.

    Args:
        config: in LLaMA-Factory's keys.
        processes: number of GPUs.
        memory: bytes of each.
        longest: tokens of the longest sample.

    Returns None if not even one sample fits, and the configuration's own size if there is no estimate.
    """
    size = most = int(number(config, _SIZE, 8))
    if not _is_modelled(config):
        return most
    with suppress(Exception):  # building an unusual model may raise any exception
        while size:
            found = estimate({**config, _SIZE: size, "cutoff_len": longest}, processes)
            if not found or found.total <= usable(memory):
                return size
            size //= 2
        return None
    return most


def _is_modelled(config: Mapping[str, Any]) -> bool:
    """Tell whether the estimate covers everything that a configuration does to memory."""
    sharding = zero(config)
    known = sharding is not None if config.get("deepspeed") else True
    offloads = any((sharding or {}).get(key) for key in ("offload_optimizer", "offload_param"))
    others = [config.get(key) for key in ("pure_bf16", "fsdp", "additional_target", "resize_vocab")]
    return known and not offloads and not any(others) and config.get("quantization_bit") in (None, 4)


def zero(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the `zero_optimization` of a configuration's DeepSpeed file; None if it has none."""
    deepspeed = Path(str(config.get("deepspeed"))[:200])
    return dict(read_config(deepspeed).get("zero_optimization", {})) if deepspeed.is_file() else None


def alternatives(config: Mapping[str, Any], processes: int, memory: float, longest: int) -> Iterator[str]:
    """Yield the changes that are estimated to make one sample fit, each with its GB per GPU."""
    quantized = {"quantization_bit": 4, "optim": "adamw_8bit", "deepspeed": None}  # as in qlora.yaml
    zero3 = {"deepspeed": str(find(ZERO.with_name(ZERO.name.replace("z0", "z3"))))}
    counts = [
        count
        for count in (2, 4, 8, 16)
        if count >= processes and config.get("deepspeed") != zero3["deepspeed"]
    ]
    shorter = [longest // 2, longest // 4]
    is_quantized = bool(config.get("quantization_bit"))
    ways: tuple[list[tuple[str, dict[str, Any], int]], ...] = (
        [] if is_quantized else [("--config qlora", quantized, processes)],
        [] if is_quantized else [(f"--zero 3 on {count} GPUs", zero3, count) for count in counts],
        [(f"cutoff_len={length}", {"cutoff_len": length}, processes) for length in shorter],
    )
    for kind in ways:
        for words, changes, count in kind:  # the smallest change of a kind
            found = estimate({**config, "cutoff_len": longest, **changes, _SIZE: 1}, count)
            if found and found.total <= usable(memory):
                yield f"{words} (about {found.total / 1e9:.1f} GB)"
                break


def estimate(config: Mapping[str, Any], processes: int) -> Estimate | None:
    """Estimate the memory of a configuration (LLaMA-Factory's keys) on each of `processes` GPUs.

    Returns None if the model's config.json is not on this machine. Building a model may raise any exception.
    """
    from transformers import AutoConfig

    model, hub = str(config["model_name_or_path"]), hub_arguments(config)
    try:
        shape = AutoConfig.from_pretrained(model, **hub, local_files_only=True)
    except (OSError, ValueError):
        return None
    base, trained, adapted = _parameters(shape, config)
    size = 2 if config.get("bf16") or config.get("fp16") else 4
    weights = (base - adapted) * size + adapted * (0.52 if config.get("quantization_bit") == 4 else size)
    moments = 2 if "8bit" in str(config.get("optim")) else 8
    stage = (zero(config) or {}).get("stage", 0)
    zero3, zero2 = (processes if stage >= most else 1 for most in (3, 2))
    text = shape.get_text_config()
    tokens = number(config, "per_device_train_batch_size", 8) * number(config, "cutoff_len", 2048)
    return Estimate(
        base=base,
        trained=trained,
        weights=weights / zero3,
        adapter=trained * (4 / zero3 + (4 + moments) / zero2),
        activations=tokens * _activations(text, config) * size / 2,
        logits=0.0 if config.get("enable_liger_kernel") else tokens * text.vocab_size * 12,
        experts=bool(getattr(text, "num_experts_per_tok", None)) and adapted < base / 2,
    )


def _parameters(shape: Any, config: Mapping[str, Any]) -> tuple[int, int, int]:
    """Count the parameters of the base, of its adapter, and of the layers that are adapted.

    With lora_target=all these are the linear layers of the language model, without its head.
    """
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shape)
    target = config.get("lora_target") or "all"
    names = tuple(f".{name.strip()}" for name in (target.split(",") if isinstance(target, str) else target))
    adapted = [
        layer
        for name, layer in model.get_decoder().named_modules()
        if isinstance(layer, torch.nn.Linear) and (target == "all" or f".{name}".endswith(names))
    ]
    rank = int(number(config, "lora_rank", 8))
    trained = sum(rank * (layer.in_features + layer.out_features) for layer in adapted)
    return model.num_parameters(), trained, sum(layer.weight.numel() for layer in adapted)


def _activations(text: Any, config: Mapping[str, Any]) -> int:
    """Return the bytes of activations per token, in bf16; `text` is the language model's config."""
    hidden, layers = text.hidden_size, text.num_hidden_layers
    inner = getattr(text, "moe_intermediate_size", None) or text.intermediate_size
    inner *= getattr(text, "num_experts_per_tok", None) or 1  # of a mixture of experts
    head = getattr(text, "head_dim", None) or hidden // text.num_attention_heads
    queries, keys = head * text.num_attention_heads, head * text.num_key_value_heads
    copies = (3 if config.get("lora_dropout") else 2) * (5 * hidden + queries + inner)
    layer = 12 * hidden + 4 * queries + 4 * keys + 8 * inner + copies
    kept = bool(config.get("disable_gradient_checkpointing"))
    return int(layers * layer if kept else layers * 2 * hidden + layer)
