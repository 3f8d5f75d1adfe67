"""kill -9 at 20 random moments: what is started again ends as what nobody has interrupted.

pytest -m kill -s        some ten minutes
"""

import random
import shutil
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from conftest import BIN, SAMPLE, environment, make_project, run
from safetensors.numpy import load_file

from mcp_lora.train import manifest, runs

pytestmark = pytest.mark.kill
KILLS = 20
TRAIN = ["max_steps=40", "save_steps=4", "logging_steps=1", "cutoff_len=1024", "learning_rate=0.01"]
TRAIN += ["--global-batch", "4", "eval_strategy=no", "val_size=0", "preprocessing_num_workers=1"]


def succeed(folder: Path, *words: object) -> float:
    """Run a command to its end, and return the seconds it took."""
    began = time.monotonic()
    done = run([BIN / "mcp-lora", *words], folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return time.monotonic() - began


def killed(folder: Path, moment: float, *words: object) -> bool:
    """Start a command and kill it, it alone, after so many seconds; False where it has ended before.

    What it has started ends by itself, as it writes its progress to a pipe that nobody reads any more.
    """
    with subprocess.Popen(
        list(map(str, [BIN / "mcp-lora", *words])),
        cwd=folder,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        try:
            process.wait(moment)
        except subprocess.TimeoutExpired:
            started = psutil.Process(process.pid).children(recursive=True)
            process.kill()
            assert not psutil.wait_procs(started, timeout=60)[1]
            return True
    assert process.returncode == 0
    return False


def files(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.fixture(scope="module")
def moments() -> random.Random:
    seed = random.randrange(1000)
    print(f"\nthe seed is {seed}")
    return random.Random(seed)


def test_convert(tmp_path: Path, moments: random.Random) -> None:
    words = ["convert", SAMPLE, "--holdout-tools", "0.2", "--output"]
    succeed(tmp_path, *words, "whole")
    usual = succeed(tmp_path, *words, "killed")
    for number in range(KILLS):
        if number % 2:  # a first conversion, and one over another
            shutil.rmtree(tmp_path / "killed", ignore_errors=True)
        killed(tmp_path, moments.uniform(0, usual), *words, "killed")
    succeed(tmp_path, *words, "killed")
    assert files(tmp_path / "killed") == files(tmp_path / "whole")
    assert {path.name for path in tmp_path.iterdir()} <= {"whole", "killed", ".whole.lock", ".killed.lock"}


def test_train(tmp_path: Path, tiny_model: Path, moments: random.Random) -> None:
    project = make_project(tmp_path / "project")
    words = ["train", "--model", tiny_model, *TRAIN, "--output"]
    usual = succeed(project, *words, "outputs/whole")
    kills, resumed, ended = 0, 0, 0
    while kills < KILLS or not ended:
        output = Path(f"outputs/killed-{ended}")
        option = runs.restart_option(project / output).split()
        resumed += option == ["--resume"]
        # the last start is left alone
        moment = moments.uniform(0, usual) if kills < KILLS else 10 * usual
        if killed(project, moment, *words, output, *option):
            kills += 1
            print(f"kill {kills} after {moment:.1f} s")
            if getattr(manifest.read(project / output), "exit", None) != 0:  # it may have ended just before
                continue
        ended += 1
        weights = [
            load_file(project / run / "adapter_model.safetensors") for run in ("outputs/whole", output)
        ]
        assert weights[0].keys() == weights[1].keys()
        assert max(abs(weights[0][key] - weights[1][key]).max() for key in weights[0]) < 1e-5
    print(f"{kills} kills, {resumed} starts from a checkpoint, {ended} runs like the one left alone")


def test_eval(tmp_path: Path, tiny_model: Path, moments: random.Random) -> None:
    project, kept = make_project(tmp_path / "project"), tmp_path / "project/outputs/mcp_lora/eval"
    succeed(project, "train", "--model", tiny_model, *TRAIN)
    usual = succeed(project, "eval")
    whole = files(kept)
    shutil.rmtree(kept)
    kills, ended = 0, 0
    while kills < KILLS or not ended:
        if killed(project, moments.uniform(0, usual) if kills < KILLS else 10 * usual, "eval"):
            kills += 1
            continue
        ended += 1
        assert files(kept) == whole
        shutil.rmtree(kept)
    print(f"{kills} kills, {ended} evaluations like the one left alone")
