import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT

from mcp_lora.engine import api
from mcp_lora.errors import McpLoraError
from mcp_lora.train import machine, recipe
from mcp_lora.train.machine import Machine

GPU = Machine(gpus=1, bf16=True, deepspeed=True)
PRESETS = sorted((ROOT / "train_configs").glob("*.yaml"))


@pytest.fixture(autouse=True)
def in_project(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project)


def resolve(*sources: Any) -> tuple[dict[str, Any], list[str]]:
    """The resolved configuration, and what is said of it."""
    said: list[str] = []
    return recipe.resolve(*sources, said.append), said


def test_the_recipe_is_the_papers() -> None:
    resolved, notes = resolve(recipe.RECIPE, {}, [], {}, GPU)
    assert notes == [] and "disable_gradient_checkpointing" not in resolved
    table_12 = yaml.safe_load(
        """{model_name_or_path: Qwen/Qwen2.5-7B-Instruct, lora_rank: 64, lora_alpha: 128, lora_dropout: 0.1,
        lora_target: all, learning_rate: 2.0e-4, lr_scheduler_type: cosine, warmup_steps: 0.1,
        optim: adamw_torch, per_device_train_batch_size: 16, gradient_accumulation_steps: 8,
        num_train_epochs: 1.0, bf16: true, cutoff_len: 4096, val_size: 0.1, eval_steps: 50,
        logging_steps: 10, save_steps: 100, save_total_limit: 3, plot_loss: true}"""
    )
    assert {key: resolved[key] for key in table_12} == table_12
    assert resolved["output_dir"] == str(Path("outputs/mcp_lora").absolute())
    zero = json.loads(Path(resolved["deepspeed"]).read_text())
    assert zero["zero_optimization"]["stage"] == 0


def test_later_sources_win() -> None:
    file = Path("train_configs/mine.yaml")
    file.write_text("model_name_or_path: org/file\nlora_rank: 32\nlearning_rate: 1e-4\n")

    def model(environment: dict[str, str], overrides: list[str], flag: str | None) -> Any:
        flags = {"model_name_or_path": flag}
        return resolve(file, environment, overrides, flags, GPU)[0]["model_name_or_path"]

    environment, word = {"MODEL_PATH": "org/variable"}, ["model_name_or_path=org/word"]
    assert model({}, [], None) == "org/file"
    assert model(environment, [], None) == "org/variable"
    assert model(environment, word, None) == "org/word"
    assert model(environment, word, "org/flag") == "org/flag"
    edited = resolve(file, {}, ["lora_rank=16"], {}, GPU)[0]
    assert (edited["lora_rank"], edited["learning_rate"]) == (16, 1e-4)


def test_an_override_is_typed() -> None:
    values = {
        "1": 1,
        "1e-4": 1e-4,
        "2.0E+3": 2000.0,
        "true": True,
        "[q, v]": ["q", "v"],
        "x=y": "x=y",
        "": None,
    }
    for text, value in values.items():
        assert recipe.parse_overrides([f"a={text}"]) == {"a": value}


def test_a_strategy_can_be_no() -> None:
    assert recipe.parse_overrides(["save_strategy=no", "fp16=no"]) == {"save_strategy": "no", "fp16": False}
    Path("mine.yaml").write_text("eval_strategy: no\n")
    assert recipe.read_config(Path("mine.yaml")) == {"eval_strategy": "no"}


def test_a_recipe_may_refer_to_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUNS", "/scratch/runs")
    Path("mine.yaml").write_text("output_dir: ${oc.env:RUNS}/one\n")
    assert recipe.read_config(Path("mine.yaml")) == {"output_dir": "/scratch/runs/one"}
    with pytest.raises(McpLoraError, match="a value is not YAML"):
        recipe.parse_overrides(["output_dir=${oc.env:NO_SUCH_VARIABLE}"])


def test_a_folder_may_be_a_number() -> None:
    Path("mine.yaml").write_text("model_name_or_path: 7\ndataset_dir: 1\n")
    found = resolve(Path("mine.yaml"), {}, ["output_dir=2025"], {}, GPU)[0]
    assert found["output_dir"] == str(Path("2025").absolute())
    assert found["dataset_dir"] == str(Path("1").absolute())


@pytest.mark.parametrize("words", [["lora_rank", "32"], ["--rank=3"], ["a=[1"]])
def test_a_word_of_another_form_is_refused(words: list[str]) -> None:
    with pytest.raises(McpLoraError, match="mcp-lora train"):
        recipe.parse_overrides(words)


