"""What a training takes of a GPU's memory, part by part, before any weight is read.

The model is built of its config on PyTorch's meta device, which has shapes and no storage, with PEFT's
own adapter on it; so what is trained, and the file that it makes, are exact. Per GPU:

    weights      parameters of the base × 2 bytes, 4 in fp32 (0.52 where they are quantised to 4 bits: half
                 a byte and the scales); ZeRO-3 divides them among the processes
    adapter      16 bytes a parameter: itself, its gradient and AdamW's two moments, in fp32 (10 with
                 8-bit moments); ZeRO-2 divides all but itself, ZeRO-3 all
    activations  what autograd keeps for the backward pass, counted at two layers and at one and carried on
                 to all; with gradient checkpointing it keeps each layer's input, and one layer at a time
                 has its activations when it is computed again. Attention keeps its inputs, its output and
                 a number a row, as flash attention does
    logits       12 bytes for each token and word: in bf16, their log-softmax in fp32, the gradients of both;
                 as much without the first where all is in fp32;
                 none with liger's fused loss, which makes them a piece at a time

Not counted: CUDA's own (about 1 GB), fragments, the buffers of DeepSpeed and NCCL. No GPU was at hand to
measure against; the activations are what PyTorch counts on the CPU (tests/test_memory.py).
"""

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mcp_lora.config import read_config
from mcp_lora.engine import quiet

_BF16, _FP32, _FOUR_BITS = 2.0, 4.0, 0.52
_MOMENTS, _SMALL_MOMENTS = 8.0, 2.0
_LOGIT = 12.0  # bytes


@dataclass(frozen=True)
class Estimate:
    """A model's figures: parameters, and bytes per GPU.

    Attributes:
        base: parameters of the base model.
        trained: parameters of the adapter.
        file: bytes of its adapter_model.safetensors.
        weights, adapter, activations, logits: bytes per GPU, see above.
    """

    base: int
    trained: int
    file: int
    weights: float
    adapter: float
    activations: float
    logits: float

    @property
    def total(self) -> float:
        """Bytes per GPU."""
        return self.weights + self.adapter + self.activations + self.logits


def estimate(config: Mapping[str, Any], processes: int) -> Estimate | None:
    """Return what a configuration will take, None where the model's config cannot be had.

    Args:
        config: LLaMA-Factory's keys.
        processes: how many train.
    """
    from transformers import AutoConfig

    try:
        shape = AutoConfig.from_pretrained(
            str(config["model_name_or_path"]),
            trust_remote_code=bool(config.get("trust_remote_code")),
            local_files_only=True,
        )
    except (OSError, ValueError):
        return None
    model = _adapted(shape, config)
    trained, total = model.get_nb_trainable_parameters()
    zero = _zero_stage(config)
    quantised = config.get("quantization_bit") == 4
    linear = sum(
        module.base_layer.weight.numel() for module in model.modules() if hasattr(module, "base_layer")
    )
    size = _BF16 if config.get("bf16") or config.get("fp16") else _FP32
    weights = (total - trained - linear) * size + linear * (_FOUR_BITS if quantised else size)
    moments = _SMALL_MOMENTS if "8bit" in str(config.get("optim")) else _MOMENTS
    divided = (_FP32 + moments) / (processes if zero >= 2 else 1)
    own = _FP32 / (processes if zero == 3 else 1)
    text = shape.get_text_config()
    batch = int(config.get("per_device_train_batch_size") or 8)
    tokens = batch * int(config.get("cutoff_len") or 2048)
    return Estimate(
        base=total - trained,
        trained=trained,
        file=_file_size(model),
        weights=weights / (processes if zero == 3 else 1),
        adapter=trained * (own + divided),
        activations=_activations(shape, config, batch) * size / _BF16,
        logits=0.0 if config.get("enable_liger_kernel") else tokens * text.vocab_size * _LOGIT,
    )


