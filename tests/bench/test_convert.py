"""Conversion at full scale: pytest -m bench -s tests/bench/test_convert.py."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import SAMPLE

# What a process takes when it has only started, and what a conversion takes. ru_maxrss would count what
# the process was before it was replaced, which is pytest.
SCRIPT = """
import resource, sys, time
from pathlib import Path
import mcp_lora.cli.app
from mcp_lora.data.conversion import Settings, convert

def peak():
    (own,) = [line for line in open("/proc/self/status") if line.startswith("VmHWM")]
    return (int(own.split()[1]) + resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss) / 1000

before, start = peak(), time.perf_counter()
stats = convert(Settings([sys.argv[1]], test=0.0), Path(sys.argv[2]))
assert stats.written == {"train": stats.read} == {"train": int(sys.argv[3])}
print(time.perf_counter() - start, peak(), before)
"""


def measured(folder: Path, count: int) -> tuple[float, float, float]:
    """Return the seconds that the conversion of so many rows takes, its peak in MB, and that before it."""
    records = json.loads(SAMPLE.read_text(encoding="utf-8"))
    source = folder / f"{count}.json"
    with source.open("w", encoding="utf-8") as file:
        for number in range(count):
            row = records[number % len(records)]
            row = row | {"instruction": f"{row['instruction']} ({number})"}
            file.write(("," if number else "[") + json.dumps(row, ensure_ascii=False))
        file.write("]")
    words = [str(source), str(folder / f"out{count}"), str(count)]
    done = subprocess.run([sys.executable, "-c", SCRIPT, *words], capture_output=True, text=True, check=True)
    seconds, peak, before = map(float, done.stdout.split())
    size = source.stat().st_size / 1e6
    print(f"\n{count:,} rows, {size:.0f} MB: {seconds:.1f} s, peak {peak:.0f} MB, {before:.0f} at the start")
    return seconds, peak, before


@pytest.mark.bench
@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_100_000_rows_take_15_seconds_and_no_more_memory_than_half_as_many(tmp_path: Path) -> None:
    _, half, _ = measured(tmp_path, 50_000)
    seconds, peak, before = measured(tmp_path, 100_000)
    assert seconds <= 15
    assert peak - before < 1000 and peak <= 1.1 * half
