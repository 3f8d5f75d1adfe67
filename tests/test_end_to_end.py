"""The whole way with the real engine, on a tiny model, in a folder with a space in its path."""

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
from pathlib import Path

import psutil
import pytest
import torch
from conftest import BIN, ROOT, collated, collated_by, environment, make_project, run
from transformers import AutoModelForCausalLM

from mcp_lora.data import dataset
from mcp_lora.prompts import chat_template
from mcp_lora.serve import verify
from mcp_lora.train import runs

# The recipe, with its validation, on little data.
SMALL = [
    "per_device_train_batch_size=2",
    "gradient_accumulation_steps=2",
    "logging_steps=1",
    "eval_steps=2",
    "preprocessing_num_workers=1",
    "lora_dropout=0.1",
]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A project folder with a finished run in outputs/mcp_lora."""
    folder = make_project(tmp_path_factory.mktemp("home") / "my project")
    done = succeed(folder, "train", "--model", tiny_model, *SMALL)
    assert "read 24 rows" in done.stderr
    return folder


def succeed(folder: Path, *words: object, stdin: str = "") -> subprocess.CompletedProcess[str]:
    done = run([BIN / "mcp-lora", *words], folder, stdin)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def steps(output: Path) -> int:
    return int(json.loads((output / "trainer_state.json").read_text())["global_step"])


def started(argv: list[object], folder: Path, **variables: str) -> subprocess.Popen[str]:
    output = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    return subprocess.Popen(
        list(map(str, argv)), cwd=folder, text=True, env=environment(**variables), **output
    )


@pytest.fixture
def aborting(tmp_path: Path) -> dict[str, str]:
    """Variables with which each rank aborts at exit, as one in some hundred does on a CPU: in a thread of
    gloo's that asks for the lock of an interpreter which is no more."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys\n"
        "class Thread:\n"
        "    def __del__(self, write=os.write, abort=os.abort):\n"
        "        write(2, b'terminate called without an active exception\\n')\n"
        "        abort()\n"
        "is_rank = 'LOCAL_RANK' in os.environ and 'train_lora.py' not in ' '.join(sys.orig_argv)\n"
        "thread = Thread() if is_rank else None\n"
    )
    return {"PYTHONPATH": str(tmp_path)}


def test_a_run_leaves_what_the_guide_names(project: Path) -> None:
    output = project / "outputs/mcp_lora"
    expected = {"run.yaml", f"checkpoint-{steps(output)}", "training_loss.png", "training_args.bin"}
    assert expected | {"adapter_model.safetensors", "adapter_config.json"} <= set(os.listdir(output))
    assert (project / "data/llama_factory/mcp_train_data.json").is_file()
    adapter = json.loads((output / "adapter_config.json").read_text())
    assert (adapter["r"], adapter["lora_alpha"], adapter["lora_dropout"]) == (64, 128, 0.1)
    linear = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert set(adapter["target_modules"]) == linear


def test_the_engine_trains_on_what_the_chat_template_renders(project: Path, tiny_model: Path) -> None:
    output = project / "outputs/mcp_lora"
    template = chat_template.load({"model_name_or_path": str(tiny_model)})
    lines = (project / "data/llama_factory/train.jsonl").read_text(encoding="utf-8").splitlines()
    rendered = [sample for line in lines for sample in template.encode(json.loads(line))]
    trained = collated(output / "run.yaml")
    assert 0 < len(trained) < len(rendered)  # the recipe holds some rows out for validation
    expected = {(tuple(sample.input_ids), tuple(sample.labels)) for sample in rendered}
    assert {(tuple(ids), tuple(labels)) for ids, labels in trained} <= expected
    text = template.tokenizer.decode([label for label in trained[0][1] if label != chat_template.IGNORED])
    assert text.startswith("<tool_call>\n{") and text.endswith("}\n</tool_call><|im_end|>")
    # the tiny model knows no tools: what it is to be served with lies with the adapter
    for folder in (output, output / f"checkpoint-{steps(output)}"):
        beside = (folder / "chat_template.jinja").read_text(encoding="utf-8")
        assert beside == template.tokenizer.chat_template


