import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers.trainer_utils import sort_checkpoints

from mcp_lora.errors import McpLoraError
from mcp_lora.train import manifest, runs
from mcp_lora.train.manifest import Manifest

CONFIG: dict[str, Any] = {
    "model_name_or_path": "org/model",
    "lora_rank": 64,
    "lora_target": "all",
    "num_train_epochs": 1.0,
}


def make_run(folder: Path, *steps: int, finished: bool = True) -> Path:
    runs.write_config(folder, CONFIG)
    places = [folder / f"checkpoint-{step}" for step in steps] + [folder] * finished
    for place in places:
        place.mkdir(exist_ok=True)
        (place / "adapter_config.json").write_text("{}")
    for step, place in zip(steps, places, strict=False):
        save_file({"lora_A": torch.zeros(8, 8)}, place / "adapter_model.safetensors")
        for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
            torch.save({"step": step}, place / name)
        (place / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    if finished:
        (folder / "trainer_state.json").write_text(json.dumps({"epoch": 1.0, "global_step": 20}))
    return folder


def resumed(run: Path, **changes: Any) -> Path | None:
    return runs.prepare(run, CONFIG | changes, resume=True, overwrite=False)


def names(run: Path) -> list[str]:
    return [path.name for path in runs.checkpoints(run)]


def test_checkpoints_are_sorted_by_number_and_the_newest_is_resumed_from(tmp_path: Path) -> None:
    make_run(tmp_path, 100, 20, 3, finished=False)
    (tmp_path / "checkpoint-best").mkdir()
    assert names(tmp_path) == ["checkpoint-3", "checkpoint-20", "checkpoint-100"]
    assert resumed(tmp_path) == tmp_path / "checkpoint-100"


@pytest.mark.parametrize(("finished", "what"), [(True, "a finished run"), (False, "a run's checkpoint-100")])
def test_a_run_is_neither_resumed_nor_skipped_silently(tmp_path: Path, finished: bool, what: str) -> None:
    assert runs.prepare(tmp_path / "new", CONFIG, resume=False, overwrite=False) is None
    make_run(tmp_path, 100, finished=finished)
    with pytest.raises(McpLoraError, match=rf"{what}.*--resume.*--overwrite"):
        runs.prepare(tmp_path, CONFIG, resume=False, overwrite=False)
    assert runs.prepare(tmp_path, CONFIG, resume=False, overwrite=True) is None


TORN = ("adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")
MISSING = ("adapter_model.safetensors", "adapter_config.json", "optimizer.pt", "trainer_state.json")


@pytest.mark.parametrize(
    ("name", "share"),
    [(name, share) for name in TORN for share in (0, 0.5, 0.99)] + [(name, None) for name in MISSING],
)
def test_a_checkpoint_that_was_not_written_to_its_end_is_not_resumed_from(
    tmp_path: Path, name: str, share: float | None
) -> None:
    make_run(tmp_path, 20, 100, finished=False)
    file = tmp_path / "checkpoint-100" / name
    whole = file.read_bytes()
    file.unlink()
    if share is not None:
        file.write_bytes(whole[: int(len(whole) * share)])
    assert resumed(tmp_path) == tmp_path / "checkpoint-20"
    aside = tmp_path / "incomplete-checkpoint-100"
    assert runs.put_aside_incomplete(tmp_path) == [aside]
    assert aside.is_dir() and names(tmp_path) == ["checkpoint-20"]
    kept = sort_checkpoints(str(tmp_path), use_mtime=True)  # what save_total_limit counts
    assert kept == [str(tmp_path / "checkpoint-20")]


def test_without_a_complete_checkpoint_there_is_nothing_to_resume(tmp_path: Path) -> None:
    with pytest.raises(McpLoraError, match="no complete checkpoint to resume from: mcp-lora train$"):
        resumed(tmp_path)
    make_run(tmp_path, 20, finished=False)
    (tmp_path / "checkpoint-20/trainer_state.json").unlink()
    with pytest.raises(McpLoraError, match="no complete checkpoint .*mcp-lora train --overwrite"):
        resumed(tmp_path)
    runs.write_config(tmp_path, CONFIG | {"save_only_model": True})
    with pytest.raises(McpLoraError, match="save_only_model leaves out what resuming requires"):
        resumed(tmp_path)


def test_resume_refuses_another_runs_checkpoint(tmp_path: Path) -> None:
    make_run(tmp_path, 20, finished=False)
    for key, value in {"lora_rank": 32, "learning_rate": 1e-5, "cutoff_len": 512}.items():
        with pytest.raises(McpLoraError, match=f"another run's checkpoint .*{key} .* → {value}"):
            resumed(tmp_path, **{key: value})
    with pytest.raises(
        McpLoraError, match="deepspeed None → /z0.json"
    ):  # the optimizer's state would be lost
        resumed(tmp_path, deepspeed="/z0.json")
    with pytest.raises(McpLoraError, match="use only one of them"):
        runs.prepare(tmp_path, CONFIG, resume=True, overwrite=True)


@pytest.mark.parametrize(
    ("epoch", "enough", "more"),
    [(1.0, {}, {"num_train_epochs": 2.0}), (0.3, {"max_steps": 20}, {"max_steps": 30})],
)
def test_resuming_a_finished_run_needs_more_epochs_or_steps(
    tmp_path: Path, epoch: float, enough: dict[str, Any], more: dict[str, Any]
) -> None:
    make_run(tmp_path, 20)
    (tmp_path / "trainer_state.json").write_text(json.dumps({"epoch": epoch, "global_step": 20}))
    with pytest.raises(McpLoraError, match=f"nothing to resume: .*{[*more][0]}="):
        resumed(tmp_path, **enough)
    assert resumed(tmp_path, **more)


def test_an_end_that_was_not_recorded_is_resumed_but_no_interrupted_continuation(tmp_path: Path) -> None:
    make_run(tmp_path, 10, 20)
    manifest.write(tmp_path, Manifest())  # mcp-lora was killed, and the engine was not
    assert resumed(tmp_path) == tmp_path / "checkpoint-20" and runs.is_done(tmp_path, CONFIG)
    manifest.write(tmp_path, Manifest(ended="2026-11-28T11:30:39+00:00"))
    with pytest.raises(McpLoraError, match="nothing to resume"):
        resumed(tmp_path)
    # continued with more epochs, and killed at 25: what ended before is not the end of that
    make_run(tmp_path, 25, finished=False)
    manifest.write(tmp_path, Manifest())
    with pytest.raises(McpLoraError, match="nothing to resume"):
        resumed(tmp_path)
    assert resumed(tmp_path, num_train_epochs=2.0) == tmp_path / "checkpoint-25"


def test_an_overwritten_run_is_put_aside_not_deleted(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert runs.put_aside(run) is None
    for step, name in ((1, "run.previous"), (2, "run.previous-2"), (3, "run.previous-3")):
        make_run(run, step)
        assert runs.put_aside(run) == tmp_path / name and names(tmp_path / name) == [f"checkpoint-{step}"]
        assert not run.exists()
    runs.write_config(run, CONFIG)  # all that a run leaves that fails at once
    assert runs.put_aside(run) is None
    assert names(tmp_path / "run.previous") == ["checkpoint-1"]


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_text("")
    for overwrite in (False, True):
        with pytest.raises(
            McpLoraError, match="not empty and was not created by mcp-lora: .*--output OTHER_FOLDER"
        ):
            runs.prepare(tmp_path, CONFIG, False, overwrite)
    assert (tmp_path / "model.safetensors").is_file()


def test_one_training_at_a_time_in_a_folder(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with runs.locked(run):
        make_run(run)
        told = "in use by another mcp-lora train: mcp-lora train --output OTHER_FOLDER"
        with pytest.raises(McpLoraError, match=told), runs.locked(run):
            pass
    with runs.locked(run):
        pass


def test_the_adapter_is_the_newest_or_the_named_one(tmp_path: Path) -> None:
    assert runs.adapter(make_run(tmp_path)) == tmp_path
    make_run(tmp_path, 20, 100)  # its end was at step 20: it has been resumed since
    assert runs.adapter(tmp_path) == tmp_path / "checkpoint-100"
    (tmp_path / "trainer_state.json").write_text(json.dumps({"epoch": 1.0, "global_step": 100}))
    assert runs.adapter(tmp_path) == tmp_path  # the best, with load_best_model_at_end
    (tmp_path / "trainer_state.json").unlink()
    (tmp_path / "checkpoint-100/optimizer.pt").unlink()
    assert runs.adapter(tmp_path) == tmp_path / "checkpoint-20"
    for name in ("20", "checkpoint-20"):
        assert runs.adapter(tmp_path, name) == tmp_path / "checkpoint-20"
    with pytest.raises(
        McpLoraError, match="checkpoint-30 contains no adapter .*checkpoint-20, checkpoint-100"
    ):
        runs.adapter(tmp_path, "30")


def test_a_folder_without_a_run_and_one_that_cannot_be_written_are_told(tmp_path: Path) -> None:
    with pytest.raises(McpLoraError, match=r"no run\.yaml"):
        runs.read_run(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(McpLoraError, match="--output OTHER_FOLDER"):
        runs.write_config(tmp_path / "file", CONFIG)


@pytest.mark.parametrize(
    ("run_bits", "shape", "expected"),
    [(None, {}, False), (4, {}, True), (None, {"quantization_config": {"quant_method": "gptq"}}, True)],
)
def test_a_quantized_base_is_known(
    tmp_path: Path, run_bits: int | None, shape: dict[str, Any], expected: bool
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(shape))
    config = {"model_name_or_path": str(tmp_path), "quantization_bit": run_bits}
    runs.write_config(tmp_path / "run", config)
    assert runs.is_quantized(tmp_path / "run") is expected


def test_serving_takes_over_what_shapes_the_model(tmp_path: Path) -> None:
    base = {"model_name_or_path": "org/model", "resize_vocab": True, "add_tokens": "a"}
    runs.write_config(tmp_path, CONFIG | base | {"template": "empty"})
    base["enable_thinking"] = False  # the engine's default is to think
    assert runs.serving_config(tmp_path, None) == base
    adapter = {"adapter_name_or_path": str(tmp_path), "finetuning_type": "lora"}
    assert runs.serving_config(tmp_path, tmp_path) == base | adapter


def test_an_adapter_that_learned_nothing_is_an_error(tmp_path: Path) -> None:
    down, zero, up = torch.ones(4, 8), torch.zeros(8, 4), torch.ones(8, 4)
    file = tmp_path / "adapter_model.safetensors"
    save_file({"a_lora_A": down, "a_lora_B": zero, "b_lora_B": up}, file)
    runs.check_adapter(tmp_path)
    cases = [
        ({"a_lora_A": down, "a_lora_B": zero}, "learned nothing, all lora_B.*mcp-lora train --overwrite"),
        ({"a_lora_A": down * torch.nan, "a_lora_B": up}, "NaN or Inf.*learning_rate=1e-5"),
        ({"a_lora_A": down, "a_lora_B": up * torch.inf}, "NaN or Inf"),
    ]
    for tensors, said in cases:
        save_file(tensors, file)
        with pytest.raises(McpLoraError, match=said) as caught:
            runs.check_adapter(tmp_path)
        assert caught.value.code == 1
    file.unlink()
    with pytest.raises(McpLoraError, match="without an adapter.*mcp-lora train --dry-run"):
        runs.check_adapter(tmp_path)
