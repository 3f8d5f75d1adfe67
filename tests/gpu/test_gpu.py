"""The recipe on a GPU: memory against its estimate, padding, resumption, several GPUs, export.

`pytest -m gpu -s tests/gpu` on a machine with a GPU prints what an issue or a pull request should carry. It
has not been run yet.
"""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import BIN, ROOT, SAMPLE, run, write_json

from mcp_lora.train import memory

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]
# Put on PYTHONPATH as sitecustomize.py it writes the most memory that a process of the engine has had.
MEASURE = """
import atexit, os

@atexit.register
def measure():
    import sys
    torch = sys.modules.get("torch")
    if torch and torch.cuda.is_initialized():
        with open(os.environ["MEASURED"], "a") as file:
            file.write(f"{torch.cuda.max_memory_allocated()}\\n")
"""
WORDS = ["--config", "lora_config", "cutoff_len=2048", "max_steps=4", "save_steps=2", "lora_dropout=0"]
WORDS += ["logging_steps=1", "val_size=0", "eval_strategy=no", "--global-batch", "32"]
WORDS += ["lr_scheduler_type=constant", "warmup_steps=0"]  # a run of two steps starts as one of four


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpu") / "project"
    (folder / "train_configs").mkdir(parents=True)
    for file in (ROOT / "train_configs").iterdir():
        (folder / "train_configs" / file.name).write_bytes(file.read_bytes())
    write_json(folder / "data/filtered/filtered_20250101_000000.json", json.loads(SAMPLE.read_text()))
    (folder / "hook").mkdir()
    (folder / "hook/sitecustomize.py").write_text(MEASURE)
    done = run([BIN / "mcp-lora", "convert", "--test", "0.1", "--candidates", "10"], folder)
    assert done.returncode == 0, done.stderr
    return folder


def trained(project: Path, output: str, *words: str) -> dict[str, Any]:
    """Train the embedded model; return its losses, the seconds, the padding and the memory in GB."""
    measured, folder = project / f"{output}.memory", project / "outputs" / output
    argv = [BIN / "mcp-lora", "train", *WORDS, "--model", "embedded", "--output", folder, *words]
    done = run(argv, project, PYTHONPATH=str(project / "hook"), MEASURED=str(measured))
    assert done.returncode == 0, done.stderr[-3000:]
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    padding = re.findall(r"padding: ([\d.]+)%", done.stderr)
    return {
        "losses": [line["loss"] for line in history if "loss" in line],
        "seconds": json.loads((folder / "train_results.json").read_text())["train_runtime"],
        "padding": float(padding[0]) if padding else None,
        "memory": max(map(int, measured.read_text().split())) / 1e9,
    }


def test_memory_is_what_the_estimate_says(project: Path) -> None:
    found = trained(project, "memory", "--gpus", "1", "per_device_train_batch_size=8")
    config = yaml.safe_load((project / "outputs/memory/run.yaml").read_text())
    longest = json.loads((project / "outputs/memory/manifest.json").read_text())["rendered"]["lengths"]["max"]
    estimate = memory.estimate(config | {"cutoff_len": longest}, 1)
    assert estimate
    print(f"\n{torch.cuda.get_device_name()}: {found['memory']:.2f} GB, estimated {estimate.total / 1e9:.2f}")
    assert 0.6 < found["memory"] / (estimate.total / 1e9) < 1.15


def test_sorted_steps_have_the_same_losses_in_less_time(project: Path) -> None:
    one, eight = (
        trained(project, f"batch-{size}", "--gpus", "1", f"per_device_train_batch_size={size}")
        for size in ("4", "8")
    )
    shuffled = trained(
        project, "shuffled", "--gpus", "1", "train_sampling_strategy=random", "per_device_train_batch_size=8"
    )
    print(
        f"\nseconds: {eight['seconds']:.1f} sorted, {shuffled['seconds']:.1f} shuffled; "
        f"padding {eight['padding']} %"
    )
    assert one["losses"] == pytest.approx(eight["losses"], rel=0.02)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU")
def test_two_gpus_train_as_one_does(project: Path) -> None:
    one, two = (
        trained(project, f"gpus-{count}", "--gpus", str(count), "per_device_train_batch_size=8")
        for count in (1, 2)
    )
    print(f"\nseconds: {one['seconds']:.1f} on one GPU, {two['seconds']:.1f} on two")
    assert two["losses"] == pytest.approx(one["losses"], rel=0.02)


def test_a_run_is_resumed_and_exported(project: Path) -> None:
    whole = trained(project, "whole", "--gpus", "1")
    trained(project, "resumed", "--gpus", "1", "max_steps=2")
    resumed = trained(project, "resumed", "--gpus", "1", "--resume")
    assert resumed["losses"] == pytest.approx(whole["losses"], rel=0.05)
    done = run([BIN / "mcp-lora", "export", "outputs/resumed", "--output", "outputs/merged"], project)
    assert done.returncode == 0, done.stderr[-3000:]
    print(f"\n{done.stderr.splitlines()[-1]}")
    evaluated = run([BIN / "mcp-lora", "eval", "outputs/resumed", "--limit", "4"], project)
    assert evaluated.returncode == 0, evaluated.stderr[-3000:]
