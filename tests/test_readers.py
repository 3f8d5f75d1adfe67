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
from mcp_lora.records import ANSWER, CALL, RESULT, USER, Content, Fault, Tool, ToolCall, Turn


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


def test_filtered() -> None:
    first = of("filtered")[0]
    assert first.turns == [
        Turn(USER, "What is 128 * 46?"),
        Turn(CALL, "", (ToolCall("calculate", {"expression": "128 * 46"}),), ("",)),
    ]
    schema = {"type": "object", "properties": {"expression": {"type": "string"}}, "required": ["expression"]}
    assert first.tools == [Tool("office", "calculate", "Evaluates an arithmetic expression", schema)]


def test_a_row_without_a_schema_gets_it_from_the_catalogue() -> None:
    search, clock, missing = of("function_call")
    assert [tool.server for tool in search.tools + clock.tools] == ["web", "office"]
    assert clock.turns[0].text == ": What time is it in Lima?"  # cleaned later
    assert missing.reason == "not-in-catalogue" and "translate" in str(missing)


def test_trajectory_results_are_their_text() -> None:
    first = of("trajectory")[0]
    assert [turn.role for turn in first.turns] == [USER, CALL, RESULT]
    assert first.turns[2].text == "14:05"
    assert first.tools[0].name == "get_time"


def test_mcp_flow_test_files() -> None:
    first = of("mcp_flow_test")[0]
    assert first.turns[1].calls == (ToolCall("calculate", {"expression": "19 + 21 + 44"}),)
    assert [(tool.server, tool.name) for tool in first.tools] == [
        ("office", "calculate"),
        ("office", "get_time"),
    ]


def test_openai_with_parallel_calls_and_without_any() -> None:
    parallel, none, broken = of("openai")
    assert parallel.system == "You are a desk clerk."
    assert [call.arguments["place"] for call in parallel.turns[1].calls] == ["Rome", "Quito"]
    assert [turn.role for turn in parallel.turns] == [USER, CALL, RESULT, RESULT, ANSWER]
    assert [turn.ids for turn in parallel.turns[1:4]] == [("c1", "c2"), ("c1",), ("c2",)]
    assert [turn.role for turn in none.turns] == [USER, ANSWER] and len(none.tools) == 2
    assert broken.reason == "bad-json"


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


def test_sharegpt_and_hermes() -> None:
    plain, hermes, _ = of("sharegpt")
    assert plain.turns[1].calls[0].name == "convert-unit"
    assert hermes.turns[1].calls == (ToolCall("calculate", {"expression": "3.5 * 8"}),)
    assert hermes.turns[2] == Turn(RESULT, "28")
    assert hermes.turns[1].text == "I will compute that."


def test_xlam_parameters_become_a_schema() -> None:
    first, parallel, _ = of("xlam")
    assert first.tools[0].parameters == {
        "type": "object",
        "properties": {
            "customer": {"type": "string", "description": "Whose"},
            "limit": {"type": "integer", "description": "How many", "default": 10},
            "tags": {"type": "array", "description": "With which tags"},
        },
        "required": ["customer"],
    }
    assert len(parallel.turns[1].calls) == 2


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


def test_toucan_calls_are_python_literals_which_are_never_run() -> None:
    parallel, irrelevant, broken = of("toucan")
    assert [call.arguments["query"] for turn in parallel.turns for call in turn.calls] == [
        "tides Brest",
        "tides Cork",
    ]
    assert [turn.role for turn in irrelevant.turns] == [USER, ANSWER]
    assert broken.reason == "bad-json"
    messages = json.dumps([{"role": "tool_call", "content": "__import__('os').abort()"}])
    found = content({"question": "q", "tools": "[]", "messages": messages})
    assert isinstance(found, Fault) and "neither JSON nor a Python literal" in str(found)


def test_toolmind_arguments_are_a_string_or_an_object() -> None:
    one, two, _ = of("toolmind")
    assert one.turns[1].calls[0].arguments == {"expression": "17 ** 2"}
    assert two.turns[1].calls[0].arguments == {"expression": "18 ** 2"}


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


def test_a_tool_without_properties_gets_an_empty_set() -> None:
    found = content(record(tool_info={"tool_name": "t", "tool_description": None, "input_schema": {}}))
    assert isinstance(found, Content)
    assert found.tools == [Tool("everything", "t", "", {"type": "object", "properties": {}})]


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
