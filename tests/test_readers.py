import json
import os
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from conftest import SAMPLE, SHAPES, SHARED, catalogue_of, record, write_json

from mcp_lora import files, readers
from mcp_lora.errors import McpLoraError
from mcp_lora.readers import newest_filtered
from mcp_lora.records import ANSWER, CALL, RESULT, Content, Fault, Tool, ToolCall, Turn


def content(row: Any, shape: str | None = None, server: str = "") -> Content | Fault:
    catalogue = catalogue_of(SHAPES / "tools")
    try:
        return readers.read(row, shape or readers.recognise(row), lambda name: catalogue.find(name, server))
    except Fault as fault:
        return fault


def contents(file: Path) -> list[Content | Fault]:
    return [content(row, server=file.stem) for row in files.read(file)]


def of(shape: str) -> list[Any]:
    (file,) = (SHAPES / "rows").glob(f"{shape}.*")
    return contents(file)


@pytest.mark.parametrize("shape", readers.SHAPES)
def test_a_shape_is_known_by_its_keys(shape: str) -> None:
    (file,) = (SHAPES / "rows").glob(f"{shape}.*")
    assert {readers.recognise(row) for row in files.read(file)} == {shape}


@pytest.mark.parametrize(
    ("shape", "row", "roles", "arguments", "tools"),
    [
        ("filtered", 0, "user call", [{"expression": "128 * 46"}], "office/calculate"),
        ("function_call", 0, "user call", [{"query": "tallest lighthouse"}], "web/search"),
        ("function_call", 1, "user call", [{"place": "Lima"}], "office/get_time"),
        ("trajectory", 0, "user call result", [{"place": "Oslo"}], "office/get_time"),
        (
            "mcp_flow_test",
            0,
            "user call",
            [{"expression": "19 + 21 + 44"}],
            "office/calculate office/get_time",
        ),
        (
            "openai",
            0,
            "user call result result answer",
            [{"place": "Rome"}, {"place": "Quito"}],
            "/get_time /calculate",
        ),
        ("openai", 1, "user answer", [], "/get_time /calculate"),
        (
            "sharegpt",
            0,
            "user call result answer",
            [{"value": 12, "from": "kg", "to": "lb"}],
            "/convert-unit /calculate",
        ),
        ("sharegpt", 1, "user call result", [{"expression": "3.5 * 8"}], "/calculate"),  # as Hermes writes it
        ("xlam", 1, "user call", [{"customer": "Bo"}, {"customer": "Cy"}], "/list_orders"),
        (
            "toucan",
            0,
            "user call call result result answer",
            [{"query": "tides Brest"}, {"query": "tides Cork"}],
            "/search",
        ),
        ("toucan", 1, "user answer", [], "/search"),
        ("toolmind", 0, "user call result answer", [{"expression": "17 ** 2"}], "/calculate"),
        ("toolmind", 1, "user call", [{"expression": "18 ** 2"}], "/calculate"),
    ],
)
def test_every_shape_is_read(shape: str, row: int, roles: str, arguments: list[Any], tools: str) -> None:
    found = of(shape)[row]
    assert [turn.role for turn in found.turns] == roles.split()
    assert [call.arguments for turn in found.turns for call in turn.calls] == arguments
    assert [f"{tool.server}/{tool.name}" for tool in found.tools] == tools.split()


def test_what_is_said_beside_the_calls_and_in_the_results() -> None:
    schema = {"type": "object", "properties": {"expression": {"type": "string"}}, "required": ["expression"]}
    expected = [Tool("office", "calculate", "Evaluates an arithmetic expression", schema)]
    assert of("filtered")[0].tools == expected
    assert of("function_call")[1].turns[0].text == ": What time is it in Lima?"  # cleaned later
    assert of("trajectory")[0].turns[2].text == "14:05"
    assert of("openai")[0].system == "You are a desk clerk."
    assert [turn.ids for turn in of("openai")[0].turns[1:4]] == [("c1", "c2"), ("c1",), ("c2",)]
    hermes = of("sharegpt")[1]
    assert [turn.text for turn in hermes.turns[1:]] == ["I will compute that.", "28"]


def test_reasoning_text_and_ids_are_kept() -> None:
    function = {"name": "calculate", "arguments": {}}
    calls = [{"id": given, "function": function} for given in ("x", 7, "half a pair: \ud83d")]
    row = {
        "messages": [
            {"role": "assistant", "content": "So:", "reasoning_content": "Hm.", "tool_calls": calls},
            {"role": "tool", "tool_call_id": 0, "content": "3"},
            {"role": "assistant", "content": "Done.", "reasoning_content": None},
        ]
    }
    found = content(row)
    assert isinstance(found, Content) and found.turns == [
        Turn(CALL, "So:", (ToolCall("calculate", {}),) * 3, ("x", "", ""), "Hm."),
        Turn(RESULT, "3"),
        Turn(ANSWER, "Done."),
    ]


