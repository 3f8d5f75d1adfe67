import importlib.metadata
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from chat_templates import templates
from conftest import BIN, run

from mcp_lora import demo_model, doctor
from mcp_lora.data import conversion
from mcp_lora.engine import launch
from mcp_lora.train import recipe, training
from mcp_lora.train.machine import Machine

CPU = Machine(0, False, False)


@pytest.fixture(autouse=True)
def in_project(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project)


def found(model: Path, **changes: Any) -> dict[str, doctor.Finding]:
    settings = recipe.resolve(recipe.RECIPE, {}, [], {"model_name_or_path": str(model)}, CPU)
    return {finding.what: finding for finding in doctor.examine(settings | changes, CPU)}


def test_a_machine_that_is_fit(project: Path, tiny_model: Path) -> None:
    done = run([BIN / "mcp-lora", "doctor", "--model", tiny_model, "--json"], project)
    assert done.returncode == 0, done.stderr
    verdicts = {line["what"]: line["verdict"] for line in json.loads(done.stdout)}
    assert "problem" not in verdicts.values()
    for what in ("Python", "llamafactory", "torch", "peft", "torchrun", "model"):
        assert verdicts[what] == "ok"
    assert verdicts["chat template"] == "warning"  # ours, to be served with the adapter
    assert verdicts["data"] == "warning"  # not converted yet


def test_a_problem_is_exit_code_1(project: Path) -> None:
    done = run([BIN / "mcp-lora", "doctor", "--model", "/nowhere/model"], project)
    assert done.returncode == 1
    assert "problem  model              there is no model in /nowhere/model" in done.stdout
    assert "not ready to train (model)" in done.stderr and "Traceback" not in done.stderr


def test_the_embedded_model_is_fetched_when_it_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo_model, "folder", lambda: tmp_path / "model")
    settings = recipe.resolve(Path("demo"), {}, [], {}, CPU)
    (finding,) = [one for one in doctor.examine(settings, CPU) if one.what == "model"]
    assert finding.verdict == "warning" and "training fetches it" in finding.words


def test_a_package_outside_its_bounds(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    version = importlib.metadata.version

    def other(name: str) -> str:
        if name == "jieba":
            raise importlib.metadata.PackageNotFoundError
        return "5.6.0" if name == "transformers" else version(name)

    monkeypatch.setattr(importlib.metadata, "version", other)
    findings = found(tiny_model)
    assert findings["transformers"].verdict == "problem" and "5.6.0, tested" in findings["transformers"].words
    assert findings["jieba"].words == "is not installed: pip install 'jieba>=0.42'"


def test_an_answer_that_does_not_end_with_eos(tiny_model: Path, tmp_path: Path) -> None:
    other = shutil.copytree(tiny_model, tmp_path / "other")
    text = dict(templates())["Qwen-Qwen2.5-7B-Instruct"]
    (other / "chat_template.jinja").write_text(text, encoding="utf-8")
    assert found(other)["chat template"].verdict == "ok"
    settings = json.loads((other / "tokenizer_config.json").read_text())
    (other / "tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": "<|endoftext|>"}))
    finding = found(other)["chat template"]
    assert finding.verdict == "warning"
    assert "an answer ends with <|im_end|>, eos is <|endoftext|>" in finding.words


def test_data_that_has_changed_since(tiny_model: Path, project: Path) -> None:
    conversion.convert(conversion.Settings())
    (source,) = (project / "data/filtered").glob("filtered_*.json")
    later = (project / "data/llama_factory/stats.json").stat().st_mtime + 10
    os.utime(source, (later, later))
    newer = Path(shutil.copy(source, source.with_name("filtered_20260101_000000.json")))
    assert found(tiny_model)["data"].verdict == "ok"  # neither time stamp nor name is a change
    newer.write_text(newer.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    assert "have changed: mcp-lora convert" in found(tiny_model)["data"].words


def test_a_recipe_without_model_or_data_is_a_problem() -> None:
    problems = training.settings_problems({"do_train": True, "stage": "sft"})
    assert problems == [f"{key} is not set" for key in ("model_name_or_path", "dataset_dir", "dataset")]


def test_what_no_training_could_use(tiny_model: Path, tmp_path: Path) -> None:
    findings = found(tiny_model, lora_rang=1)
    assert findings["recipe"].verdict == "problem" and "chat template" not in findings
    assert "did you mean lora_rank?" in findings["recipe"].words
    shutil.copy(tiny_model / "config.json", tmp_path)
    model = found(tmp_path)["model"]
    assert model.verdict == "problem" and "there is no tokenizer" in model.words
    (tmp_path / "tokenizer.json").write_text("{")
    template = found(tmp_path)["chat template"]
    assert template.verdict == "problem" and f"the tokenizer of {tmp_path} cannot be read" in template.words
    model = found(Path("org/model"))["model"]
    assert model.verdict == "warning" and "org/model is not on this machine" in model.words


@pytest.mark.parametrize(
    ("built", "driver", "verdict", "words"),
    [
        ("13.0", "12.4", "problem", "the driver supports CUDA 12.4, torch is built for 13.0"),
        ("12.4", "13.0", "warning", "none is visible"),
        ("12.9", "12.4", "warning", "none is visible"),  # compatible within a major version
        (None, "12.4", "problem", "is built for the CPU"),
        ("13.0", None, "warning", "none is visible"),
    ],
)
def test_a_gpu_that_torch_cannot_use(
    built: str | None,
    driver: str | None,
    verdict: str,
    words: str,
    tiny_model: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said = f"| NVIDIA-SMI 550.54  Driver Version: 550.54  CUDA Version: {driver} |" if driver else None
    monkeypatch.setattr(launch, "output", lambda argv: said if argv == ["nvidia-smi"] else None)
    monkeypatch.setattr("torch.version.cuda", built)
    gpu = found(tiny_model)["GPU"]
    assert gpu.verdict == verdict and words in gpu.words


@pytest.mark.parametrize(
    ("named", "verdict"), [(None, "ok"), ("lo-none", "problem"), ("^lo", "ok"), ("lo", "ok")]
)
def test_several_nodes_need_a_network_and_shared_memory(
    named: str | None, verdict: str, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "NCCL" not in found(tiny_model)
    monkeypatch.setenv("NNODES", "2")
    if named:
        monkeypatch.setenv("NCCL_SOCKET_IFNAME", named)
    assert found(tiny_model)["NCCL"].verdict == verdict
    disk = shutil.disk_usage("/dev/shm")._replace(total=64_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: disk)
    shared = found(tiny_model)["/dev/shm"]
    assert shared.verdict == "problem" and "64 MB" in shared.words and "--ipc=host" in shared.words


def test_the_disk_has_room_for_the_checkpoints(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert re.search(r"3 checkpoints take up to [\d.]+ GB", found(tiny_model)["disk"].words)
    full = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: full)
    disk = found(tiny_model)["disk"]
    assert disk.verdict == "warning" and "save_total_limit=1" in disk.words


def test_a_broken_deepspeed_file(tiny_model: Path, tmp_path: Path) -> None:
    broken = tmp_path / "zero.json"
    broken.write_text("{")
    recipe = found(tiny_model, deepspeed=str(broken))["recipe"]
    assert recipe.verdict == "problem" and f"{broken} is damaged" in recipe.words
