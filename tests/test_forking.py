"""Work in a forked process: its result, its error, its end."""

import os
import signal
import subprocess
import sys

import psutil
import pytest

from mcp_lora import forking
from mcp_lora.errors import McpLoraError

pytestmark = pytest.mark.skipif(not forking.POSSIBLE, reason="processes are copied on Linux alone")


def test_a_result_comes_back() -> None:
    here = os.getpid()
    with forking.beside(lambda: (os.getppid(), "x" * 1_000_000)) as result:
        assert result() == (here, "x" * 1_000_000)


def test_an_error_is_raised_where_the_result_is_asked_for() -> None:
    def full() -> None:
        raise OSError(28, "No space left on device", "a.lines")

    with pytest.raises(OSError, match="No space left") as caught, forking.beside(full) as result:
        result()
    assert (caught.value.strerror, caught.value.filename) == ("No space left on device", "a.lines")


def test_a_killed_process_is_told() -> None:
    with (
        pytest.raises(McpLoraError, match=r"ended \(exit code -9\), perhaps as memory"),
        forking.beside(lambda: os.kill(os.getpid(), signal.SIGKILL)) as result,
    ):
        result()


def test_a_process_ends_with_the_block() -> None:
    with pytest.raises(ZeroDivisionError), forking.beside(signal.pause):
        (process,) = psutil.Process().children()
        _ = 1 / 0
    assert not process.is_running()


def test_a_process_does_not_outlive_the_one_that_it_works_for() -> None:
    """It would go on writing into a folder that the next conversion uses."""
    script = (
        "import os, signal\n"
        "from mcp_lora import forking\n"
        "def work():\n"
        "    print(os.getpid(), flush=True)\n"
        "    signal.pause()\n"
        "with forking.beside(work):\n"
        "    signal.pause()\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout
        copy = psutil.Process(int(owner.stdout.readline()))
        owner.kill()
    _, alive = psutil.wait_procs([copy], timeout=10)
    for process in alive:
        process.kill()
    assert not alive
