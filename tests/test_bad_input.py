"""Whatever the data holds: no traceback, and every row accounted for."""

import functools
import json
import operator
from pathlib import Path
from typing import Any

import pytest
from conftest import record, write_json
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mcp_lora.data.conversion import Settings, convert
from mcp_lora.errors import McpLoraError

# Python's json writes NaN, half surrogate pairs and big numbers, and reads them again.
TEXT = st.text(st.characters(codec=None), max_size=20)
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | TEXT
JSON = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=12,
)
WORDS = """instruction server_info tool_info function_call source_instruction tool messages conversations
tools query answers question name arguments role from content value tool_calls id tool_call_id
reasoning_content input_schema tool_name properties type required parameters function system enum $ref"""
KEYS = st.sampled_from(WORDS.split())
NEARLY = st.recursive(
    LEAVES | st.sampled_from(["user", "assistant", "tool_call", "tool", "get-sum", "{}", "[]", "#/x"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=6),
    max_leaves=25,
)
PLACES = """instruction tool_info tool_info.tool_name tool_info.input_schema tool_info.input_schema.properties
tool_info.input_schema.properties.a function_call function_call.name function_call.arguments
function_call.arguments.a server_info server_info.server_name"""
PATHS = st.sampled_from(PLACES.split())
relaxed = settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def sum_rule(file: Path, **more: Any) -> dict[str, Any] | None:
    """Convert a file; None if no row was usable, which is said in one line."""
    try:
        stats = convert(Settings([str(file)], test=0.3, no_call=0.3, **more), file.parent / "out")
    except McpLoraError as error:
        assert "no usable row" in str(error) and "\n" not in str(error)
        return None
    assert stats.read == sum(stats.written.values()) + sum(stats.rejected.values())
    return stats


def write(folder: Path, rows: list[Any]) -> Path:
    (folder / "rows.json").write_text(json.dumps(rows))
    return folder / "rows.json"


@relaxed
@given(rows=st.lists(JSON, max_size=5))
def test_any_json(tmp_path: Path, rows: list[Any]) -> None:
    stats = sum_rule(write(tmp_path, [*rows, record()]))
    assert stats and stats.read == len(rows) + 1


@relaxed
@given(rows=st.lists(NEARLY, max_size=4), turns=st.sampled_from(["call", "all"]))
def test_what_looks_nearly_right(tmp_path: Path, rows: list[Any], turns: str) -> None:
    stats = sum_rule(write(tmp_path, [*rows, record()]), turns=turns)
    assert stats and stats.read == len(rows) + 1


@relaxed
@given(path=PATHS, value=JSON | NEARLY)
def test_a_record_with_one_wrong_value(tmp_path: Path, path: str, value: Any) -> None:
    row = record("Add 3.")
    *outer, last = path.split(".")
    functools.reduce(operator.getitem, outer, row)[last] = value
    stats = sum_rule(write(tmp_path, [row, record()]))
    assert stats and stats.read == 2


@relaxed
@given(end=st.integers(0, 1500), junk=st.binary(max_size=30))
@pytest.mark.parametrize("name", ["cut.json", "cut.jsonl"])
def test_a_file_that_is_cut_or_damaged(tmp_path: Path, name: str, end: int, junk: bytes) -> None:
    rows = [record(f"Question {i}") for i in range(5)]
    whole = json.dumps(rows) if name == "cut.json" else "\n".join(map(json.dumps, rows))
    (tmp_path / name).write_bytes(whole.encode()[:end] + junk)
    sum_rule(tmp_path / name)


@relaxed
@given(content=st.binary(max_size=200))
@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".jsonl.gz", ".parquet"])
def test_any_bytes(tmp_path: Path, suffix: str, content: bytes) -> None:
    (tmp_path / f"any{suffix}").write_bytes(content)
    sum_rule(tmp_path / f"any{suffix}")


@pytest.mark.parametrize(
    "row",
    [
        record("x" * 5_000_000),
        record(function_call={"name": "get-sum", "arguments": {"b": "y" * 5_000_000}}),
        record(function_call={"name": "get-sum", "arguments": json.loads('{"a":' * 300 + "1" + "}" * 300)}),
        record(function_call={"name": "get-sum", "arguments": {"a": 10**400}}),
        record(function_call={"name": "get-sum", "arguments": {"a": float("nan")}}),
        {
            "messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}],
            "tools": [{"name": f"tool{i}", "parameters": {}} for i in range(10_000)],
        },
        {"messages": [{"role": "user", "content": "x"}] * 10_000, "tools": []},
    ],
    ids=["instruction", "argument", "nesting", "number", "nan", "tools", "turns"],
)
def test_the_enormous(tmp_path: Path, row: Any) -> None:
    stats = sum_rule(write(tmp_path, [row, record()]))
    assert stats and stats.read == 2


def test_keys_that_are_there_twice(tmp_path: Path) -> None:
    text = json.dumps(record("first")).replace('"instruction"', '"instruction": "zeroth", "instruction"', 1)
    (tmp_path / "rows.json").write_text(text)
    stats = sum_rule(tmp_path / "rows.json")
    assert stats and stats.written == {"train": 1}


def test_tools_with_numbers_as_keys_and_required_flags_are_no_traceback(tmp_path: Path) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "number"}}, "required": True}
    rows = [record(), record("Two?") | {"tools": "{1: 2}"}]
    rows[0]["tool_info"]["input_schema"] = schema
    rows[0]["function_call"]["arguments"] = {"a": None}
    messages = [{"role": "user", "content": "1?"}, {"role": "assistant", "content": "2"}]
    rows.append({"messages": messages, "tools": "{1: 2}"})
    source = write_json(tmp_path / "rows.json", [*rows, record("Good?")])
    statistics = convert(Settings([str(source)], test=0.0), tmp_path / "out")
    assert statistics.read == 4
    assert sum(statistics.written.values()) + sum(statistics.rejected.values()) == 4