@pytest.mark.parametrize("content", [b"- a list", b"a: [1", b"", b"a: \xff\xfe"])
def test_a_file_of_another_form_is_refused(content: bytes) -> None:
    with pytest.raises(McpLoraError, match="mcp-lora train --config FILE"):
        recipe.read_config(Path("bad.yaml"))
    Path("bad.yaml").write_bytes(content)
    with pytest.raises(McpLoraError, match=r"bad\.yaml"):
        recipe.read_config(Path("bad.yaml"))


@pytest.mark.parametrize(
    ("machine", "expected"),
    [
        (Machine(1, False, True), {"bf16": False, "fp16": True}),  # an older GPU
        (Machine(0, False, True), {"bf16": False, "fp16": False, "use_cpu": True}),  # bf16 is emulated
        (Machine(0, True, True), {"bf16": True, "fp16": False, "use_cpu": True}),
    ],
)
def test_the_precision_is_what_the_machine_computes_in(machine: Machine, expected: dict[str, bool]) -> None:
    resolved, notes = resolve(recipe.RECIPE, {}, [], {}, machine)
    assert {key: resolved[key] for key in ("bf16", "fp16", "use_cpu") if key in resolved} == expected
    assert machine.bf16 or notes[0].startswith("bf16 is not supported: training in fp")


def test_a_cpu_trains_one_sample_at_a_time_without_dropout_and_deepspeed_unless_told() -> None:
    keys = ("per_device_train_batch_size", "gradient_accumulation_steps", "lora_dropout")
    cpu = Machine(0, True, True)
    resolved, notes = resolve(recipe.RECIPE, {}, [], {}, cpu)
    assert [resolved[key] for key in keys] == [1, 128, 0.0]
    assert resolved["disable_gradient_checkpointing"] is True
    assert "disable_gradient_checkpointing=false" in notes[1]
    assert "per_device_train_batch_size=16" in notes[2] and "lora_dropout=0.1" in notes[3]
    assert "deepspeed" not in resolved and "--zero 0" in notes[4]
    words = ["per_device_train_batch_size=16", "lora_dropout=0.1", "disable_gradient_checkpointing=false"]
    zero = {"deepspeed": str(recipe.ZERO)}
    resolved, notes = resolve(recipe.RECIPE, {}, words, zero, cpu)
    assert [resolved[key] for key in keys] == [16, 8, 0.1] and len(notes) == 1
    assert resolved["disable_gradient_checkpointing"] is False
    assert Path(resolved["deepspeed"]).name == "ds_z0_config.json"
    resolved, _ = resolve(recipe.RECIPE, {}, ["gradient_accumulation_steps=2"], {}, cpu)
    assert [resolved[key] for key in keys] == [16, 2, 0.0]


def test_a_gpu_uses_what_is_installed_unless_told_otherwise() -> None:
    rich = Machine(1, True, True, flash_attention=True, liger=True)
    resolved, notes = resolve(recipe.RECIPE, {}, [], {}, rich)
    assert (resolved["flash_attn"], resolved["enable_liger_kernel"]) == ("fa2", True)
    assert "flash_attn=auto" in notes[0] and "enable_liger_kernel=false" in notes[1]
    words = ["flash_attn=auto", "enable_liger_kernel=false"]
    resolved, notes = resolve(recipe.RECIPE, {}, words, {}, rich)
    assert (resolved["flash_attn"], resolved["enable_liger_kernel"], notes) == ("auto", False, [])
    for poor in (GPU, Machine(0, True, True, True, True)):
        assert not {"flash_attn", "enable_liger_kernel"} & resolve(recipe.RECIPE, {}, [], {}, poor)[0].keys()
    older = resolve(recipe.RECIPE, {}, [], {}, Machine(1, False, True, True, False))[0]
    assert "flash_attn" not in older


def test_without_deepspeed_the_key_goes() -> None:
    resolved, notes = resolve(recipe.RECIPE, {}, [], {}, Machine(1, True, False))
    assert "deepspeed" not in resolved and len(notes) == 1


def test_a_local_model_is_looked_at_and_a_hub_id_is_not(tiny_model: Path) -> None:
    assert recipe.missing_model("Qwen/Qwen2.5-7B-Instruct") is None
    assert recipe.missing_model(str(tiny_model)) is None
    for model in ("/nowhere/model", "./model", "a/b/c", "D:\\Models\\Qwen", "train_configs"):
        assert recipe.missing_model(model) == f"there is no model in {model} (no config.json)"


