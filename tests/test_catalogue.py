from pathlib import Path
from typing import Any

import pytest
from conftest import SHAPES, SHARED, catalogue_of, write_json

from mcp_lora.data import catalogue as catalogues
from mcp_lora.data import files
from mcp_lora.data.catalogue import Catalogue
from mcp_lora.data.records import RowError, Tool
from mcp_lora.data.tools import tools_in


def tool(schema: Any, name: str = "t", server: str = "s") -> Tool:
    (found,) = tools_in({"name": name, "parameters": schema}, server)
    return found


def test_both_kinds_of_file_are_read_and_what_is_no_tool_is_told(tmp_path: Path) -> None:
    catalogue = Catalogue()
    (tmp_path / "empty.json").touch()
    write_json(tmp_path / "braces.json", {})
    found, _ = files.find([SHAPES / "tools", tmp_path])
    notes = catalogues.load(found, catalogue)
    assert [(tool.server, tool.name) for tool in catalogue.tools] == [
        ("office", "calculate"),
        ("office", "convert-unit"),
        ("office", "get_time"),
        ("web", "search"),
        ("web", "fetch"),
    ]
    assert catalogue.tools[4].parameters == {"type": "object", "properties": {}}
    assert [note.split("/")[-1] for note in notes] == [
        "web.json: a tool has no name",
        "braces.json contains no tools",
        "empty.json contains no tools",
    ]


CITY = {"type": "object", "properties": {"city": {"type": "string"}}}
MCP = {"name": "tide", "description": "Tide", "inputSchema": CITY}
TOOLBENCH: dict[str, Any] = {
    "required_parameters": [{"name": "city", "type": "STRING", "default": ""}],
    "optional_parameters": [],
}


@pytest.mark.parametrize(
    ("value", "server"),
    [
        ({"mcpServers": {"sea": {"command": "x", "tools": [MCP]}}}, "sea"),
        ([{"metadata": {"server_name": "sea", "remote_server_response": {"tools": [MCP]}}}], "sea"),
        ({"sea": {"tide": {"description": "Tide", "parameters": CITY}}}, "sea"),
        ({"tide": {"description": "Tide", "inputs": {"city": {"type": "string"}}}}, "file"),
        ([{"name": "tide", "args_schema": CITY}], "file"),
        ([{"name": "tide", "parameters": [{"name": "city", "type": "string"}]}], "file"),
        ([{"name": "tide", **TOOLBENCH}], "file"),
        ({"tools": [{"toolSpec": {"name": "tide", "inputSchema": {"json": CITY}}}]}, "file"),
        ([{"server_name": "sea", "tools": [{"name": "tide", "parameter": {"city": "where"}}]}], "sea"),
        (f"[{MCP}]", "file"),
    ],
)
def test_tools_of_every_kind_of_catalogue(value: Any, server: str) -> None:
    (found,) = tools_in(value, "file")
    assert (found.server, found.name, [*found.parameters["properties"]]) == (server, "tide", ["city"])
    if "required_parameters" in str(value):
        assert found.parameters["required"] == ["city"]


def test_a_name_that_recurs_belongs_to_the_files_own_server() -> None:
    catalogue = Catalogue()
    catalogue.number(tool({"type": "object", "title": "one"}, "search", "one"))
    catalogue.number(tool({"type": "object", "title": "two"}, "search", "two"))
    assert catalogue.find("search", "two").server == "two"
    with pytest.raises(RowError, match="several servers: one, two") as caught:
        catalogue.find("search", "three")
    assert caught.value.reason == "ambiguous-tool"
    with pytest.raises(RowError, match="add its catalogue with --tools"):
        catalogue.find("other", "one")


def test_another_definition_of_a_tool_does_not_take_its_place() -> None:
    catalogue = Catalogue()
    first, second = tool({"type": "object"}), tool({"type": "object", "title": "later"})
    assert catalogue.number(first) == catalogue.number(first) == 0
    assert catalogue.number(second) is None
    assert catalogue.tools == [first]


@pytest.mark.parametrize(
    ("schema", "arguments", "problem"),
    [
        ({"properties": {"a": {"type": ["string", "null"]}}}, {"a": None}, None),
        ({"properties": {"a": {"type": "string"}}}, {"a": None}, 'a: null is not of type "string"'),
        ({"properties": {"a": {"anyOf": [{"type": "integer"}, {"type": "null"}]}}}, {"a": 1}, None),
        ({"properties": {"a": {"$ref": "#/$defs/x"}}, "$defs": {"x": {"enum": [1]}}}, {"a": 2}, "a: 2 is"),
        ({"properties": {"a": {}}}, {"a": [{"b": 1}]}, None),
        ({"required": ["a"]}, {}, '"a" is a required property'),
        ({"properties": {}, "additionalProperties": False}, {"z": 1}, "'z' was unexpected"),
        ({"properties": {"a": {"enum": ["x"]}}}, {"a": "y"}, "a: "),
        ({"properties": {"a": {"type": "string", "format": "uri"}}}, {"a": ""}, None),
        ({"$schema": "http://json-schema.org/draft-07/schema#"}, {}, None),
        ({"properties": {"a": {"type": "array", "items": {"type": "integer"}}}}, {"a": [1, "x"]}, "a/1: "),
        ({"properties": {"a": {"type": "integer"}}}, {"a": 10**30}, None),
    ],
)
@pytest.mark.parametrize("registered", [True, False])
def test_arguments_are_checked(
    schema: dict[str, Any], arguments: dict[str, Any], problem: str | None, registered: bool
) -> None:
    catalogue = Catalogue()
    checked = tool(schema)
    if registered:
        catalogue.number(checked)
    found = catalogue.problem(checked, arguments)
    assert found is None if problem is None else problem in str(found)
    assert not catalogue.broken


@pytest.mark.parametrize(
    "schema",
    [
        {"$ref": "http://127.0.0.1:9/schema.json"},
        {"$ref": "file:///etc/hostname"},
        {"properties": {"a": {"pattern": "["}}},
        {"required": "a"},
    ],
)
def test_a_broken_schema_is_not_the_rows_fault(schema: dict[str, Any]) -> None:
    """Nor is anything fetched for it."""
    catalogue = Catalogue()
    assert catalogue.problem(tool(schema), {"a": 1}) is None
    assert list(catalogue.broken) == [("s", "t")] and catalogue.broken["s", "t"]


def test_a_schema_nested_too_deep_is_a_broken_one() -> None:
    deep: dict[str, Any] = {"type": "string"}
    for _ in range(150):
        deep = {"type": "object", "properties": {"a": deep}}
    catalogue = Catalogue()
    assert catalogue.problem(tool(deep), {}) is None
    assert "Recursion limit" in catalogue.broken["s", "t"]


@pytest.mark.skipif(not SHARED.is_dir(), reason="the third-party data is not here")
def test_real_catalogues() -> None:
    catalogue = catalogue_of(SHARED / "tools", SHARED / "mcp_tools")
    for known in catalogue.tools:
        catalogue.problem(known, {})
    assert len(catalogue.tools) == 4775
    # exclusiveMinimum: true, as it was in draft 4
    assert list(catalogue.broken) == [("PDF Reader MCP Server", "pdf-reader-mcp_read_pdf")]
