"""Conversion at full scale, as ratios measured in one run: pytest -m bench -s tests/bench/test_convert.py.

As many rows and tools as the paper's data set has. The plain conversion is what it replaces:
json.load, one tool a sample, json.dump(indent=2). Start-up is not counted on either side.
"""

import json
import random
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from mcp_lora import embedded

ROWS, SERVERS, TOOLS = 68_733, 1_163, 11_000
TEXT = (
    "account branch budget cache chart city commit customer date event field file flight hotel image index "
    "invoice issue language limit list message metric model order page price project query record region "
    "report route score search sprint status stock table team token track train user video weather"
)
WORDS = TEXT.split()
HANZI = "的一是在不了有和人这中大为上个国我以要他时来用们生到作地于出就分对成会可主发年动同工也能下过子说"

PLAIN = """
import json, resource, sys, time
start = time.perf_counter()
with open(sys.argv[1], encoding="utf-8") as file:
    rows = json.load(file)
samples = []
for row in rows:
    tool = row["tool_info"]
    tools = [{"name": tool["tool_name"], "description": tool["tool_description"],
              "parameters": tool["input_schema"]}]
    call = json.dumps(row["function_call"], ensure_ascii=False)
    turns = [{"from": "human", "value": row["instruction"]}, {"from": "function_call", "value": call}]
    samples.append({"conversations": turns, "tools": json.dumps(tools, ensure_ascii=False)})
with open(sys.argv[2] + ".json", "w", encoding="utf-8") as file:
    json.dump(samples, file, ensure_ascii=False, indent=2)
print(time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""

OURS = """
import json, resource, sys, time
from pathlib import Path
from mcp_lora.dataset import Settings, convert
budget = json.loads(sys.argv[3])
if budget:
    from llamafactory.data import template
    from transformers import AutoTokenizer
start = time.perf_counter()
stats = convert(Settings([sys.argv[1]], test=0.0), Path(sys.argv[2]), budget)
assert stats["written"] == {"mcp_train": stats["read"]} and stats["tools"] > 10_900
seconds = time.perf_counter() - start
whose = resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN  # what a copy shares with it is counted twice
print(seconds, sum(resource.getrusage(who).ru_maxrss for who in whose) / 1024)
"""


def write_rows(file: Path, count: int) -> None:
    """Write filtered records, one more like another as in real data: random words, real sizes."""
    draw = random.Random(0)

    def words(number: int) -> str:
        return " ".join(draw.choices(WORDS, k=number))

    def text(number: int) -> str:
        """A third is Chinese, and some of it has an emoji, as in real data."""
        if draw.random() < 0.33:
            clauses = ["".join(draw.choices(HANZI, k=7)) for _ in range(-(-number // 4))]
            return "，".join(clauses) + draw.choice(["。", "。", "🔧"])
        return words(number)

    values = {
        "string": lambda: words(3),
        "integer": lambda: draw.randint(0, 999),
        "number": lambda: round(draw.random(), 4),
        "boolean": lambda: draw.random() < 0.5,
    }
    tools = []
    for number in range(TOOLS):
        properties = {
            f"{draw.choice(WORDS)}_{k}": {"type": draw.choice(list(values)), "description": text(6)}
            for k in range(draw.randint(1, 5))
        }
        schema = {"type": "object", "properties": properties, "required": list(properties)[:1]}
        name = f"{draw.choice(WORDS)}_{draw.choice(WORDS)}_{number}"
        tools.append((f"server {number % SERVERS}", name, text(14), schema))
    with file.open("w", encoding="utf-8") as target:
        for row in range(count):
            server, name, description, schema = tools[row] if row < TOOLS else draw.choice(tools)
            arguments = {key: values[value["type"]]() for key, value in schema["properties"].items()}
            record: dict[str, Any] = {
                "instruction": f"{text(22)} {row}",
                "server_info": {"server_name": server, "server_description": text(8)},
                "tool_info": {
                    "tool_name": name,
                    "tool_description": description,
                    "input_schema": schema,
                },
                "function_call": {"name": name, "arguments": arguments},
                "tool_response": {"content": json.dumps({"text": words(8)})},
                "final_response": text(12),
            }
            target.write(("[" if row == 0 else ",\n") + json.dumps(record, ensure_ascii=False))
        target.write("]\n")


def measured(script: str, *words: str) -> tuple[float, float]:
    """Return the seconds that a script takes after its imports, and its peak memory in MB."""
    done = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True, check=True)
    seconds, megabytes = map(float, done.stdout.split()[-2:])
    return seconds, megabytes


def median(runs: list[tuple[float, float]]) -> tuple[float, float]:
    return statistics.median(run[0] for run in runs), max(run[1] for run in runs)


@pytest.mark.bench
def test_the_papers_size_beside_the_plain_conversion(tmp_path: Path) -> None:
    source = tmp_path / "rows.json"
    write_rows(source, ROWS)
    budget = {
        "model_name_or_path": str(embedded.ensure()),
        "template": "smollm2",
        "tool_format": "qwen",
        "cutoff_len": 4096,
    }
    runs: defaultdict[str, list[tuple[float, float]]] = defaultdict(list)
    for _ in range(5):
        for name, script, more in (
            ("plain", PLAIN, []),
            ("ours", OURS, ["null"]),
            ("with the token budget", OURS, [json.dumps(budget)]),
        ):
            # Each begins without what another has left.
            with tempfile.TemporaryDirectory(dir=tmp_path) as out:
                runs[name].append(measured(script, str(source), f"{out}/out", *more))
    plain, plain_memory = median(runs["plain"])
    print(f"\n{ROWS} rows, {source.stat().st_size / 1e6:.0f} MB, medians of 5:")
    for name, found in runs.items():
        seconds, memory = median(found)
        print(f"{name}: {seconds:.1f} s, {seconds / plain:.2f} × plain, peak {memory:.0f} MB")
    ours, memory = median(runs["ours"])
    counted, _ = median(runs["with the token budget"])
    assert memory <= 500 and memory < plain_memory
    assert ours <= plain
    assert counted <= 2.5 * plain


@pytest.mark.bench
def test_ten_times_the_rows_take_ten_times_the_time_and_no_more_memory(tmp_path: Path) -> None:
    found = []
    for times in (1, 10):
        source = tmp_path / f"rows{times}.json"
        write_rows(source, times * ROWS)
        found.append(measured(OURS, str(source), str(tmp_path / f"out{times}"), "null"))
    (seconds, memory), (more_seconds, more_memory) = found
    time, peak = more_seconds / seconds, more_memory / memory
    print(f"\nten times the rows: {time:.1f} × the time, {peak:.2f} × the peak of {memory:.0f} MB")
    assert 8.5 * seconds <= more_seconds <= 11.5 * seconds
    assert more_memory <= 1.1 * memory
