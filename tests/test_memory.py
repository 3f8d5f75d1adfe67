from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT

from mcp_lora import memory

CONFIG = {
    "lora_rank": 64,
    "lora_alpha": 128,
    "lora_target": "all",
    "per_device_train_batch_size": 2,
    "cutoff_len": 256,
    "bf16": True,
}


def estimated(model: Path, processes: int = 1, **changes: Any) -> memory.Estimate:
    found = memory.estimate(CONFIG | {"model_name_or_path": str(model)} | changes, processes)
    assert found
    return found


def adapted(model: Path) -> Any:
    """The real model with PEFT's adapter as LLaMA-Factory makes it."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    lora = LoraConfig(r=64, lora_alpha=128, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(base, lora).train()


def test_parameters_and_the_file_are_exact(tiny_model: Path, tmp_path: Path) -> None:
    model = adapted(tiny_model)
    model.save_pretrained(tmp_path)
    trained, total = model.get_nb_trainable_parameters()
    found = estimated(tiny_model)
    assert (found.trained, found.base) == (trained, total - trained)
    assert found.file == (tmp_path / "adapter_model.safetensors").stat().st_size
    assert found.weights == 2 * found.base and found.adapter == 16 * found.trained


@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_are_what_torch_keeps(tiny_model: Path, checkpointing: bool) -> None:
    model = adapted(tiny_model)
    model.enable_input_require_grads()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    kept = memory.saved_bytes(model, 2, 256)
    found = estimated(tiny_model, disable_gradient_checkpointing=not checkpointing)
    if checkpointing:  # and one layer at a time, which comes when it is computed again
        whole = estimated(tiny_model, disable_gradient_checkpointing=True).activations
        assert kept < found.activations < whole
        assert found.activations - kept == pytest.approx(whole / 2, rel=0.1)
    else:
        assert found.activations == pytest.approx(kept, rel=0.05)


def test_what_divides_and_what_grows(tiny_model: Path) -> None:
    one = estimated(tiny_model)
    twice = estimated(tiny_model, per_device_train_batch_size=4)
    assert twice.logits == 2 * one.logits and twice.activations == pytest.approx(
        2 * one.activations, rel=0.01
    )
    assert one.logits == 2 * 256 * 12 * _words(tiny_model)
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


def test_a_model_that_is_not_here_has_no_estimate() -> None:
    assert memory.estimate({"model_name_or_path": "org/unknown"}, 1) is None


def _words(model: Path) -> int:
    from transformers import AutoConfig

    return int(AutoConfig.from_pretrained(model).vocab_size)
