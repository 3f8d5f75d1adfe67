"""How many optimizer steps a run makes, what is fitted to them, and that a run learns."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import BIN, SHARED, run, write_json
from safetensors.torch import load_file, save_file

from mcp_lora import runs, steps
from mcp_lora.cli import main
from mcp_lora.errors import McpLoraError

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
        (4, 1, {}, 1),
        (128, 1, {}, 1),
        (129, 1, {}, 2),
        (10_000, 1, {}, 79),
        (10_000, 4, {"gradient_accumulation_steps": 2}, 79),
        (1000, 3, {"per_device_train_batch_size": 7, "gradient_accumulation_steps": 2}, 24),
        (1000, 3, {"per_device_train_batch_size": 7, "dataloader_drop_last": True}, 6),
        (100, 1, {"num_train_epochs": 2.5, "gradient_accumulation_steps": 1}, 18),
        (100, 1, {"max_steps": 5}, 5),
        (None, 1, {"max_steps": 5}, 5),
        (None, 1, {}, None),
    ],
)
def test_steps_are_counted_as_the_trainer_does(
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
        assert (
            steps.count(config, samples, processes) == trainer.set_initial_training_values(args, loader)[-1]
        )


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


@pytest.mark.parametrize("changes", [{"warmup_steps": 7}, {"warmup_ratio": 7}, {"warmup_steps": -1}])
def test_a_run_that_is_all_warm_up_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(McpLoraError, match="the run has 7 optimizer steps.*mcp-lora train warmup_steps=0.1"):
        steps.fit(RECIPE | changes, 7, ())


def test_a_run_without_a_step_is_refused() -> None:
    with pytest.raises(McpLoraError, match="no optimizer step"):
        steps.fit(RECIPE, 0, ())


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


def adapter(folder: Path, **tensors: torch.Tensor) -> Path:
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def test_an_adapter_that_learned_nothing_is_an_error(tmp_path: Path) -> None:
    down, zero, up = torch.ones(4, 8), torch.zeros(8, 4), torch.ones(8, 4)
    runs.check_adapter(adapter(tmp_path, a_lora_A=down, a_lora_B=zero, b_lora_B=up))
    cases = [
        ({"a_lora_A": down, "a_lora_B": zero}, "learned nothing, all 1 lora_B.*mcp-lora train --overwrite"),
        ({"a_lora_A": down * torch.nan, "a_lora_B": up}, "NaN or Inf.*learning_rate=1e-5"),
        ({"a_lora_A": down, "a_lora_B": up * torch.inf}, "NaN or Inf"),
    ]
    for tensors, said in cases:
        with pytest.raises(McpLoraError, match=said) as caught:
            runs.check_adapter(adapter(tmp_path, **tensors))
        assert caught.value.code == 1
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(McpLoraError, match="without an adapter.*mcp-lora train --dry-run"):
        runs.check_adapter(tmp_path)


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("do_train=false", "without do_train=true nothing is trained"),
        ("finetuning_type=full", "finetuning_type=full makes no LoRA adapter"),
        ("finetuning_type=freeze", "set finetuning_type=lora"),
        ("finetuning_type=oft", "set finetuning_type=lora"),
    ],
)
def test_a_run_without_an_adapter_is_refused_before_anything_is_spent(
    word: str,
    said: str,
    tiny_model: Path,
    project: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(project)
    with pytest.raises(SystemExit) as caught:
        main(["train", "--model", str(tiny_model), word])
    assert caught.value.code == 2 and said in capsys.readouterr().err
    assert not Path("data/llama_factory").exists() and not Path("outputs").exists()


@pytest.fixture(scope="module")
def trained(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run on the user's own five rows, with nothing set but the model; its folder, and what was said."""
    from conftest import make_project

    rows = SHARED / "filtered/filtered_20251113_175326.json"
    if not rows.is_file():
        pytest.skip(f"{rows} is not here")
    folder = make_project(tmp_path_factory.mktemp("five"))
    done = run([BIN / "mcp-lora", "train", "--model", tiny_model, "--data", rows], folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "outputs/mcp_lora", done.stderr


def test_five_rows_are_learned_from(trained: tuple[Path, str]) -> None:
    output, said = trained
    tensors = load_file(output / "adapter_model.safetensors")
    ups = [tensor for name, tensor in tensors.items() if "lora_B" in name]
    assert ups and all(tensor.any() for tensor in ups)
    (first, *_) = json.loads((output / "trainer_state.json").read_text())["log_history"]
    assert first["learning_rate"] == 2e-4
    assert re.search(r"optimizer steps: 1, of \d samples in batches of 128; warm-up steps: 0", said)
    assert "few steps to learn from; what helps: --global-batch 8, more rows" in said
    assert (output / "training_loss.png").is_file() and (output / "training_eval_loss.png").is_file()


def test_a_plan_shows_what_is_fitted(
    tiny_model: Path, project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(project)
    stats = {"written": {"train": 100}, "no_call_samples": {}, "inputs": {}}
    write_json(Path("data/llama_factory/stats.json"), stats)
    words = ["train", "--dry-run", "--model", str(tiny_model), "--global-batch", "2", "val_size=0.015"]
    with pytest.raises(SystemExit):
        main([*words, "eval_steps=3"])
    shown = capsys.readouterr()
    assert "warmup_steps: 4\n" in shown.out and "logging_steps: 2\n" in shown.out
    assert "eval_steps: 3\n" in shown.out
    assert "steps: 49, of 98 samples in batches of 2" in shown.out
    assert "optimizer steps: 49, of 98 samples in batches of 2; warm-up steps: 4" in shown.err
    with pytest.raises(SystemExit):
        main([*words, "warmup_steps=49"])
    assert "warmup_steps=49, but the run has 49 optimizer steps" in capsys.readouterr().err
