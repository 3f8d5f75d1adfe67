import json
import os
from pathlib import Path

import pytest
from conftest import SHARED, record, write_json

from mcp_lora.errors import McpLoraError
from mcp_lora.readers import newest_filtered, read_filtered
from mcp_lora.records import Example, Rejected, Tool, ToolCall


def test_a_record_becomes_an_example(tmp_path: Path) -> None:
    file = write_json(tmp_path / "one.json", [record("  Add 1 and 2. ")])
    (example,) = read_filtered(file)
    assert isinstance(example, Example)
    assert example.instruction == "Add 1 and 2."
    schema = {"type": "object", "properties": {"a": {"type": "number"}}}
    assert example.tool == Tool("everything", "get-sum", "Does get-sum", schema)
    assert example.call == ToolCall("get-sum", {"a": 1})
    assert (example.file, example.row) == (str(file), 1)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("one.json", json.dumps(record())),
        ("list.json", json.dumps([record()])),
        ("bom.json", "\ufeff" + json.dumps([record()])),
        ("lines.jsonl", json.dumps(record()) + "\n\n"),
        # U+2028 breaks lines for str.splitlines, but not in JSON
        ("separator.jsonl", json.dumps(record("a\u2028b"), ensure_ascii=False)),
    ],
)
def test_every_container_is_read(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert [type(row) for row in read_filtered(tmp_path / name)] == [Example]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("text", "not a JSON object"),
        (record(instruction=" "), "no instruction"),
        (record(tool_info={}), "no tool"),
        (record(tool_info={"tool_name": "get-sum"}), "the tool has no input schema"),
        (
            record(tool_info={"tool_name": "get-sum", "input_schema": {"properties": None}}),
            "the tool has no input schema",
        ),
        (record(function_call={}), "no call"),
        (record(function_call={"name": "other", "arguments": {}}), "the call names another tool"),
        (
            record(function_call={"name": "get-sum", "arguments": "{}"}),
            "the call's arguments are not an object",
        ),
        (record(instruction="half a pair: \ud83d"), "a text or a number that is not JSON"),
        (
            record(function_call={"name": "get-sum", "arguments": {"a": float("inf")}}),
            "a text or a number that is not JSON",
        ),
    ],
)
def test_a_faulty_row_is_rejected_where_it_stands(tmp_path: Path, row: object, reason: str) -> None:
    file = tmp_path / "rows.json"
    file.write_text(json.dumps([record(), row]))
    assert list(read_filtered(file))[1] == Rejected(str(file), 2, reason, row)


def test_a_broken_line_costs_that_line_alone(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"broken\n' + json.dumps(record()) + "\n", encoding="utf-8")
    broken, good = read_filtered(file)
    assert broken == Rejected(str(file), 1, "not a JSON object", '{"broken')
    assert isinstance(good, Example)


def test_a_tool_without_properties_gets_an_empty_set(tmp_path: Path) -> None:
    info = {"tool_name": "get-sum", "tool_description": None, "input_schema": {}}
    call = {"name": "get-sum", "arguments": {}}
    file = write_json(tmp_path / "row.json", record(tool_info=info, function_call=call))
    (example,) = read_filtered(file)
    assert isinstance(example, Example)
    assert example.tool.parameters == {"type": "object", "properties": {}}
    assert example.tool.description == ""


@pytest.mark.parametrize("content", [b"{oops", b"\xff\xfe\x00"])
def test_what_is_not_json_names_the_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "bad.json").write_bytes(content)
    with pytest.raises(McpLoraError, match=r"bad\.json .*mcp-lora convert") as caught:
        list(read_filtered(tmp_path / "bad.json"))
    assert "\n" not in str(caught.value)


def test_the_newest_file_goes_by_the_date_in_its_name(tmp_path: Path) -> None:
    names = ["filtered_20250101_000000.json", "filtered_20251113_175326.json", "filtered_sample.json"]
    for age, name in enumerate(names):
        write_json(tmp_path / name, [])
        os.utime(tmp_path / name, (1_700_000_000 - age, 1_700_000_000 - age))
    assert newest_filtered(tmp_path).name == names[1]
    undated = write_json(tmp_path / "filtered_mine.json", [])  # written today
    assert newest_filtered(tmp_path) == undated


def test_the_sample_is_used_when_nothing_else_is_there(tmp_path: Path) -> None:
    sample = write_json(tmp_path / "filtered_sample.json", [])
    assert newest_filtered(tmp_path) == sample


def test_an_empty_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(McpLoraError, match="mcp-lora convert FILE"):
        newest_filtered(tmp_path)


@pytest.mark.skipif(not SHARED.is_dir(), reason="the third-party data is not here")
def test_real_files_are_read_to_the_last_row() -> None:
    rows = {file.name: list(read_filtered(file)) for file in (SHARED / "filtered").glob("*.json")}
    assert {name: len(found) for name, found in rows.items()} == {
        "filtered_20251113_175326.json": 5,
        "模板.json": 1,
    }
    assert all(isinstance(row, Example) for found in rows.values() for row in found)
