"""The command line on the user's mistakes: one line, the next command, exit code 2."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import typer
import yaml
from conftest import BIN, ROOT, record, write_json

from mcp_lora.cli import console
from mcp_lora.cli.app import app, main
from mcp_lora.data import dataset
from mcp_lora.errors import Interrupted
from mcp_lora.evaluate.evaluation import Evaluation, Weakness
from mcp_lora.evaluate.stats import Proportion
from mcp_lora.train import machine, runs

Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def in_project(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project)
    monkeypatch.delenv("MODEL_PATH", raising=False)


def main_ok(words: list[str]) -> None:
    """Run a command that must end well."""
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code in (0, None)


def fail(capsys: Capture, *words: str) -> str:
    """Run a command that must fail by the user's mistake, and return what it says."""
    with pytest.raises(SystemExit) as caught:
        main(list(words))
    assert caught.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    return line


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("convert nowhere.json", "no data in nowhere.json"),
        ("train lora_rank", "not of the form key=value: lora_rank"),
        ("train --config nowhere.yaml", "mcp-lora train --config FILE"),
        ("train lora_rang=3 zzz=1", "no key lora_rang (did you mean lora_rank?); LLaMA-Factory"),
        ("train --model ./nowhere", "there is no model in ./nowhere"),
        (
            "train --dry-run gradient_accumulation_steps=two",
            "gradient_accumulation_steps=two is not a number",
        ),
        ("train --dry-run lora_rank=abc", "lora_rank=abc is not an int"),
        ("train --dry-run lora_rank=08", "lora_rank=08 is not an int"),
        ("train --dry-run quantization_type=nf4", "no effect without quantization_bit"),
        ("train --tokens-per-second 3000", "mcp-lora train --dry-run --tokens-per-second 3000"),
        ("train --dry-run --model ~nosuchuser/model", "there is no model in ~nosuchuser/model"),
        ("train --dry-run --resume --overwrite", "use only one of them"),
        ("eval --require seen.acuracy>=0.6", "--require seen.acuracy>=0.6: a metric is SPLIT.NAME"),
        (f"convert {'x' * 300}", f"no data in {'x' * 300}"),
        ("train --dry-run per_device_train_batch_size=0", "size=0 is not a positive integer"),
        ("train --dry-run deepspeed=nowhere.json", "there is no nowhere.json"),
        ("eval outputs/none", "contains no run"),
        ("eval --endpoint URL", "mcp-lora eval --endpoint URL --endpoint-model NAME"),
        ("eval --base-only --adapter-only", "exclude each other"),
        ("chat outputs/none", "mcp-lora train --output"),
        ("export", "outputs/mcp_lora contains no adapter"),
        (
            "recipe nosuch",
            "there is no recipe nosuch (No such file or directory): mcp-lora recipe lora_config",
        ),
        # what the rendered data would ignore
        ("train dataset=other", "dataset=other"),
        ("train template=qwen", "template=qwen"),
        ("train tool_format=qwen", "tool_format=qwen"),
        ("train packing=True", "packing=True"),
        ("train streaming=True", "streaming=True"),
        ("train stage=dpo", "stage=dpo"),
        # what would make no adapter
        ("train do_train=false", "nothing is trained without do_train=true"),
        ("train finetuning_type=full", "finetuning_type=full does not train a LoRA adapter"),
        ("train finetuning_type=oft", "set finetuning_type=lora"),
    ],
)
def test_a_mistake_is_one_line_before_anything_is_done(capsys: Capture, words: str, said: str) -> None:
    assert said in fail(capsys, *words.split())
    assert not Path("data/llama_factory").exists() and not Path("outputs").exists()


@pytest.mark.parametrize("words", [["convert", ""], ["train", "--data", ""], ["train", "--data="]])
def test_an_empty_argument_is_an_unset_variable(capsys: Capture, words: list[str]) -> None:
    said = fail(capsys, *words)
    assert "unset variable?" in said and words[-2 if len(words) > 2 else -1] in said


