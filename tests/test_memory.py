import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT

from mcp_lora.train import memory

CONFIG = {
    "lora_rank": 64,
    "lora_target": "all",
    "per_device_train_batch_size": 2,
    "cutoff_len": 256,
    "bf16": True,
}


def estimated(model: Path, processes: int = 1, **changes: Any) -> memory.Estimate:
    found = memory.estimate(CONFIG | {"model_name_or_path": str(model)} | changes, processes)
    assert found
    return found


def adapted(model: Path, target: Any = "all-linear") -> Any:
    """The real model with PEFT's adapter as LLaMA-Factory makes it."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    lora = LoraConfig(r=64, lora_alpha=128, target_modules=target, task_type="CAUSAL_LM")
    return get_peft_model(base, lora).train()


@pytest.mark.parametrize(
    ("setting", "target"),
    [("all", "all-linear"), ("q_proj, v_proj", ["q_proj", "v_proj"]), (["up_proj"],) * 2],
)
def test_parameters_are_exact(tiny_model: Path, setting: Any, target: Any) -> None:
    trained, total = adapted(tiny_model, target).get_nb_trainable_parameters()
    found = estimated(tiny_model, lora_target=setting)
    assert (found.trained, found.base) == (trained, total - trained)
    assert found.weights == 2 * found.base and found.adapter == 16 * found.trained


def test_what_is_sharded_and_what_grows(tiny_model: Path) -> None:
    one = estimated(tiny_model)
    twice = estimated(tiny_model, per_device_train_batch_size=4)
    assert (twice.logits, twice.activations) == (2 * one.logits, 2 * one.activations)
    vocabulary = json.loads((tiny_model / "config.json").read_text())["vocab_size"]
    assert one.logits == 2 * 256 * 12 * vocabulary
    second, third = (
        estimated(tiny_model, 4, deepspeed=str(ROOT / f"train_configs/ds_z{stage}_config.json"))
        for stage in (2, 3)
    )
    assert second.weights == one.weights and second.adapter == one.trained * (4 + 12 / 4)
    assert third.weights == one.weights / 4 and third.adapter == one.adapter / 4
    assert estimated(tiny_model, enable_liger_kernel=True).logits == 0
    full = estimated(tiny_model, bf16=False)
    assert (full.weights, full.activations) == (2 * one.weights, 2 * one.activations)
    four_bits = estimated(tiny_model, quantization_bit=4, optim="paged_adamw_8bit")
    assert four_bits.weights < one.weights and four_bits.adapter == 10 * one.trained


def test_activations_follow_the_formula(tiny_model: Path) -> None:
    # hidden 32, queries 32, keys 16, intermediate 64, 2 layers; 2 × 256 tokens
    layer = 12 * 32 + 4 * 32 + 4 * 16 + 8 * 64
    plain, masked = (layer + c * (5 * 32 + 32 + 64) for c in (2, 3))
    kept = {"disable_gradient_checkpointing": True}
    assert estimated(tiny_model, **kept).activations == 512 * 2 * plain
    assert estimated(tiny_model, lora_dropout=0.1, **kept).activations == 512 * 2 * masked
    assert estimated(tiny_model).activations == 512 * (2 * 2 * 32 + plain)


def test_activations_are_about_what_torch_keeps(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 256, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 2}
    shape = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
    LlamaForCausalLM(shape).save_pretrained(tmp_path)
    model = adapted(tmp_path)
    model.enable_input_require_grads()
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, Any] = {}

    def pack(tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    decoder = model.get_base_model().model
    with (
        torch.autocast("cpu", torch.bfloat16),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
    ):
        decoder(input_ids=torch.zeros(2, 256, dtype=torch.long), use_cache=False)
    seen = sum(storage.nbytes() for storage in kept.values())
    found = estimated(tmp_path, disable_gradient_checkpointing=True)
    # Weights that autocast has cast, and lora_A's outputs of rank 64, are large beside so small a model.
    assert found.activations == pytest.approx(seen, rel=0.3)


def test_a_model_that_is_not_here_has_no_estimate() -> None:
    assert memory.estimate({"model_name_or_path": "org/unknown"}, 1) is None
