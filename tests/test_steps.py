"""How many optimizer steps a run makes, what is fitted to them, and that a run learns."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import BIN, SHARED, make_project, run
from safetensors.torch import load_file

from mcp_lora.cli.app import main
from mcp_lora.errors import McpLoraError
from mcp_lora.train import steps

RECIPE = {
    "per_device_train_batch_size": 16,
    "gradient_accumulation_steps": 8,
    "num_train_epochs": 1.0,
    "warmup_steps": 0.1,
    "logging_steps": 10,
    "eval_strategy": "steps",
    "eval_steps": 50,
}


@pytest.mark.parametrize(
    ("samples", "processes", "changes", "expected"),
    [
        (128, 1, {}, 1),
        (129, 1, {}, 2),
        (10_000, 4, {"gradient_accumulation_steps": 2}, 79),
        (100, 1, {"max_steps": 5}, 5),
        (None, 1, {"max_steps": 5}, 5),
        (None, 1, {}, None),
    ],
)
def test_steps_are_those_of_the_batch_or_max_steps(
    samples: int | None, processes: int, changes: dict[str, Any], expected: int | None
) -> None:
    assert steps.count(RECIPE | changes, samples, processes) == expected


@pytest.mark.parametrize("samples", [1, 5, 33])
@pytest.mark.parametrize("drop_last", [False, True])
def test_the_count_is_the_installed_trainers(samples: int, drop_last: bool, tmp_path: Path) -> None:
    from accelerate.data_loader import BatchSamplerShard
    from torch.utils.data import BatchSampler, DataLoader, SequentialSampler
    from transformers import Trainer, TrainingArguments

    for processes, size, accumulation, epochs in ((1, 2, 3, 1.0), (2, 4, 1, 2.5), (3, 1, 2, 1.5)):
        config = {
            "per_device_train_batch_size": size,
            "gradient_accumulation_steps": accumulation,
            "num_train_epochs": epochs,
            "dataloader_drop_last": drop_last,
        }
        args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", **config)
        rows = list(range(samples))
        sampler = BatchSampler(SequentialSampler(rows), size, drop_last)
        shard = BatchSamplerShard(sampler, processes, 0)
        if not len(shard):
            continue
        trainer = Trainer(torch.nn.Linear(1, 1), args)
        loader = DataLoader(rows, batch_sampler=shard)
        expected = trainer.set_initial_training_values(args, loader)[-1]
        assert steps.count(config, samples, processes) == expected


@pytest.mark.parametrize(
    ("count", "changes", "warmup"),
    [
        (1, {}, 0),
        (9, {}, 0),
        (10, {}, 1),
        (79, {}, 7),
        (100, {"warmup_steps": 0.29}, 29),
        (2, {"warmup_steps": 0.9999999999}, 1),
        (79, {"warmup_ratio": 0.2}, 15),
        (79, {"warmup_steps": 20}, 20),
        (79, {"warmup_steps": 0}, 0),
    ],
)
def test_warm_up_is_a_share_rounded_down(count: int, changes: dict[str, Any], warmup: int) -> None:
    from transformers import get_scheduler

    fitted = steps.fit(RECIPE | changes, count, ())
    assert fitted["warmup_steps"] == warmup and isinstance(fitted["warmup_steps"], int)
    assert "warmup_ratio" not in fitted
    for name in ("cosine", "linear", "constant_with_warmup"):
        optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        schedule = get_scheduler(name, optimizer, fitted["warmup_steps"], count)
        rates = []
        for _ in range(count):
            rates.append(schedule.get_last_lr()[0])
            optimizer.step()
            schedule.step()
        assert max(rates) == 1.0


def test_a_run_without_a_step_or_that_is_all_warm_up_is_refused() -> None:
    with pytest.raises(McpLoraError, match="no optimizer step"):
        steps.fit(RECIPE, 0, ())
    said = "the run has 7 optimizer steps.*mcp-lora train warmup_steps=0.1"
    for changes in ({"warmup_steps": 7}, {"warmup_ratio": 7}, {"warmup_steps": -1}):
        with pytest.raises(McpLoraError, match=said):
            steps.fit(RECIPE | changes, 7, ())


@pytest.mark.parametrize(
    ("count", "logging", "evaluation"),
    [(1, 1, 1), (7, 1, 1), (39, 1, 7), (79, 3, 15), (100, 5, 50), (200, 10, 50), (1000, 10, 50)],
)
def test_a_short_run_still_has_a_curve(count: int, logging: int, evaluation: int) -> None:
    fitted = steps.fit(RECIPE, count, ())
    assert (fitted["logging_steps"], fitted["eval_steps"]) == (logging, evaluation)
    assert count // logging >= min(count, 20)
    kept = steps.fit(RECIPE, count, {"logging_steps", "eval_steps"})
    assert (kept["logging_steps"], kept["eval_steps"]) == (10, 50)
    assert steps.fit(RECIPE | {"load_best_model_at_end": True}, count, ())["eval_steps"] == 50


def test_a_share_as_interval_is_kept_where_it_is_fine_enough() -> None:
    fitted = steps.fit(RECIPE | {"logging_steps": 0.01, "eval_steps": 0.5}, 1000, ())
    assert (fitted["logging_steps"], fitted["eval_steps"]) == (0.01, 0.5)
    assert steps.fit(RECIPE | {"logging_steps": 0.5}, 1000, ())["logging_steps"] == 50


def test_five_rows_are_learned_from(tiny_model: Path, tmp_path: Path) -> None:
    """A run on the user's own five rows, with nothing set but the model."""
    rows = SHARED / "filtered/filtered_20251113_175326.json"
    if not rows.is_file():
        pytest.skip(f"{rows} is not here")
    folder = make_project(tmp_path / "five")
    done = run([BIN / "mcp-lora", "train", "--model", tiny_model, "--data", rows], folder)
    assert done.returncode == 0, done.stderr[-3000:]
    output, said = folder / "outputs/mcp_lora", done.stderr
    tensors = load_file(output / "adapter_model.safetensors")
    ups = [tensor for name, tensor in tensors.items() if "lora_B" in name]
    assert ups and all(tensor.any() for tensor in ups)
    (first, *_) = json.loads((output / "trainer_state.json").read_text())["log_history"]
    assert first["learning_rate"] == 2e-4
    assert re.search(r"optimizer steps: 1 \(\d samples, global batch size 128\); warm-up steps: 0", said)
    assert "few optimizer steps; what helps: --global-batch 8, more rows" in said
    assert (output / "training_loss.png").is_file() and (output / "training_eval_loss.png").is_file()


