"""What is fitted to the machine and the data before a training starts."""

from pathlib import Path
from typing import Any

import pytest
from test_readme import folder_of

from mcp_lora.engine.topology import Topology
from mcp_lora.train import plan as plans
from mcp_lora.train import runs
from mcp_lora.train.plan import Plan


def planned(run: Path, **config: Any) -> Plan:
    defaults = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    return Plan({"output_dir": str(run), **defaults, **config}, {}, Topology())


def test_steps_are_sorted_where_there_is_padding_and_no_order_is_set(tmp_path: Path) -> None:
    assert plans.is_sorted(planned(tmp_path))
    assert not plans.is_sorted(planned(tmp_path, per_device_train_batch_size=1))
    assert not plans.is_sorted(planned(tmp_path, disable_shuffling=True))
    assert not plans.is_sorted(planned(tmp_path, train_sampling_strategy="random"))


@pytest.mark.parametrize("was", [True, False])
def test_a_resumed_run_keeps_its_order(tmp_path: Path, was: bool) -> None:
    runs.write_config(tmp_path, {"disable_shuffling": was})
    for size in (1, 4):
        resumed = planned(tmp_path, per_device_train_batch_size=size, resume_from_checkpoint="checkpoint-2")
        assert plans.is_sorted(resumed) is was
    # an order that the recipe sets was never ours
    assert not plans.is_sorted(
        planned(tmp_path, disable_shuffling=True, resume_from_checkpoint="checkpoint-2")
    )


def test_a_smaller_batch_is_tried_until_nothing_is_left_to_lower(tmp_path: Path) -> None:
    smaller = plans.smaller(planned(tmp_path))
    assert smaller and smaller.config["per_device_train_batch_size"] == 2
    assert smaller.config["gradient_accumulation_steps"] == 4
    assert smaller.config["per_device_eval_batch_size"] == 1
    one = planned(tmp_path, per_device_train_batch_size=1)
    assert plans.smaller(one) is None  # without validation
    validated = plans.smaller(planned(tmp_path, per_device_train_batch_size=1, eval_strategy="steps"))
    assert validated and validated.config["per_device_eval_batch_size"] == 1
    assert plans.smaller(validated) is None


def test_an_a100_has_a_speed_for_models_like_those_in_the_report(tmp_path: Path, tiny_model: Path) -> None:
    config = {"model_name_or_path": str(folder_of("Qwen2.5-7B", tmp_path)), "bf16": True}
    assert plans.speed_of(config) == pytest.approx(25e12 / 7_615_616_512)
    assert plans.speed_of(config | {"quantization_bit": 4}) == pytest.approx(15e12 / 7_615_616_512)
    assert plans.speed_of(config | {"use_cpu": True}) is None
    for model in (tiny_model, folder_of("Qwen3-30B-A3B", tmp_path), tmp_path / "nothing"):
        assert plans.speed_of({"model_name_or_path": str(model)}) is None