def test_an_interruption_names_the_command_that_goes_on(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted() -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr("mcp_lora.engine.api.require", interrupted)
    # nothing has been trained yet: the same once more
    for words in (["train", "--overwrite", "lora_rank=8"], ["eval", "my run", "--limit", "3"]):
        with pytest.raises(SystemExit) as caught:
            main(words)
        assert caught.value.code == 128 + signal.SIGTERM
        assert f"to continue: {shlex.join(['mcp-lora', *words])}\n" in capsys.readouterr().err

    def trained(*arguments: object) -> None:
        interruption = Interrupted(130)
        interruption.option = "--resume"
        raise interruption

    monkeypatch.setattr("mcp_lora.train.training.train", trained)
    with pytest.raises(SystemExit):
        main(["--quiet", "train", "--overwrite"])
    assert "to continue: mcp-lora --quiet train --resume\n" in capsys.readouterr().err


def test_a_run_yaml_as_recipe_brings_nothing_that_its_run_has_set(capsys: Capture, project: Path) -> None:
    recipe = yaml.safe_load(Path("train_configs/demo.yaml").read_text())
    of_run = {"template": "empty", "tokenized_path": "rendered/9c", "disable_shuffling": True}
    of_run["resume_from_checkpoint"] = "outputs/x/checkpoint-2"
    runs.write_config(project / "outputs/x", recipe | of_run)
    said = fail(capsys, "train", "--config", "outputs/x/run.yaml", "--output", "outputs/y")
    for key, value in of_run.items():
        assert re.search(rf"{key}={value}\b[^:;]*: leave it out", said), key
    # an order of one's own
    runs.write_config(project / "mine", recipe | {"disable_shuffling": True})
    main_ok(["train", "--dry-run", "--config", "mine/run.yaml"])


@pytest.mark.skipif(machine.detect_machine().gpus > 0, reason="this machine has a GPU")
def test_a_big_model_without_a_gpu_is_refused_with_the_demos_command(capsys: Capture) -> None:
    assert "mcp-lora demo" in fail(capsys, "train")
    assert not Path("outputs").exists()


def test_a_dry_run_shows_all_and_writes_nothing(capsys: Capture, project: Path) -> None:
    before = sorted(project.rglob("*"))
    main_ok(["train", "--dry-run", "--zero", "0", "lora_rank=32", "--output", "outputs/here"])
    shown = capsys.readouterr()
    run_file = project / "outputs/here/run.yaml"
    _, text, command, environment, plan = shown.out.split("# ")
    assert "the config of Qwen/Qwen2.5-7B-Instruct is not on this machine" in plan
    resolved = yaml.safe_load(text.partition("\n")[2])
    assert text.startswith(str(run_file))
    assert (resolved["lora_rank"], resolved["model_name_or_path"]) == (32, "Qwen/Qwen2.5-7B-Instruct")
    assert shlex.split(command) == ["command", str(BIN / "llamafactory-cli"), "train", str(run_file)]
    assert {"FORCE_TORCHRUN=1"} <= set(environment.splitlines())
    assert sorted(project.rglob("*")) == before
    if not machine.detect_machine().gpus:
        assert "7.0 billion parameters" in shown.err and "use_cpu: true" in text


def test_an_old_run_is_pointed_out_before_anything_is_done(capsys: Capture, tiny_model: Path) -> None:
    runs.write_config(Path("outputs/mcp_lora"), {})
    write_json(Path("outputs/mcp_lora/trainer_state.json"), {"epoch": 1.0})
    said = fail(capsys, "train", "--model", str(tiny_model))
    assert "a finished run" in said and "--resume" in said and "--overwrite" in said
    assert not Path("data/llama_factory").exists()


def test_an_export_over_something_or_from_a_quantized_base_is_refused(
    capsys: Capture, tiny_model: Path
) -> None:
    run = Path("outputs/mcp_lora")
    runs.write_config(run, {"model_name_or_path": str(tiny_model)})
    write_json(run / "adapter_config.json", {})
    Path("outputs/merged_model").mkdir()
    assert "outputs/merged_model exists: mcp-lora export" in fail(capsys, "export")
    runs.write_config(run, {"model_name_or_path": str(tiny_model), "quantization_bit": 4})
    assert "quantized base" in fail(capsys, "export")


def test_an_evaluation_wants_held_out_questions(capsys: Capture, project: Path) -> None:
    source = write_json(project / "few.json", [record(f"Add {number}.") for number in range(6)])
    main_ok(["convert", str(source), "--output", "data/one", "--test", "0.01", "--seed", "7"])
    runs.write_config(Path("outputs/one"), {"dataset_dir": "data/one"})
    said = fail(capsys, "eval", "outputs/one")
    command = shlex.split(said[said.index("mcp-lora convert") : said.index(", and train again")])
    main_ok(command[1:])  # which works as it is
    assert "seen" in dataset.names(Path("data/one"))


def test_every_command_that_a_message_names_can_be_given() -> None:
    group = typer.main.get_command(app)
    named = 0
    for file in (ROOT / "src/mcp_lora").rglob("*.py"):
        for verb, rest in re.findall(r"mcp-lora ([a-z]+)((?: [^\s\"'`,;:()]+)*)", file.read_text("utf-8")):
            if verb in group.commands:
                known = {option for one in group.commands[verb].params for option in one.opts}
                given = {word for word in rest.split() if word.startswith("--")}
                assert given <= known | {"--help"}, f"{file.name}: mcp-lora {verb}{rest}"
                named += 1
    assert named > 60


def test_what_comes_out_of_data_does_not_command_a_terminal(capsys: Capture, project: Path) -> None:
    write_json(project / "[red] x/rows.json", [record("\x1b[2J Add."), record(tool="\x1b]0;x\x07")])
    main_ok(["convert", "[red] x"])
    shown = capsys.readouterr()
    assert "[red] x" in shown.out and "\x1b" not in shown.out + shown.err


def test_no_output_commands_a_terminal(capsys: Capture, project: Path, tiny_model: Path) -> None:
    strange = "\x9b2J\x1b]0;x\x07"
    row = record(f"Add 1 and 2. {strange}")
    write_json(project / "rows.json", [row, *(record(f"Add {number} and 2.") for number in range(3, 9))])
    main_ok(["convert", "rows.json", "--explain", "1"])
    main_ok(["convert", "rows.json", "--test", "0"])
    main_ok(["inspect", "--model", str(tiny_model)])
    capsys.readouterr()
    main_ok(["inspect", "--json", "--model", str(tiny_model)])
    shown = capsys.readouterr().out
    assert not re.search(r"[\x1b\x80-\x9f]", shown) and strange in json.loads(shown)["prompt"]
    weakest = [Weakness(strange, strange, {"adapter": Proportion(0, 1, 0.0, 0.0, 0.0)})]
    console.show_evaluation(Evaluation({}, [], weakest, {"adapter": []}))
    shown = capsys.readouterr().out
    assert "Tools that need more data" in shown and not re.search(r"[\x1b\x9b]", shown)


@pytest.fixture
def faulty(project: Path) -> str:
    """A file of three rows, of which one can be used."""
    return str(write_json(project / "rows.json", [record(), record(function_call={}), "text"]))


def test_convert_prints_the_statistics(capsys: Capture, project: Path, faulty: str) -> None:
    main_ok(["convert", faulty])
    shown = capsys.readouterr()
    cells = [
        [cell.strip() for cell in line.split("│")[1:-1]] for line in shown.out.splitlines() if "│" in line
    ]
    assert cells == [
        ["rows.json", "filtered", "2", "0", "1", "1 no-call"],
        ["rows.json", "?", "1", "0", "0", "1 unknown-format"],
    ]
    assert "read 3 rows = 1 in train + 2 rejected; 1 tools of 1 servers" in shown.err
    assert "data/llama_factory/rejected.jsonl" in shown.err
    assert "too little data for split seen" in shown.err
    write_json(project / "other.json", [record("Add 3 and 4.")])
    main_ok(["convert", faulty, "other.json"])  # absolute and relative
    assert "read 4 rows = 2 in train" in capsys.readouterr().err


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
def test_rejections_can_be_bounded(capsys: Capture, faulty: str, words: list[str], code: int) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["convert", faulty, *words])
    assert (caught.value.code or 0) == code
    if code == 1:
        assert "2 of 3 rows were rejected" in capsys.readouterr().err
        assert Path("data/llama_factory/rejected.jsonl").read_text()


