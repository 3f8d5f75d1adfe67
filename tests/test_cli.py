"""The command line on the user's mistakes: one line, the next command, exit code 2."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import BIN, record, write_json

from mcp_lora import config, runs
from mcp_lora.cli import main


@pytest.fixture(autouse=True)
def in_project(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project)
    monkeypatch.delenv("MODEL_PATH", raising=False)


def fail(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """Run a command that must fail by the user's mistake, and return what it says."""
    with pytest.raises(SystemExit) as caught:
        main(list(words))
    assert caught.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    return line


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["convert", "nowhere.json"], "no data in nowhere.json"),
        (["train", "lora_rank"], "not of the form key=value: lora_rank"),
        (["train", "--config", "nowhere.yaml"], "mcp-lora train --config FILE"),
        (["train", "lora_rang=3", "zzz=1"], "no key lora_rang (did you mean lora_rank?); LLaMA-Factory"),
        (["train", "--model", "./nowhere"], "there is no model in ./nowhere"),
        (["eval", "outputs/none"], "holds no run"),
        (["chat", "outputs/none"], "mcp-lora train --output"),
        (["export"], "outputs/mcp_lora holds no adapter"),
    ],
)
def test_a_mistake_is_one_line(capsys: pytest.CaptureFixture[str], words: list[str], said: str) -> None:
    assert said in fail(capsys, *words)