def saved_bytes(model: Any, batch: int, length: int) -> int:
    """Return the bytes that autograd keeps of one forward pass through the decoder, weights left out.

    Args:
        model: a causal language model with an adapter, on any device.
        batch, length: shape of the input, (batch, length) token ids.
    """
    import torch

    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept: dict[int, Any] = {}

    def pack(tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage  # held, so that no other gets its address
        return tensor

    ids = torch.zeros(batch, length, dtype=torch.long, device=next(model.parameters()).device)
    decoder = model.get_base_model().model
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        decoder(input_ids=ids, use_cache=False)
    return sum(storage.nbytes() for storage in kept.values())


def _adapted(shape: Any, config: Mapping[str, Any], attention: str = "sdpa") -> Any:
    """Build a model on the meta device, with the adapter that the configuration says."""
    import torch
    from llamafactory.model.model_utils.misc import find_all_linear_modules
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shape, dtype=torch.bfloat16, attn_implementation=attention)
        target = config.get("lora_target") or "all"
        if target == "all":
            with quiet():
                target = find_all_linear_modules(model, freeze_vision_tower=True)
        elif isinstance(target, str):
            target = [name.strip() for name in target.split(",")]
        rank = int(config.get("lora_rank") or 8)
        lora = LoraConfig(
            r=rank,
            lora_alpha=int(config.get("lora_alpha") or 2 * rank),
            lora_dropout=float(config.get("lora_dropout") or 0),
            target_modules=target,
            task_type="CAUSAL_LM",
        )
        return get_peft_model(model, lora).train()


def _activations(shape: Any, config: Mapping[str, Any], batch: int) -> float:
    """Return the bytes of activations of a batch of the longest samples."""
    length = int(config.get("cutoff_len") or 2048)
    _let_attention_be_counted()

    def kept(layers: int, checkpointing: bool) -> int:
        small = copy.deepcopy(shape)
        small.get_text_config().num_hidden_layers = layers
        model = _adapted(small, config, attention=_ATTENTION)
        model.enable_input_require_grads()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        return saved_bytes(model, batch, length)

    layers: int = shape.get_text_config().num_hidden_layers
    one, two = kept(1, False), kept(2, False)
    if config.get("disable_gradient_checkpointing"):
        return one + (layers - 1) * (two - one)
    first, second = kept(1, True), kept(2, True)
    return first + (layers - 1) * (second - first) + (two - one)


_ATTENTION = "mcp_lora_counted"


def _let_attention_be_counted() -> None:
    """Register an attention for the meta device that keeps what flash attention keeps.

    PyTorch's own takes its simple way there, which keeps every pair of tokens; and for an attention that is
    not its own transformers makes no mask, for which values would have to be read.
    """
    import torch
    from transformers import AttentionInterface

    class Flash(torch.autograd.Function):  # type: ignore[misc]  # torch is not typed here
        @staticmethod
        def forward(ctx: Any, query: Any, key: Any, value: Any) -> Any:
            output = torch.empty_like(query)
            ctx.save_for_backward(query, key, value, output, query.new_empty(query.shape[:3]).float())
            return output

    def attend(module: Any, query: Any, key: Any, value: Any, *rest: Any, **options: Any) -> Any:
        return Flash.apply(query, key, value).transpose(1, 2), None

    AttentionInterface.register(_ATTENTION, attend)


def _file_size(model: Any) -> int:
    """Return the bytes of the adapter's safetensors file: 8, a header padded to 8 (JSON), fp32 numbers."""
    from peft import get_peft_model_state_dict

    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in sorted(get_peft_model_state_dict(model).items()):
        size = tensor.numel() * int(_FP32)
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [end, end + size]}
        end += size
    length = len(json.dumps(header, separators=(",", ":")))
    return 8 + -(-length // 8) * 8 + end


def _zero_stage(config: Mapping[str, Any]) -> int:
    file = config.get("deepspeed")
    if not file or not Path(str(file)).is_file():
        return 0
    return int(read_config(Path(str(file))).get("zero_optimization", {}).get("stage", 0))
