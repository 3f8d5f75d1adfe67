import os
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import pytest
from conftest import BIN

from mcp_lora.engine import launch, topology
from mcp_lora.errors import McpLoraError


def test_the_engines_command() -> None:
    argv = [str(BIN / "llamafactory-cli"), "train", "out/run.yaml"]
    assert launch.engine_argv("train", Path("out/run.yaml")) == argv


LAUNCHED = {"FORCE_TORCHRUN": "1", "NNODES": "1", "NODE_RANK": "0"}


@pytest.mark.parametrize(
    ("config", "gpus", "inherited", "added"),
    [
        ({}, 0, {}, {}),
        ({}, 0, {"MALLOC_TRIM_THRESHOLD_": "7"}, {"MALLOC_TRIM_THRESHOLD_": "7"}),
        ({"deepspeed": None}, 1, {}, {}),
        ({}, 2, {}, LAUNCHED | {"NPROC_PER_NODE": "2"}),
        ({"deepspeed": "z.json"}, 4, {"USE_RAY": "1"}, {}),
        ({"deepspeed": "z.json"}, 0, {}, LAUNCHED | {"NPROC_PER_NODE": "1"}),
        ({"deepspeed": "z.json"}, 4, {}, LAUNCHED | {"NPROC_PER_NODE": "4"}),
        (
            {"deepspeed": "z.json"},
            4,
            {"MASTER_ADDR": "10.0.0.1"},
            LAUNCHED | {"NPROC_PER_NODE": "4", "MASTER_ADDR": "127.0.0.1"},
        ),
        (
            {"deepspeed": "z.json"},
            4,
            {"NPROC_PER_NODE": "2"},
            LAUNCHED | {"NPROC_PER_NODE": "2", "CUDA_VISIBLE_DEVICES": "0,1"},
        ),
    ],
)
def test_the_engines_environment(
    config: dict[str, str], gpus: int, inherited: dict[str, str], added: dict[str, str]
) -> None:
    inherited = inherited | {"PATH": "/bin"}
    found = launch.engine_environment(config, topology.find(inherited, gpus), gpus, inherited)
    kept = {name: value for name, value in found.items() if name.startswith("MALLOC_")}
    assert set(kept) == (set() if gpus else {"MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"})
    assert found == {"PATH": f"{BIN}{os.pathsep}/bin"} | kept | added


