"""The same training on any number of processes, and to its end whatever fails: the real engine."""

import json
import random
import subprocess
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import BIN, ROOT, environment, make_project, run
from typer.testing import CliRunner

from mcp_lora.cli.app import app
from mcp_lora.engine import launch
from mcp_lora.errors import McpLoraError
from mcp_lora.train import runs

# Without dropout, whose random numbers are each rank's own, the ranks compute the same sums. Eight
# samples a step, and six steps.
WORDS = [
    "deepspeed=null",
    "lora_dropout=0",
    "val_size=0",
    "eval_strategy=no",
    "per_device_train_batch_size=4",
    "gradient_accumulation_steps=2",
    "num_train_epochs=2",
    "logging_steps=1",
    "save_steps=1",
    "preprocessing_num_workers=1",
]

# Put on PYTHONPATH as sitecustomize.py it changes the engine's trainer as soon as it is imported.
HOOK = """
import importlib.abc, importlib.util, json, os, sys

class Hook(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "transformers.trainer":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module

        def exec_module(module):
            load(module)
            step = module.Trainer.training_step

            def training_step(self, model, inputs, *rest):
                before(self, inputs)
                return step(self, model, inputs, *rest)

            module.Trainer.training_step = training_step

        spec.loader.exec_module = exec_module
        return spec

sys.meta_path.insert(0, Hook())
"""
RECORD = """
def before(trainer, inputs):
    with open(os.environ["RECORD"], "a") as file:
        for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"]):
            sample = ids[mask.bool()].tolist()
            file.write(json.dumps([trainer.state.global_step, hash(tuple(sample))]) + "\\n")
"""
NO_NETWORK = """
import socket, sys

def only_here(function, host_of):
    def checked(*arguments, **more):
        host = str(host_of(arguments))
        here = host in ("None", "", "localhost", socket.gethostname()) or host.startswith(("127.", "::1"))
        if not here:
            with open(os.environ["TRAFFIC"], "a") as file:
                file.write(f"{host} {sys.argv}\\n")
            raise OSError("there is no network")
        return function(*arguments, **more)
    return checked

connect = socket.socket.connect
socket.socket.connect = only_here(connect, lambda given: given[1][0] if isinstance(given[1], tuple) else "")
socket.getaddrinfo = only_here(socket.getaddrinfo, lambda given: given[0])
"""
OUT_OF_MEMORY = """
def before(trainer, inputs):
    import torch

    if len(inputs["input_ids"]) > int(os.environ["ROOM"]) and trainer.state.global_step >= 2:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
"""