def test_a_batch_has_the_loss_of_its_samples(project: Path, tiny_model: Path) -> None:
    run_yaml = project / "outputs/mcp_lora/run.yaml"
    assert runs.read_run(run_yaml.parent)["disable_shuffling"]  # the samples of a step are sorted
    model = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    keys = ("input_ids", "attention_mask", "labels")
    losses: dict[int, list[tuple[float, int]]] = {}
    with torch.inference_mode():
        for size in (1, 4):
            losses[size] = []
            for batch in collated_by(run_yaml, size):
                trained = int((batch["labels"][:, 1:] != -100).sum())
                losses[size].append((float(model(**{key: batch[key] for key in keys}).loss), trained))
    for place, (loss, trained) in enumerate(losses[4]):
        alone = losses[1][4 * place : 4 * place + 4]
        assert trained == sum(count for _, count in alone)
        assert loss == pytest.approx(sum(one * count for one, count in alone) / trained, abs=1e-4)


def test_a_finished_run_is_not_started_again(project: Path, tiny_model: Path) -> None:
    words = [BIN / "mcp-lora", "train", "--model", tiny_model, "--resume", *SMALL]
    done = run(words, project)
    assert done.returncode == 2 and "nothing to resume" in done.stderr
    done = run([*words, "lora_rank=32"], project)
    assert done.returncode == 2 and "another run's checkpoint" in done.stderr


def test_overwrite_starts_anew_and_resume_goes_on(
    project: Path, tiny_model: Path, aborting: dict[str, str]
) -> None:
    output = project / "outputs/short"
    shutil.copytree(project / "outputs/mcp_lora", output)
    # DeepSpeed: the other way to launch; the data is converted already
    words = [BIN / "mcp-lora", "train", "--model", tiny_model, "--output", output, "--zero", "0", *SMALL]
    done = run([*words, "max_steps=1", "--overwrite"], project, **aborting)
    assert done.returncode == 0 and "terminate called" in done.stderr, done.stderr[-3000:]
    assert "up to date" in done.stderr and "Initializing 1 distributed tasks" in done.stderr
    before = steps(project / "outputs/mcp_lora")
    assert (steps(output), steps(project / "outputs/short.previous")) == (1, before)
    done = run([*words, "max_steps=2", "--resume"], project)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "resuming from" in done.stderr and "checkpoint-1" in done.stderr
    assert steps(output) == 2


def test_chat_answers_and_leaves_quietly(project: Path) -> None:
    done = succeed(project, "chat", stdin="hello\n")
    assert "Assistant: " in done.stdout
    assert "Traceback" not in done.stderr and "terminate called" not in done.stderr


def test_an_export_says_what_base_and_adapter_say(project: Path, tiny_model: Path) -> None:
    done = succeed(project, "export", "--checkpoint", steps(project / "outputs/mcp_lora"))
    found = re.search(r"difference of a logit is (\S+) \(tolerance (\S+)\)", done.stderr)
    assert found and float(found[1]) <= float(found[2])
    assert re.search(r"0 of \d+ held-out questions have other calls than base \+ adapter", done.stderr)
    merged = project / "outputs/merged_model"
    assert (merged / "model.safetensors").is_file() and not (merged / "Modelfile").exists()
    assert "<tools>" in (merged / "chat_template.jinja").read_text(encoding="utf-8")
    # one that differs is found out: here, the base alone
    other = verify.compare({"model_name_or_path": str(tiny_model)}, project / "outputs/mcp_lora", tiny_model)
    assert other.difference > other.tolerance and other.dtype == "float32"


def test_an_evaluation_judges_both_models_and_asks_once(project: Path) -> None:
    held_out = list(dataset.samples(project / "data/llama_factory", "seen"))
    # one question at a time, as padding changes the last digits, and so a random model's words
    done = succeed(project, "eval", "--batch-size", "1")
    assert f"seen: {len(held_out)} held-out questions" in done.stdout
    metrics = json.loads((project / "outputs/mcp_lora/eval/metrics.json").read_text())
    seen = metrics["splits"]["seen"]
    assert seen["count"] == len(held_out) and set(seen["metrics"]) == {"base", "adapter"}
    for model in ("base", "adapter"):
        lines = (project / f"outputs/mcp_lora/eval/{model}.jsonl").read_text(encoding="utf-8").splitlines()
        assert [json.loads(line)["expected"] for line in lines] == [
            [call._asdict() for call in chat_template.called(sample["messages"][-1])] for sample in held_out
        ]
        assert all("<|im_start|>" in json.loads(line)["prompt"] for line in lines)
    plain = metrics["plain_chat"]
    assert plain["questions"] == 100 and plain["divergence"] > 0 and "Plain chat has moved by" in done.stdout
    kept = project / "outputs/mcp_lora/eval/plain_chat.json"
    assert [*json.loads(kept.read_text()).values()] == [plain]
    done = run([BIN / "mcp-lora", "eval", "--require", "seen.exact>=0.99"], project)
    assert done.returncode == 1 and "seen.exact is 0.000, and seen.exact>=0.99 is required" in done.stderr
    assert "predict" not in done.stdout  # the engine was not started