def test_xlam_parameters_become_a_schema() -> None:
    assert of("xlam")[0].tools[0].parameters == {
        "type": "object",
        "properties": {
            "customer": {"type": "string", "description": "Whose"},
            "limit": {"type": "integer", "description": "How many", "default": 10},
            "tags": {"type": "array", "description": "With which tags"},
        },
        "required": ["customer"],
    }


@pytest.mark.parametrize(
    ("written", "kind"),
    [
        ("Optional[str]", "string"),
        ("Dict[str, int]", "object"),
        ("float, optional", "number"),
        ("Tuple[int, int]", "array"),
        ("string", "string"),
        ("Callable[[float], float]", None),
        ("Union[int, str]", None),
        (None, None),
    ],
)
def test_a_python_type_becomes_a_schemas(written: str | None, kind: str | None) -> None:
    schema = readers._flat_schema({"p": {"type": written}})
    assert schema["properties"]["p"].get("type") == kind


def test_a_python_literal_is_never_run() -> None:
    messages = json.dumps([{"role": "tool_call", "content": "__import__('os').abort()"}])
    found = content({"question": "q", "tools": "[]", "messages": messages})
    assert isinstance(found, Fault) and "neither JSON nor a Python literal" in str(found)


def test_the_same_rows_from_parquet(tmp_path: Path) -> None:
    source = json.loads((SHAPES / "rows/toucan.json").read_text(encoding="utf-8"))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(source), tmp_path / "toucan.parquet")
    good = contents(tmp_path / "toucan.parquet")[:2]
    assert good == of("toucan")[:2]


def test_a_shape_can_be_forced() -> None:
    row = {"query": "q", "answers": [], "messages": [], "tools": []}
    assert isinstance(content(row, "openai"), Content)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("text", "unknown-shape"),
        ({"rows": 1}, "unknown-shape"),
        (record(instruction=None), "no-instruction"),
        (record(tool_info={}), "no-tool"),
        (record(tool_info={"tool_name": "get-sum"}), "no-schema"),
        (record(tool_info={"tool_name": "get-sum", "input_schema": {"properties": None}}), "no-schema"),
        (record(function_call={}), "no-call"),
        (record(function_call=None), "no-call"),
        (record(function_call={"name": "get-sum", "arguments": [1]}), "bad-arguments"),
        ([{"role": "user", "content": "Hello"}], "no-call"),
        ({"messages": [{"role": "narrator", "content": "x"}]}, "bad-message"),
        ({"messages": [{"role": "user", "content": {"x": 1}}]}, "bad-message"),
        ({"messages": "x"}, "bad-message"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"name": "t", "arguments": "{"}]}]}, "bad-json"),
        ({"source_instruction": "q", "function_call": {"name": "no", "arguments": {}}}, "not-in-catalogue"),
        ({"conversations": [{"from": "gpt", "value": "<functioncall> {}"}]}, "no-call"),
        ({"query": "q", "answers": "[]", "tools": "[]"}, "no-call"),
    ],
)
def test_a_faulty_row_has_a_reason_and_a_sentence(row: object, reason: str) -> None:
    found = content(row)
    assert isinstance(found, Fault) and found.reason == reason and str(found)


def test_a_catalogue_among_the_data_is_pointed_at() -> None:
    (found,) = contents(SHAPES / "tools/office.json")
    assert "--tools" in str(found)


def test_the_newest_file_goes_by_the_date_in_its_name(tmp_path: Path) -> None:
    with pytest.raises(McpLoraError, match="mcp-lora convert FILE"):
        newest_filtered(tmp_path)
    assert newest_filtered(SAMPLE.parent) == SAMPLE
    names = ["filtered_20250101_000000.json", "filtered_20251113_175326.json", "filtered_sample.json"]
    for age, name in enumerate(names):
        write_json(tmp_path / name, [])
        os.utime(tmp_path / name, (1_700_000_000 - age, 1_700_000_000 - age))
    assert newest_filtered(tmp_path).name == names[1]
    undated = write_json(tmp_path / "filtered_mine.json", [])  # written today
    assert newest_filtered(tmp_path) == undated


@pytest.mark.skipif(not SHARED.is_dir(), reason="the third-party data is not here")
def test_real_files_are_read_to_the_last_row() -> None:
    counts = {
        file.name: sum(isinstance(content, Content) for content in contents(file))
        for file in (SHARED / "filtered").glob("*.json")
    }
    assert counts == {"filtered_20251113_175326.json": 5, "模板.json": 1}