def test_a_percentage_of_rejections_is_not_rounded_down(capsys: Capture, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(record()) + "\n" + "1\n" * 9_999)
    with pytest.raises(SystemExit):
        main(["convert", str(file), "--output", str(tmp_path / "out"), "--max-rejects", "0.57%"])
    assert "at most 57 may be" in capsys.readouterr().err


def test_inspect_shows_a_sample_as_the_engine_sees_it(
    capsys: Capture, project: Path, tiny_model: Path
) -> None:
    from transformers import AutoTokenizer

    def inspect(*words: str) -> str:
        capsys.readouterr()
        main_ok(["inspect", *words, "--model", str(tiny_model)])
        shown = capsys.readouterr()
        return shown.out + shown.err

    main_ok(["convert"])
    sample = json.loads(Path("data/llama_factory/mcp_train_data.json").read_text())[1]
    question, call = (turn["value"] for turn in sample["conversations"])
    shown = inspect("2")
    assert f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n⟦<tool_call>" in shown
    assert json.loads(call)["name"] in shown and "trained on" in shown
    found = json.loads(inspect("2", "--json"))
    assert list(found) == ["input_ids", "labels", "prompt", "target"]
    assert " ".join(re.sub("[⟦⟧]", "", inspect("2", "--ids")).split()).startswith(
        " ".join(map(str, found["input_ids"]))
    )
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    assert tokenizer.decode(found["input_ids"]) == found["prompt"] + found["target"]
    assert tokenizer.decode([label for label in found["labels"] if label != -100]) == found["target"]
    assert "fewer than 999" in fail(capsys, "inspect", "999", "--model", str(tiny_model))
    assert "not nowhere" in fail(capsys, "inspect", "--split", "nowhere", "--model", str(tiny_model))
    # what is lost, and why a row is left out
    recipe = project / "train_configs/lora_config.yaml"
    recipe.write_text(recipe.read_text().replace("cutoff_len: 4096", "cutoff_len: 500"))
    assert "distractors are left out to fit" in inspect()
    recipe.write_text(recipe.read_text().replace("cutoff_len: 500", "cutoff_len: 50"))
    said = fail(capsys, "inspect", "--model", str(tiny_model))
    assert "row 1 of train is left out: " in said and "cutoff_len is 50" in said