OUT_OF_MEMORY_IN_EVALUATION = """
def before(trainer, inputs):
    import torch

    if not hasattr(trainer, "step_of_evaluation"):
        step = trainer.step_of_evaluation = trainer.prediction_step

        def prediction_step(model, inputs, *rest, **more):
            if len(inputs["input_ids"]) > 1:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            return step(model, inputs, *rest, **more)

        trainer.prediction_step = prediction_step
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project folder with 24 samples: three steps of eight, so that no last step has to be filled up."""
    folder = make_project(tmp_path_factory.mktemp("scale") / "project")
    done = run([BIN / "mcp-lora", "convert", "--test", "0"], folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def whole(project: Path, tiny_model: Path) -> Path:
    """A run of one process that nothing has disturbed; what it trained on is in one.jsonl."""
    variables = hooked(project, "import os" + NO_NETWORK + RECORD, RECORD="one.jsonl", TRAFFIC="traffic.txt")
    done = run(train(tiny_model, "whole", "report_to=tensorboard"), project, **variables)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "global batch size 8 = 4 per device × 2 accumulated × 1 processes" in done.stderr
    return project / "outputs/whole"


def train(model: Path, output: str, *words: str) -> list[Any]:
    return [BIN / "mcp-lora", "train", "--model", model, "--output", f"outputs/{output}", *WORDS, *words]


def hooked(folder: Path, code: str, **variables: str) -> dict[str, str]:
    """The variables under which the engine's trainer calls `before`, which `code` defines."""
    place = folder / f"hook-{len(code)}"
    place.mkdir(exist_ok=True)
    (place / "sitecustomize.py").write_text(code + HOOK)
    return {"PYTHONPATH": str(place), **variables}


def recorded(*files: Path) -> list[list[int]]:
    return sorted(json.loads(line) for file in files for line in file.read_text().splitlines())


def started(words: list[Any], folder: Path, **variables: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        words,
        cwd=folder,
        env=environment(**variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def steps_until(process: subprocess.Popen[str], count: int) -> None:
    """Wait until a run has printed so many losses."""
    assert process.stdout
    for line in process.stdout:
        count -= "'loss'" in line
        if not count:
            return
    raise AssertionError("the run ended")


def losses(run: Path) -> list[float]:
    history = json.loads((run / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def manifest(run: Path) -> dict[str, Any]:
    return json.loads((run / "manifest.json").read_text())


def test_a_model_in_a_folder_is_trained_without_a_network(whole: Path, project: Path) -> None:
    traffic = project / "traffic.txt"
    assert not traffic.exists(), traffic.read_text()


def test_two_processes_train_as_one_does(whole: Path, project: Path, tiny_model: Path) -> None:
    variables = hooked(project, RECORD, RECORD="two.jsonl")
    done = run(train(tiny_model, "two"), project, NPROC_PER_NODE="2", **variables)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "global batch size 8 = 4 per device × 1 accumulated × 2 processes" in done.stderr
    assert recorded(project / "two.jsonl") == recorded(project / "one.jsonl")
    assert len(losses(whole)) == 6
    assert losses(project / "outputs/two") == pytest.approx(losses(whole), rel=1e-3)
    assert manifest(project / "outputs/two")["processes"] == 2


def test_two_machines_train_as_one_does(whole: Path, project: Path, tiny_model: Path) -> None:
    variables = hooked(project, RECORD, RECORD="nodes.jsonl")
    port = random.Random().randint(20000, 60000)
    words = ["--nodes", "2", "--master", f"127.0.0.1:{port}", "--node-rank"]
    first, second = (
        started([*train(tiny_model, "nodes"), *words, rank], project, **variables) for rank in ("0", "1")
    )
    said = [process.communicate()[0] for process in (first, second)]
    assert (first.returncode, second.returncode) == (0, 0), said[0][-3000:] + said[1][-3000:]
    assert "global batch size 8 = 4 per device × 1 accumulated × 2 processes" in said[1]
    assert recorded(project / "nodes.jsonl") == recorded(project / "one.jsonl")
    assert losses(project / "outputs/nodes") == pytest.approx(losses(whole), rel=1e-3)


def test_out_of_memory_halves_the_batch_and_goes_on(whole: Path, project: Path, tiny_model: Path) -> None:
    variables = hooked(project, OUT_OF_MEMORY, ROOM="2")
    done = run(train(tiny_model, "oom"), project, **variables)
    assert done.returncode == 0, done.stderr[-3000:]
    again = "mcp-lora: out of memory; restarting from checkpoint-2: global batch size 8 = 2 per device"
    assert again in done.stderr
    output = project / "outputs/oom"
    assert losses(output) == pytest.approx(losses(whole), rel=1e-3)
    kept = manifest(output)
    assert [retry["per_device_train_batch_size"] for retry in kept["retries"]] == [2]
    assert kept["exit"] == 0


def test_out_of_memory_in_evaluation_leaves_one_sample_at_a_time(project: Path, tiny_model: Path) -> None:
    words = [
        "val_size=0.2",
        "eval_strategy=steps",
        "eval_steps=2",
        "max_steps=2",
        "per_device_eval_batch_size=2",
    ]
    variables = hooked(project, OUT_OF_MEMORY_IN_EVALUATION)
    done = run(train(tiny_model, "validated", *words), project, **variables)
    assert done.returncode == 0, done.stderr[-3000:]
    (retry,) = manifest(project / "outputs/validated")["retries"]
    assert retry["per_device_train_batch_size"] == 2
    assert runs.read_run(project / "outputs/validated")["per_device_eval_batch_size"] == 1


# As the engine prints it from one process.
MEMORY = """\
Traceback (most recent call last):
  File "trainer.py", line 1, in training_step
torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.
"""


@pytest.mark.parametrize(("options", "tried"), [([], [4, 2, 1]), (["--no-retry"], [4])])
def test_out_of_memory_with_the_smallest_batch_says_what_to_lower(
    options: list[str], tried: list[int], project: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = []

    def run_engine(verb: str, config: dict[str, Any], *rest: Any, **more: Any) -> launch.Outcome:
        batches.append(config["per_device_train_batch_size"])
        return launch.Outcome(1, MEMORY)

    monkeypatch.setattr(launch, "run_engine", run_engine)
    monkeypatch.chdir(project)
    output = f"full-{len(tried)}"
    _, *words = map(str, train(tiny_model, output, *options))
    done = CliRunner().invoke(app, words)
    assert isinstance(done.exception, McpLoraError)
    message = str(done.exception)
    assert message.startswith(f"out of memory at global batch size 8 = {tried[-1]} per device")
    assert "CUDA out of memory" in message and "Traceback" not in message
    assert "cutoff_len" in message and "--config qlora" in message
    assert batches == tried and done.exception.code == 1
    assert manifest(project / "outputs" / output)["exit"] == 1
    assert done.stderr.count("restarting from the start") == len(tried) - 1


def test_a_killed_run_comes_to_the_end_that_it_would_have_had(
    whole: Path, project: Path, tiny_model: Path
) -> None:
    output = project / "outputs/killed"

    def again() -> list[Any]:
        complete = any(map(runs.is_complete, runs.checkpoints(output)))
        return train(tiny_model, "killed", "--resume" if complete else "--overwrite")

    # A step's loss is printed before its checkpoint is written.
    process = started(again(), project)
    steps_until(process, random.Random().randint(1, 3))
    family = psutil.Process(process.pid).children(recursive=True)
    process.kill()  # first, or it would see the others end
    for member in family:
        member.kill()
    process.communicate()
    psutil.wait_procs(family)
    assert manifest(output)["exit"] is None
    done = run(again(), project)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(losses(output)) == 6
    assert losses(output) == pytest.approx(losses(whole), rel=1e-5)


def test_a_full_disk_ends_with_its_error_and_the_command_that_goes_on(
    whole: Path, project: Path, tiny_model: Path
) -> None:
    # No file may be longer than what the adapter takes: the optimizer's, of twice that, breaks off.
    adapter = (whole / "adapter_model.safetensors").stat().st_size
    words = list(map(str, train(tiny_model, "disk")))
    script = f'ulimit -f {adapter // 1024 + 64} && exec "$@"'
    done = run(["bash", "-c", script, "bash", *words], project)
    assert done.returncode == 1
    said = done.stderr.split("mcp-lora: error: ")[1]
    assert "is the disk full?" in said and "Traceback" not in said and "%|" not in said
    assert said.rstrip().endswith("mcp-lora train --overwrite")
    done = run([*words, "--overwrite", "--dry-run"], project)  # accepted, as after any other failure
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_rank_that_dies_ends_the_others(project: Path, tiny_model: Path) -> None:
    words = train(tiny_model, "dies", "num_train_epochs=10000", "save_steps=10000")
    process = started(words, project, NPROC_PER_NODE="2")
    steps_until(process, 1)
    family = psutil.Process(process.pid).children(recursive=True)
    last = next(member for member in family if member.environ().get("LOCAL_RANK") == "1")
    last.kill()
    said = process.communicate(timeout=120)[0]
    assert process.returncode == 1
    assert not [member for member in family if member.is_running()]
    assert "rank 1 was killed by Signal 9 (SIGKILL)" in said.split("mcp-lora: error: ")[1]


def test_the_manifest_says_what_the_run_was_made_of(whole: Path, project: Path, tiny_model: Path) -> None:
    import hashlib

    found = manifest(whole)
    data = project / "data/llama_factory/train.jsonl"
    assert found["data"] == {"file": str(data), "sha256": hashlib.sha256(data.read_bytes()).hexdigest()}
    assert found["conversion"] == json.loads(data.with_name("stats.json").read_text(encoding="utf-8"))
    config = tiny_model / "config.json"
    assert found["base"]["sha256"] == hashlib.sha256(config.read_bytes()).hexdigest()
    assert found["started"] <= found["ended"] and (found["exit"], found["seed"]) == (0, 42)
    assert found["command"][1] == "train" and found["config"]["lora_rank"] == 64
    assert {"torch", "llamafactory", "peft", "transformers"} <= set(found["packages"])


# On a CPU DeepSpeed takes two ranks for one when it loads a model for stage 3, and refuses the batch.
@pytest.mark.parametrize(("stage", "processes"), [("2", 2), ("3", 1)])
def test_zero_divides_the_optimizer(stage: str, processes: int, project: Path, tiny_model: Path) -> None:
    words = [word for word in train(tiny_model, f"zero{stage}", "max_steps=2") if word != "deepspeed=null"]
    done = run([*words, "--zero", stage], project, NPROC_PER_NODE=str(processes))
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(losses(project / f"outputs/zero{stage}")) == 2
    checkpoint = project / f"outputs/zero{stage}/checkpoint-2"
    assert len(list(checkpoint.glob("global_step2/*optim_states.pt"))) == processes  # each has its own part
    assert runs.is_complete(checkpoint)


def test_tensorboard_shows_the_loss(whole: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (events,) = whole.rglob("events.out.tfevents.*")
    found = EventAccumulator(str(events)).Reload()
    shown = [event.value for event in found.Scalars("train/loss")]
    assert shown == pytest.approx(losses(whole), abs=1e-4)


def test_every_machine_of_a_slurm_job_gets_its_rank(project: Path, tiny_model: Path) -> None:
    """Slurm's two commands stand in as they are documented: srun runs its words once on each machine."""
    tools = project / "slurm"
    tools.mkdir()
    srun = '#!/bin/bash\nfor id in 0 1; do SLURM_NODEID=$id "$@" || exit; done\n'
    names = '#!/bin/bash\n[ "$*" = "show hostnames gpu[1-2]" ] && printf "gpu1\\ngpu2\\n"\n'
    for name, script in (("srun", srun), ("scontrol", names)):
        (tools / name).write_text(script)
        (tools / name).chmod(0o755)
    (project / ".venv/bin").mkdir(parents=True)
    (project / ".venv/bin/activate").write_text(f"PATH={tools}:{BIN}:$PATH\n")
    variables = {"SLURM_JOB_NODELIST": "gpu[1-2]", "SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2"}
    words = ["--model", tiny_model, "--gpus", "8", "--dry-run"]
    done = run(["bash", ROOT / "scripts/train_lora.slurm", *words], project, **variables)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("global batch size 128 = 8 per device × 1 accumulated × 16 processes") == 2
    for expected in ("NODE_RANK=0", "NODE_RANK=1"):
        assert done.stdout.count(expected) == 1
    for expected in ("NNODES=2", "MASTER_ADDR=gpu1", "MASTER_PORT=20007", "NPROC_PER_NODE=8"):
        assert done.stdout.count(expected) == 2