def test_parameters_are_counted_in_the_files_or_read_off_the_name(tiny_model: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    assert machine.parameters(str(tiny_model)) == model.num_parameters()
    assert machine.parameters("org/Qwen2.5-0.5B") == 0.5e9
    assert machine.parameters("embedded") is None
    (tmp_path / "model.safetensors").write_bytes((tiny_model / "model.safetensors").read_bytes()[:-1])
    with pytest.raises(McpLoraError, match="model.safetensors is damaged"):
        machine.parameters(str(tmp_path))


def test_a_big_model_wants_a_gpu() -> None:
    said = machine.too_big("Qwen/Qwen2.5-7B-Instruct", Machine(0, False, True))
    assert said and "7.0 billion" in said and machine.DEMO in said
    assert machine.too_big("Qwen/Qwen2.5-7B-Instruct", GPU) is None
    assert machine.too_big("Qwen/Qwen2.5-0.5B-Instruct", Machine(0, False, True)) is None


def test_every_preset_names_its_command_and_is_accepted_by_the_engine(tmp_path: Path) -> None:
    """In a process of its own: the engine's parser sets up devices and DeepSpeed."""
    made = []
    for preset in PRESETS:
        head = preset.read_text(encoding="utf-8").split("\n\n")[0]
        assert all(line.startswith("#") for line in head.splitlines()) and "mcp-lora train" in head
        resolved, _ = resolve(preset, {}, [], {}, machine.detect_machine())
        assert api.problems(resolved) == [], preset
        made.append(tmp_path / preset.name)
        made[-1].write_text(api.dump(resolved))
    check = (
        "import sys, yaml; from llamafactory.hparams.parser import _parse_train_args as parse\n"
        "for file in sys.argv[1:]: print(file, parse(yaml.safe_load(open(file)))[3].lora_rank)"
    )
    done = subprocess.run([sys.executable, "-c", check, *made], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(made) == 3 and done.stdout.splitlines()[-3:] == [f"{file} 64" for file in made]


def test_the_dump_is_yaml_that_comes_back() -> None:
    values = {"learning_rate": 2e-4, "path": "C:\\a b", "none": None, "名": "值"}
    assert yaml.safe_load(api.dump(values)) == values


def test_a_key_that_stands_twice_is_refused(tmp_path: Path) -> None:
    (tmp_path / "twice.yaml").write_text("lora_rank: 8\nbf16: true\nlora_rank: 64\n")
    with pytest.raises(McpLoraError, match="duplicate key lora_rank"):
        recipe.read_config(tmp_path / "twice.yaml")
    (tmp_path / "merged.yaml").write_text("a: &a {lora_rank: 8}\nb: {<<: *a, lora_rank: 64}\n")
    assert recipe.read_config(tmp_path / "merged.yaml")["b"] == {"lora_rank": 64}


def test_a_long_value_is_no_path() -> None:
    given = [f'deepspeed="{{{" " * 300}}}"', "output_dir=~nosuchuser/x"]
    found, _ = resolve(ROOT / "train_configs/lora_config.yaml", {}, given, {}, Machine(1, True, True))
    assert found["deepspeed"].startswith("{") and found["output_dir"].endswith("~nosuchuser/x")


def test_what_the_environment_and_the_system_change_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve(recipe.RECIPE, {"MODEL_PATH": "org/variable"}, [], {}, GPU)[1] == [
        "the model is org/variable, from MODEL_PATH in the environment"
    ]
    monkeypatch.setattr(sys, "platform", "darwin")
    notes = resolve(recipe.RECIPE, {}, [], {}, Machine(gpus=0, bf16=False, deepspeed=False))[1]
    assert "no CUDA device (Apple's GPU is not used): training on the CPU" in notes


def test_a_recipe_is_found_by_its_name_and_the_projects_own_first(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert recipe.find(Path("qlora")) == Path("train_configs/qlora.yaml")
    monkeypatch.chdir(tmp_path)
    assert recipe.find(Path("qlora")) == ROOT / "train_configs/qlora.yaml"
    assert recipe.find(recipe.ZERO) == ROOT / recipe.ZERO
    assert recipe.find(Path("nosuch")) == Path("nosuch")