def test_a_traceback_comes_on_request(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    fail(capsys, "convert", "nowhere.json")
    monkeypatch.setenv("MCP_LORA_TRACEBACK", "1")
    with pytest.raises(SystemExit):
        main(["convert", "nowhere.json"])
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "allowed"), [("--help", set()), ("train --dry-run --model", {"torch", "transformers"})]
)
def test_the_engine_is_not_imported(words: str, allowed: set[str], tiny_model: Path) -> None:
    script = (
        "import sys\nfrom mcp_lora.cli.app import main\n"
        "try: main(sys.argv[1:])\nexcept SystemExit: pass\n"
        "print(*{'torch', 'transformers', 'llamafactory', 'peft'} & sys.modules.keys())"
    )
    argv = [sys.executable, "-c", script, *words.split(), tiny_model]
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    assert set(done.stdout.splitlines()[-1].split()) == allowed


def test_a_model_that_cannot_be_built_still_has_a_plan(capsys: Capture, project: Path) -> None:
    write_json(project / "odd/config.json", {"model_type": "bert", "num_hidden_layers": 2})
    main_ok(["train", "--dry-run", "--model", "./odd"])
    assert "memory: not known, " in capsys.readouterr().out


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no device that is always full")
@pytest.mark.parametrize("words", [["--help"], ["convert"]])
def test_an_output_on_a_full_disk_is_one_line(words: list[str]) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run([BIN / "mcp-lora", *words], stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "mcp-lora: error: the output cannot be read or written (No space left on device)" in done.stderr


def test_quiet_may_follow_the_command(capsys: Capture) -> None:
    main_ok(["train", "--dry-run", "per_device_train_batch_size=1"])
    assert "mcp-lora: " in capsys.readouterr().err
    main_ok(["train", "--dry-run", "per_device_train_batch_size=1", "-q"])
    shown = capsys.readouterr()
    assert "# plan" in shown.out and all("warning: " in line for line in shown.err.splitlines())


def test_a_report_is_written_where_it_is_wanted(capsys: Capture) -> None:
    runs.write_config(Path("outputs/mcp_lora"), {"model_name_or_path": "m"})
    main_ok(["report", "-o", "page.html"])
    assert "the report is page.html" in capsys.readouterr().err and Path("page.html").is_file()
    assert not Path("outputs/mcp_lora/report.html").exists()


def test_a_recipe_is_printed_as_it_is(capsys: Capture) -> None:
    main_ok(["recipe", "qlora"])
    assert capsys.readouterr().out == Path("train_configs/qlora.yaml").read_text("utf-8")


def test_names_of_earlier_versions_are_output(capsys: Capture) -> None:
    main_ok(["convert", "--out", "somewhere"])
    assert Path("somewhere/train.jsonl").is_file()
    Path("outputs/mcp_lora").mkdir(parents=True)
    Path("outputs/mcp_lora/adapter_config.json").write_text("{}")
    Path("outputs/mcp_lora/run.yaml").write_text("model_name_or_path: org/model")
    assert "somewhere exists: mcp-lora export" in fail(capsys, "export", "--to", "somewhere")


@pytest.mark.parametrize("rank", [None, "1"])
def test_an_error_of_the_engine_or_the_hub_is_no_full_disk(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch, rank: str | None
) -> None:
    def raised(*arguments: object) -> None:
        raise FileNotFoundError(2, "No such file or directory", "nvcc") if rank else ConnectionError("no hub")

    monkeypatch.setattr("mcp_lora.train.training.train", raised)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE") if rank else ():
        monkeypatch.setenv(name, rank or "")
    with pytest.raises(OSError, match="nvcc" if rank else "no hub"):  # with its traceback, on every rank
        main(["train"])