@pytest.mark.skipif(config.detect_machine().gpus > 0, reason="this machine has a GPU")
def test_a_big_model_without_a_gpu_is_refused_with_the_demos_command(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert "./scripts/train_lora.sh demo" in fail(capsys, "train")
    assert not Path("outputs").exists()


def test_a_dry_run_shows_all_and_writes_nothing(capsys: pytest.CaptureFixture[str], project: Path) -> None:
    before = sorted(project.rglob("*"))
    main_ok(["train", "--dry-run", "--zero", "0", "lora_rank=32", "--output", "outputs/here"])
    shown = capsys.readouterr()
    run_file = project / "outputs/here/run.yaml"
    _, text, command, environment, plan = shown.out.split("# ")
    assert "the config of Qwen/Qwen2.5-7B-Instruct is not here" in plan
    resolved = yaml.safe_load(text.partition("\n")[2])
    assert text.startswith(str(run_file))
    assert (resolved["lora_rank"], resolved["model_name_or_path"]) == (32, "Qwen/Qwen2.5-7B-Instruct")
    assert command.split() == ["command", str(BIN / "llamafactory-cli"), "train", str(run_file)]
    assert {"FORCE_TORCHRUN=1"} <= set(environment.splitlines())
    assert sorted(project.rglob("*")) == before
    if not config.detect_machine().gpus:
        assert "7.0 billion parameters" in shown.err and "use_cpu: true" in text


def test_an_old_run_is_pointed_out_before_anything_is_done(
    capsys: pytest.CaptureFixture[str], tiny_model: Path
) -> None:
    runs.write_config(Path("outputs/mcp_lora"), {})
    write_json(Path("outputs/mcp_lora/trainer_state.json"), {"epoch": 1.0})
    said = fail(capsys, "train", "--model", str(tiny_model))
    assert "a finished run" in said and "--resume" in said and "--overwrite" in said
    assert not Path("data/llama_factory").exists()


@pytest.mark.parametrize(
    "setting",
    ["dataset=other", "template=qwen", "tool_format=qwen", "packing=True", "streaming=True", "stage=dpo"],
)
def test_what_the_rendered_data_would_ignore_is_refused(
    capsys: pytest.CaptureFixture[str], tiny_model: Path, setting: str
) -> None:
    assert setting in fail(capsys, "train", "--model", str(tiny_model), setting)


def test_an_export_over_something_or_from_a_quantised_base_is_refused(
    capsys: pytest.CaptureFixture[str], tiny_model: Path
) -> None:
    run = Path("outputs/mcp_lora")
    runs.write_config(run, {"model_name_or_path": str(tiny_model)})
    write_json(run / "adapter_config.json", {})
    Path("outputs/merged_model").mkdir()
    assert "outputs/merged_model exists: mcp-lora export" in fail(capsys, "export")
    runs.write_config(run, {"model_name_or_path": str(tiny_model), "quantization_bit": 4})
    assert "quantised base" in fail(capsys, "export")


def test_an_evaluation_wants_held_out_questions(capsys: pytest.CaptureFixture[str], project: Path) -> None:
    source = write_json(project / "one.json", [record()])
    main_ok(["convert", str(source), "--out", "data/one"])
    runs.write_config(Path("outputs/one"), {"dataset_dir": "data/one"})
    assert "mcp-lora convert --test 0.1" in fail(capsys, "eval", "outputs/one")


def rows_with_faults(project: Path) -> str:
    return str(write_json(project / "rows.json", [record(), record(function_call={}), "text"]))


def table_rows(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if "│" in line]


def test_convert_prints_the_account(capsys: pytest.CaptureFixture[str], project: Path) -> None:
    main_ok(["convert", rows_with_faults(project)])
    shown = capsys.readouterr()
    assert table_rows(shown.out) == [
        ["rows.json", "filtered", "2", "0", "1", "1 no-call"],
        ["rows.json", "?", "1", "0", "0", "1 unknown-shape"],
    ]
    assert "read 3 rows = 1 in train + 2 rejected; 1 tools of 1 servers" in shown.err
    assert "data/llama_factory/rejected.jsonl" in shown.err
    assert "too little data for seen" in shown.err


@pytest.mark.parametrize(
    ("words", "code"),
    [
        ([], 0),
        (["--strict"], 1),
        (["--max-rejects", "1"], 1),
        (["--max-rejects", "2"], 0),
        (["--max-rejects", "50%"], 1),
        (["--max-rejects", "66.7%"], 0),
        (["--max-rejects", "many"], 2),
    ],
)
def test_rejections_can_be_bounded(
    capsys: pytest.CaptureFixture[str], project: Path, words: list[str], code: int
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["convert", rows_with_faults(project), *words])
    assert (caught.value.code or 0) == code
    if code == 1:
        assert "2 of 3 rows were rejected" in capsys.readouterr().err
        assert Path("data/llama_factory/rejected.jsonl").read_text()


def test_inputs_may_be_named_in_both_ways(capsys: pytest.CaptureFixture[str], project: Path) -> None:
    write_json(project / "other.json", [record("Add 3 and 4.")])
    main_ok(["convert", rows_with_faults(project), "other.json"])
    assert "read 4 rows = 2 in train" in capsys.readouterr().err


def test_inspect_shows_a_sample_as_the_engine_sees_it(
    capsys: pytest.CaptureFixture[str], tiny_model: Path
) -> None:
    main_ok(["convert"])
    sample = json.loads(Path("data/llama_factory/mcp_train_data.json").read_text())[1]
    capsys.readouterr()
    main_ok(["inspect", "2", "--model", str(tiny_model)])
    shown = capsys.readouterr()
    question, call = (turn["value"] for turn in sample["conversations"])
    assert f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n<tool_call>" in shown.out
    assert json.loads(call)["name"] in shown.out and "trained on" in shown.err
    main_ok(["inspect", "2", "--model", str(tiny_model), "--ids"])
    ids = capsys.readouterr().out.split()
    assert all(map(str.isdecimal, ids)) and f"{len(ids)} tokens" in shown.err
    assert "fewer than 999" in fail(capsys, "inspect", "999", "--model", str(tiny_model))
    assert "not nowhere" in fail(capsys, "inspect", "--split", "nowhere", "--model", str(tiny_model))


def test_inspect_as_json_is_what_is_trained(capsys: pytest.CaptureFixture[str], tiny_model: Path) -> None:
    from transformers import AutoTokenizer

    main_ok(["convert"])
    capsys.readouterr()
    main_ok(["inspect", "3", "--json", "--model", str(tiny_model)])
    found = json.loads(capsys.readouterr().out)
    assert list(found) == ["input_ids", "labels", "prompt", "target"]
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    assert tokenizer.decode(found["input_ids"]) == found["prompt"] + found["target"]
    assert tokenizer.decode([label for label in found["labels"] if label != -100]) == found["target"]


def test_inspect_says_why_a_row_is_left_out_and_what_is_lost(
    capsys: pytest.CaptureFixture[str], project: Path, tiny_model: Path
) -> None:
    main_ok(["convert"])
    recipe = project / "train_configs/lora_config.yaml"
    recipe.write_text(recipe.read_text().replace("cutoff_len: 4096", "cutoff_len: 500"))
    main_ok(["inspect", "--model", str(tiny_model)])
    assert "distractors are left out to fit" in capsys.readouterr().err
    recipe.write_text(recipe.read_text().replace("cutoff_len: 500", "cutoff_len: 50"))
    said = fail(capsys, "inspect", "--model", str(tiny_model))
    assert "row 1 of train is left out: " in said and "cutoff_len is 50" in said


def test_a_traceback_comes_on_request(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fail(capsys, "convert", "nowhere.json")
    monkeypatch.setenv("MCP_LORA_TRACEBACK", "1")
    with pytest.raises(SystemExit):
        main(["convert", "nowhere.json"])
    assert "Traceback" in capsys.readouterr().err


def test_help_imports_no_engine() -> None:
    script = (
        "import sys\nfrom mcp_lora.cli import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "print(*{'torch', 'transformers', 'llamafactory', 'peft', 'rich.console'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] in ("", "rich.console")  # Typer draws its help with rich


def main_ok(words: list[str]) -> None:
    """Run a command that must end well."""
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code in (0, None)


def test_a_plan_counts_the_steps_of_what_is_converted(
    capsys: pytest.CaptureFixture[str], project: Path, tiny_model: Path
) -> None:
    main_ok(["convert", "--test", "0"])
    words = ["train", "--dry-run", "--model", str(tiny_model), "--global-batch", "8"]
    capsys.readouterr()
    main_ok([*words, "val_size=0", "num_train_epochs=2"])
    plan = capsys.readouterr().out.split("# plan\n")[1]
    assert "steps: 6, of 24 samples in batches of 8" in plan
    main_ok([*words, "val_size=0.25", "max_steps=5"])
    assert "steps: 5, of 18 samples in batches of 8" in capsys.readouterr().out


def test_a_model_that_cannot_be_built_still_has_a_plan(
    capsys: pytest.CaptureFixture[str], project: Path
) -> None:
    write_json(project / "odd/config.json", {"model_type": "bert", "num_hidden_layers": 2})
    main_ok(["train", "--dry-run", "--model", "./odd"])
    assert "memory: not known, " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["gradient_accumulation_steps=two"], "gradient_accumulation_steps=two is no number"),
        (["per_device_train_batch_size=0"], "per_device_train_batch_size=0 is no whole number from 1"),
        (["deepspeed=nowhere.json"], "there is no nowhere.json"),
    ],
)
def test_a_setting_that_cannot_be_is_refused(
    capsys: pytest.CaptureFixture[str], project: Path, words: list[str], said: str
) -> None:
    assert said in fail(capsys, "train", "--dry-run", *words)