@pytest.mark.parametrize("place", ["prefix", "tempdir"])
def test_a_distributed_launch_under_a_path_with_a_space_is_refused(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spaced = tmp_path / "My Projects"
    spaced.mkdir()
    monkeypatch.setattr(sys if place == "prefix" else tempfile, place, str(spaced))
    with pytest.raises(McpLoraError, match="My Projects.*deepspeed=null"):
        launch.run_engine("train", {}, {"FORCE_TORCHRUN": "1"})


def test_output_passes_through_and_its_end_is_kept(capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    script = "import sys, os; print(os.environ['X']); sys.stderr.write('10%\\r20%\\n'); sys.exit(3)"
    outcome = launch.run([sys.executable, "-c", script], {"X": "to stdout"})
    assert outcome == launch.Outcome(3, "10%\r20%\n")
    assert capfdbinary.readouterr() == (b"to stdout\n", b"10%\r20%\n")


def test_a_missing_program_is_told() -> None:
    with pytest.raises(McpLoraError, match="pip install"):
        launch.run(["/nowhere/llamafactory-cli"], {})


def test_interruptions_end_the_whole_family_the_second_at_once() -> None:
    """The engine is a launcher whose ranks are processes of their own; this one ends only when killed."""
    deaf = (
        "import os, signal\n"
        "signal.signal(signal.SIGTERM, lambda *_: print('asked', flush=True))\n"
        "print(os.getpid(), flush=True)\n"
        "while True: signal.pause()"
    )
    launcher = (
        f"import subprocess, sys; subprocess.run([sys.executable, '-c', {deaf!r}], start_new_session=True)"
    )
    script = (
        "import signal, sys\n"
        "from mcp_lora.cli import app as cli\nfrom mcp_lora.engine import launch\n"
        "signal.signal(signal.SIGINT, cli.interrupted)\n"
        f"launch.run([sys.executable, '-c', {launcher!r}], {{}})"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    with process:
        assert process.stdout
        rank = psutil.Process(int(process.stdout.readline()))
        (engine,) = psutil.Process(process.pid).children()
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == "asked\n"
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=8)  # left alone, it would be waited for ten seconds
    assert psutil.wait_procs([engine, rank], timeout=5)[1] == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no device that is always full")
def test_a_log_on_a_full_disk_ends_nothing() -> None:
    outcome = launch.run([sys.executable, "-c", "print('x' * 100_000)"], {}, log=Path("/dev/full"))
    assert outcome.code == 0 and outcome.stderr.endswith("x\n")


def test_a_log_that_cannot_be_opened_starts_nothing(tmp_path: Path) -> None:
    script = f"open({str(tmp_path / 'started')!r}, 'w')"
    with pytest.raises(McpLoraError, match=f"{tmp_path} cannot be written"):
        launch.run([sys.executable, "-c", script], {}, log=tmp_path)
    assert not (tmp_path / "started").exists()


# As torchrun 2.14 and LLaMA-Factory 0.9.5 wrote it, with the frames left out.
FAILED_RANK = """\
[INFO|loader] Training\r  0%|          | 0/6
[rank0]: Traceback (most recent call last):
[rank0]:   File "launcher.py", line 185, in <module>
[rank0]:     run_exp()
[rank0]: ValueError: Cannot find valid samples, check `data/README.md` for the data format.
[rank0]: Second line of the message.
E1124 04:00:00.000000 100 torch/distributed/elastic/multiprocessing/api.py:984] failed (exitcode: 1)
Traceback (most recent call last):
  File "torchrun", line 8, in <module>
    sys.exit(main())
torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
============================================================
launcher.py FAILED
============================================================
Traceback (most recent call last):
  File "llamafactory-cli", line 8, in <module>
subprocess.CalledProcessError: Command '['torchrun']' returned non-zero exit status 1.
"""


def test_the_real_error_is_the_ranks() -> None:
    error = launch.Outcome(1, FAILED_RANK).error("mcp-lora train")
    said = str(error).splitlines()
    assert error.code == 1 and said[-1].endswith("run again: mcp-lora train")
    assert said[1] == "ValueError: Cannot find valid samples, check `data/README.md` for the data format."
    assert said[2] == "Second line of the message."
    assert "CalledProcessError" not in "".join(said)


def test_without_a_traceback_the_last_lines_are_the_error() -> None:
    assert launch.real_error("one\ntwo\n\nKilled\n") == "one\ntwo\nKilled"
    assert launch.real_error("\n".join(map(str, range(20)))) == "\n".join(map(str, range(12, 20)))


def test_a_signal_gives_the_exit_code_of_a_shell() -> None:
    killed = launch.run([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"], {})
    assert (killed.code, killed.error("x").code) == (137, 137)


def test_a_rank_that_was_killed_is_the_error_that_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """As torchrun was seen to tell of it, with the other rank's own traceback before."""
    said = (
        '[rank0]: Traceback (most recent call last):\n[rank0]:   File "a.py", line 1, in <module>\n'
        "[rank0]: RuntimeError: Connection closed by peer [127.0.0.1]:1234\n"
        "launcher.py FAILED\n------\nFailures:\n[1]:\n  rank      : 0 (local_rank: 0)\n"
        "  exitcode  : 1 (pid: 7)\n  error_file: <N/A>\n  traceback : To enable traceback see: URL\n"
        "------\nRoot Cause (first observed failure):\n[0]:\n  time      : 2026-11-24_13:44:18\n"
        "  host      : localhost\n  rank      : 1 (local_rank: 1)\n  exitcode  : -9 (pid: 8)\n"
        "  error_file: <N/A>\n  traceback : Signal 9 (SIGKILL) received by PID 8\n"
    )
    assert launch.real_error(said).startswith("rank 1 was killed by Signal 9 (SIGKILL)")
    assert not launch.Outcome(1, said).out_of_memory  # it would be started again
    ours = re.compile("short of memory")  # what is looked for is the engine's text, never our sentence
    monkeypatch.setattr(launch, "OUT_OF_MEMORY", ours)
    assert ours.search(launch.real_error(said)) and not launch.Outcome(1, said).out_of_memory
    assert launch.real_error(said.replace("SIGKILL", "SIGTERM")).startswith("RuntimeError: Connection closed")