def test_a_plan_expects_tokens_padding_and_hours(
    tiny_model: Path, project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def plan(*words: str) -> str:
        with pytest.raises(SystemExit):
            main(["train", "--dry-run", "--model", str(tiny_model), "per_device_train_batch_size=4", *words])
        return capsys.readouterr().out

    monkeypatch.chdir(project)
    with pytest.raises(SystemExit):
        main(["convert", "--test", "0"])
    planned = plan("max_steps=10", "--global-batch", "8", "--tokens-per-second", "100")
    found = re.search(r"tokens: about ([\d,]+) per sample, ([\d,]+) in all", planned)
    assert found
    mean, tokens = (int(number.replace(",", "")) for number in found.groups())
    assert tokens == pytest.approx(10 * 8 * mean, rel=0.01)
    assert f"time: about {tokens / 100 / 3600:.2g} hours at 100 tokens per second" in planned
    shares = re.search(r"padding: ([\d.]+)% .* \(shuffled: ([\d.]+)%\)", planned)
    assert shares and float(shares[1]) <= float(shares[2])
    assert "padding" not in plan("train_sampling_strategy=random") and "time:" not in plan()
    assert "tokens: not known" in plan("--model", "Qwen/Qwen2.5-7B-Instruct")  # nothing is fetched


def test_a_plan_shows_what_is_fitted(
    tiny_model: Path, project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def plan(*words: str) -> tuple[str, str]:
        command = ["train", "--dry-run", "--model", str(tiny_model), "--global-batch", "2", "val_size=0.25"]
        with pytest.raises(SystemExit):
            main([*command, *words])
        return capsys.readouterr()

    monkeypatch.chdir(project)
    with pytest.raises(SystemExit):
        main(["convert", "--test", "0"])
    capsys.readouterr()
    shown, said = plan("num_train_epochs=5", "eval_steps=3")
    assert "warmup_steps: 4\n" in shown and "logging_steps: 2\n" in shown and "eval_steps: 3\n" in shown
    assert "\nsteps: 45 (18 samples, global batch size 2)" in shown
    assert "optimizer steps: 45 (18 samples, global batch size 2); warm-up steps: 4" in said
    assert "\nsteps: 5 (18 samples" in plan("max_steps=5")[0]
    assert "warmup_steps=9, but the run has 9 optimizer steps" in plan("warmup_steps=9")[1]


def sizes(per_device: int, accumulated: int) -> dict[str, int]:
    return {"per_device_train_batch_size": per_device, "gradient_accumulation_steps": accumulated}


BATCH = sizes(16, 8)


@pytest.mark.parametrize(
    ("processes", "per_device", "accumulated"),
    [(1, 16, 8), (2, 16, 4), (4, 16, 2), (8, 16, 1), (16, 8, 1), (128, 1, 1)],
)
def test_the_batch_is_the_same_on_any_number_of_gpus(
    processes: int, per_device: int, accumulated: int
) -> None:
    assert steps.split_batch(BATCH, processes) == sizes(per_device, accumulated)
    words = (
        f"global batch size 128 = {per_device} per device × {accumulated} accumulated × {processes} processes"
    )
    assert steps.describe_batch(sizes(per_device, accumulated), processes) == words


@pytest.mark.parametrize(("processes", "batch"), [(3, 126), (5, 130), (6, 132), (7, 126), (256, 256)])
def test_a_batch_that_is_not_divided_is_rounded(processes: int, batch: int) -> None:
    assert steps.global_batch(steps.split_batch(BATCH, processes), processes) == batch


def test_another_batch_can_be_wanted() -> None:
    assert steps.split_batch(BATCH, 4, 256) == sizes(16, 4)
    assert steps.split_batch(BATCH, 1, 4) == sizes(4, 1)
    assert steps.split_batch({}, 2) == sizes(4, 1)  # the engine's defaults


@pytest.mark.parametrize("value", ["two", 0, -1, 1.5, True])
def test_a_batch_that_is_no_number_is_refused(value: object) -> None:
    for key in BATCH:
        with pytest.raises(McpLoraError, match=f"{key}={value} is not a .*mcp-lora train {key}="):
            steps.split_batch(BATCH | {key: value}, 1)
