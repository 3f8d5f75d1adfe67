"""Start-up, as a ratio of two commands measured in turn: pytest -m bench -s."""

import statistics
import subprocess
import sys
import time

import pytest
from conftest import BIN


@pytest.mark.bench
def test_help_is_nearly_as_fast_as_typer_itself() -> None:
    commands = [[sys.executable, "-c", "import typer"], [str(BIN / "mcp-lora"), "--help"]]
    seconds: list[list[float]] = [[], []]
    for _ in range(11):
        for command, taken in zip(commands, seconds, strict=True):
            start = time.perf_counter()
            subprocess.run(command, check=True, capture_output=True)
            taken.append(time.perf_counter() - start)
    ratio = statistics.median(seconds[1]) / statistics.median(seconds[0])
    print(f"\nmcp-lora --help takes {ratio:.1f} times as long as python -c 'import typer'")
    assert ratio <= 5
