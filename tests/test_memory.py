import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from test_readme import folder_of

from mcp_lora.errors import McpLoraError
from mcp_lora.train import manifest, memory, runs, steps, training
from mcp_lora.train.machine import Machine
from mcp_lora.train.manifest import Manifest
from mcp_lora.train.recipe import RECIPE, read_config

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


@pytest.mark.parametrize(
    "name, recipe, gpus, gigabytes, longest, size",
    [
        ("Qwen2.5-7B", "lora_config", 1, 80, 4096, 4),
        ("Qwen2.5-7B", "lora_config", 1, 80, 800, 16),
        ("Qwen2.5-7B", "lora_config", 1, 40, 4096, 1),
        ("Qwen2.5-7B", "lora_config", 1, 24, 4096, None),
        ("Qwen2.5-7B", "qlora", 1, 24, 4096, 1),
        ("Qwen2.5-14B", "lora_config", 1, 80, 4096, 2),
        ("Llama-3.1-70B", "lora_config", 8, 80, 4096, None),
        ("Llama-3.1-70B", "lora_config --zero 3", 8, 80, 4096, 2),
        ("Llama-3.1-70B", "qlora", 1, 80, 4096, 1),
    ],
)
def test_the_batch_fits_the_gpu(
    name: str, recipe: str, gpus: int, gigabytes: int, longest: int, size: int | None, tmp_path: Path
) -> None:
    config = read_config(ROOT / f"train_configs/{recipe.split()[0]}.yaml")
    config |= {"model_name_or_path": str(folder_of(name, tmp_path))}
    stage = "3" if "zero" in recipe else "0"
    config |= {"deepspeed": str(ROOT / f"train_configs/ds_z{stage}_config.json")}
    assert memory.fit(config, gpus, gigabytes * 1e9, longest) == size
    if size:
        key = "per_device_train_batch_size"
        found = memory.estimate(config | {key: size, "cutoff_len": longest}, gpus)
        assert found and found.total <= memory.usable(gigabytes * 1e9)


@pytest.mark.parametrize(
    "changes",
    [
        {"quantization_bit": 8},
        {"pure_bf16": True},
        {"additional_target": "embed_tokens"},
        {"fsdp": "full_shard"},
        {"deepspeed": '{"zero_optimization": {}}'},
    ],
)
def test_what_the_estimate_does_not_know_is_not_refused(changes: dict[str, Any], tmp_path: Path) -> None:
    config = read_config(ROOT / "train_configs/lora_config.yaml") | {"deepspeed": None}
    config |= {"model_name_or_path": str(folder_of("Qwen2.5-7B", tmp_path))}
    assert memory.fit(config, 1, 24e9, 4096) is None
    assert memory.fit(config | changes, 1, 24e9, 4096) == 16


def test_experts_are_counted_and_not_adapted(tmp_path: Path) -> None:
    model = {"model_name_or_path": str(folder_of("Qwen3-30B-A3B", tmp_path)), "bf16": True}
    found = memory.estimate(model | {"lora_rank": 64}, 1)
    assert found and found.base == 30_532_122_624 and found.experts
    # of each layer: queries, keys, values and output
    assert found.trained == 48 * 64 * (3 * 2048 + 4096 + 512 + 512 + 4096 + 2048)
    four = memory.estimate(model | {"quantization_bit": 4}, 1)
    assert four and four.weights > 0.95 * found.weights  # bitsandbytes, too, quantizes linear layers alone


def test_zero_3_on_the_same_gpus_is_an_alternative(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # not in a checkout
    config = read_config(ROOT / "train_configs/lora_config.yaml") | {"deepspeed": None}
    config |= {"model_name_or_path": str(folder_of("Llama-3.1-70B", tmp_path))}
    found = list(memory.alternatives(config, 8, 80e9, 4096))
    assert [words.partition(" (")[0] for words in found] == ["--config qlora", "--zero 3 on 8 GPUs"]


@pytest.mark.parametrize(
    "batch, processes, size, lowered", [(128, 1, 4, (4, 32)), (13, 1, 6, (1, 13)), (34, 1, 8, (2, 17))]
)
def test_a_lower_batch_keeps_the_global_one(
    batch: int, processes: int, size: int, lowered: tuple[int, int]
) -> None:
    config = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": 1}
    assert tuple(steps.lower(config, processes, size).values()) == lowered


def test_a_dry_run_plans_for_another_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    said: list[str] = []

    def planned(gigabytes: float, *overrides: str) -> str:
        said.clear()
        model, output = str(folder_of("Qwen2.5-7B", tmp_path)), tmp_path / "run"
        request = training.Request(
            RECIPE, overrides, model, output=output, gpus=1, gpu_memory=gigabytes, zero="0"
        )
        return training.preview(request, said.append)

    assert "\nglobal batch size 128 = 4 per device × 32 accumulated × 1 processes" in planned(80)
    assert "DeepSpeed: stage 0 shards nothing" in planned(80)
    assert "DeepSpeed: stage 0" not in planned(80, "bf16=false")
    assert [line for line in said if "to keep 16: per_device_train_batch_size=16" in line]
    assert "\nglobal batch size 128 = 16 per device × 8" in planned(80, "per_device_train_batch_size=16")
    planned(24)
    (warning,) = (line for line in said if line.startswith("warning: one sample of 4096 tokens takes more"))
    assert "the 24 GB of a GPU" in warning and "about 27.5)" in warning
    assert (
        "--config qlora (about 16.8 GB), --zero 3 on 2 GPUs (about 18.6 GB)" in warning
        and "cutoff_len=1024" in warning
    )
    # memory ran out in an earlier run, where the estimate was too low
    config = read_config(ROOT / RECIPE) | {"model_name_or_path": str(tmp_path / "Qwen2.5-7B")}
    config |= {"deepspeed": str(ROOT / "train_configs/ds_z0_config.json")}
    known = Manifest(config=config, learned=2, memory=80e9)
    runs.write_config(tmp_path / "run", config)
    manifest.write(tmp_path / "run", known)
    assert "\nglobal batch size 128 = 2 per device × 64 accumulated" in planned(80)
    assert any("as with more the last run ran out of memory" in line for line in said)
    for other in (replace(known, memory=40e9), replace(known, config=config | {"cutoff_len": 8192})):
        manifest.write(tmp_path / "run", other)
        assert "\nglobal batch size 128 = 4 per device" in planned(80)
    (tmp_path / "run" / manifest.NAME).write_text("{")
    assert "\nglobal batch size 128 = 4 per device" in planned(80)


def test_a_training_that_cannot_fit_is_refused_before_it_starts(
    project: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project)
    machine = Machine(1, True, True, memory=(1e9,))
    monkeypatch.setattr(training, "detect_machine", lambda *imagined: machine)
    request = training.Request(model=str(tiny_model), gpus=1)
    with pytest.raises(
        McpLoraError, match="takes more than the 1 GB of a GPU .*per_device_train_batch_size=1"
    ):
        training.train(request, lambda text: None, lambda step, fraction: None)
    assert not (project / "outputs/mcp_lora/run.yaml").exists()