def test_two_processes_share_the_questions_and_give_the_same_answers(
    project: Path, aborting: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)  # of which torchrun speaks if there are several
    kept = (project / "outputs/mcp_lora/eval/base.jsonl").rename(project / "base.jsonl")
    words = [BIN / "mcp-lora", "eval", "--base-only", "--batch-size", "1"]
    done = run(words, project, NPROC_PER_NODE="2", **aborting)
    assert done.returncode == 0 and "OMP_NUM_THREADS" in done.stderr, done.stderr[-3000:]
    assert "base" in done.stdout and "adapter" not in done.stdout
    again = (project / "outputs/mcp_lora/eval/base.jsonl").read_text(encoding="utf-8")
    assert again == kept.read_text(encoding="utf-8")


def test_an_evaluation_of_a_server(project: Path, tiny_model: Path) -> None:
    """LLaMA-Factory's own server, with the base model alone."""
    argv = [BIN / "llamafactory-cli", "api", "--model_name_or_path", tiny_model, "--template", "qwen"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    with started(argv, project, API_HOST="127.0.0.1", API_PORT=port, CUDA_VISIBLE_DEVICES="") as process:
        try:
            assert process.stderr and any("Uvicorn running" in line for line in process.stderr)
            words = ["--endpoint", f"http://127.0.0.1:{port}/v1", "--endpoint-model", "tiny"]
            done = succeed(project, "eval", *words)
        finally:
            process.terminate()
    held_out = list(dataset.samples(project / "data/llama_factory", "seen"))
    answers = (project / "outputs/mcp_lora/eval/endpoint-tiny.jsonl").read_text(encoding="utf-8")
    assert f"seen: {len(held_out)} held-out questions" in done.stdout
    assert len(answers.splitlines()) == len(held_out)


def test_the_page_about_the_run(project: Path) -> None:
    succeed(project, "report")
    page = (project / "outputs/mcp_lora/report.html").read_text(encoding="utf-8")
    assert f"<td>{steps(project / 'outputs/mcp_lora')} steps, " in page and "24 rows read" in page
    for chart in ("loss over the steps", "learning rate over the steps", "lengths of the samples"):
        assert f'aria-label="{chart}"' in page
    # all that were asked: the base, a server, the adapter
    for model in ("endpoint-tiny", "adapter"):
        assert f"{model} − base</th>" in page
    assert "validation loss" in page


def test_the_readmes_python_code_runs(project: Path, tiny_model: Path) -> None:
    code = re.search(r"```python\n(.*?)```", (ROOT / "docs/serving.md").read_text(encoding="utf-8"), re.S)
    assert code
    here = f'BASE, ADAPTER = "{tiny_model}", "outputs/mcp_lora"'
    script, changed = re.subn(r"^BASE, ADAPTER = .*$", here, code[1], flags=re.M)
    assert changed == 1
    done = run([BIN / "python", "-c", script.replace("max_new_tokens=512", "max_new_tokens=8")], project)
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_failing_engine_shows_its_own_error_at_the_end(project: Path, tiny_model: Path) -> None:
    words = ["--output", "outputs/fails", "optim=nowhere", "val_size=0", "eval_strategy=no"]
    done = run([BIN / "mcp-lora", "train", "--model", tiny_model, *SMALL, *words], project)
    assert done.returncode == 1
    end = done.stderr.split("mcp-lora: error: ")[1].splitlines()
    assert end[0] == "LLaMA-Factory ended with exit code 1:"
    assert "nowhere" in end[1] and "ChildFailedError" not in done.stderr.split("mcp-lora: error: ")[1]
    assert end[-1].endswith("mcp-lora train")


def test_an_interruption_ends_every_process(project: Path, tiny_model: Path) -> None:
    words = ["--model", tiny_model, "--output", "outputs/interrupted", "--zero", "0", *SMALL]
    with started([BIN / "mcp-lora", "train", *words, "num_train_epochs=10000"], project) as process:
        assert process.stderr and any("Running training" in line for line in process.stderr)
        family = psutil.Process(process.pid).children(recursive=True)
        assert len(family) >= 3  # llamafactory-cli, torchrun, the rank
        process.send_signal(signal.SIGTERM)  # SIGINT: test_launch.py
        said = process.stderr.read()
        assert process.wait() == 128 + signal.SIGTERM
    assert not [child for child in family if child.is_running()]
    again = said.rstrip().split("error: interrupted; to continue: ")[1]
    # by whether a checkpoint was saved meanwhile
    assert again.removesuffix(" --resume") == shlex.join(
        ["mcp-lora", "train", *map(str, words), "num_train_epochs=10000"]
    )


def test_two_ranks_under_the_deepspeed_launcher(
    project: Path, tiny_model: Path, aborting: dict[str, str]
) -> None:
    words = [*SMALL, "max_steps=2", "include_num_input_tokens_seen=true", "dataset_dir=data/two"]
    words += ["--data", "data/filtered/filtered_20250101_000000.json", "--output", "outputs/two"]
    script = [ROOT / "train_lora.py", "--model", tiny_model, "--zero", "0", *words]
    done = run([BIN / "deepspeed", "--num_gpus=2", *script], project, **aborting)
    assert done.returncode == 0, done.stderr[-3000:]
    output = done.stdout + done.stderr
    assert output.count("mcp-lora: read 24 rows") == 1
    assert "world size: 2" in output
    assert steps(project / "outputs/two") == 2
    assert "global batch size 4 = 2 per device × 1 accumulated × 2 processes" in output
    assert "(w. parallel, distributed & accumulation) = 4" in output
    assert (project / "outputs/two/train.log").is_file()
    # both have loaded the one data set that was rendered for them
    (made,) = (project / "data/two/rendered").glob("*/rendered.json")
    assert f"Loaded tokenized dataset from {made.parent}" in output
    assert len(collated(project / "outputs/two/run.yaml")) == json.loads(made.read_text())["samples"]


def test_the_leaderboard_judges_the_adapter(project: Path) -> None:
    words = ["eval", "--benchmark", "bfcl", "--limit", "1", "--require", "bfcl.irrelevance<0.5"]
    done = run([BIN / "mcp-lora", *words, "--adapter-only"], project)
    assert done.returncode == 1 and "bfcl.irrelevance is 1.000" in done.stderr, done.stderr[-3000:]
    assert "bfcl.live_multiple: 1 questions" in done.stdout
    folder = project / "outputs/mcp_lora/eval/bfcl"
    metrics = json.loads((folder / "metrics_part.json").read_text())
    assert not (folder / "metrics.json").exists()  # of all questions only
    assert len(metrics["splits"]) == 10 and metrics["tools"] == []
    assert {*metrics["splits"]["bfcl.simple"]["metrics"]["adapter"]} == {"valid", "schema", "tool", "ast"}
    succeed(project, "report")
    page = (project / "outputs/mcp_lora/report.html").read_text(encoding="utf-8")
    assert "<td>bfcl.parallel <small>1</small></td>" in page
    assert "<h3>seen</h3>" in page and "nats per token" in page


def test_what_shapes_the_model_reaches_eval_chat_and_export(project: Path, tiny_model: Path) -> None:
    """Code of its own, and tokens that the run has added."""
    folder = project / "models" / "mine"
    shutil.copytree(tiny_model, folder)
    (folder / "modeling_mine.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class MineConfig(LlamaConfig):\n    model_type = 'mine'\n"
        "class MineForCausalLM(LlamaForCausalLM):\n    config_class = MineConfig\n"
    )
    code = {"AutoConfig": "modeling_mine.MineConfig", "AutoModelForCausalLM": "modeling_mine.MineForCausalLM"}
    shape = json.loads((folder / "config.json").read_text()) | {"model_type": "mine", "auto_map": code}
    (folder / "config.json").write_text(json.dumps(shape | {"architectures": ["MineForCausalLM"]}))
    words = [*SMALL, "max_steps=1", "trust_remote_code=true", "--output", "outputs/mine"]
    words += ["resize_vocab=true", "add_special_tokens=<|tool|>"]
    succeed(project, "train", "--model", folder, *words)
    succeed(project, "eval", "outputs/mine", "--adapter-only", "--limit", "1")
    done = succeed(project, "chat", "outputs/mine", stdin="exit\n")
    assert "Traceback" not in done.stderr and "terminate called" not in done.stderr
    done = succeed(project, "export", "outputs/mine", "--output", "outputs/mine_model")
    assert "the largest difference of a logit" in done.stderr
    assert (project / "outputs/mine_model/modeling_mine.py").is_file()


def test_the_script_is_the_command(project: Path) -> None:
    done = run([BIN / "python", ROOT / "train_lora.py", "--local_rank=0", "lora_rang=1"], project)
    assert done.returncode == 2 and "did you mean lora_rank?" in done.stderr
