"""The shipped sample: real, varied, and without near copies that would flatter an evaluation."""

import difflib
import json
import re
from collections import Counter
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT, SAMPLE

from mcp_lora.data.conversion import Settings, convert

RECORDS: list[dict[str, Any]] = json.loads(SAMPLE.read_text(encoding="utf-8"))


def test_every_record_is_usable(tmp_path: Path) -> None:
    stats = convert(Settings([str(SAMPLE)]), tmp_path)
    assert 270 <= stats.read <= 330
    assert not stats.rejected and not stats.cleaned and not stats.notes


def test_servers_tools_and_languages() -> None:
    assert len({record["server_info"]["server_name"] for record in RECORDS}) == 8
    tools = Counter(record["tool_info"]["tool_name"] for record in RECORDS)
    assert len(tools) >= 30 and min(tools.values()) >= 5
    chinese = [record for record in RECORDS if re.search("[\u4e00-\u9fff]", record["instruction"])]
    assert 25 <= len(chinese) <= 100


def test_every_response_is_a_tools_and_no_refusal() -> None:
    for record in RECORDS:
        response = json.loads(record["tool_response"]["content"])
        assert response["content"] and response["isError"] is False


def test_no_instruction_names_its_tool() -> None:
    for record in RECORDS:
        name = re.sub("[_-]", " ", record["tool_info"]["tool_name"])
        words = re.sub("[_-]", " ", record["instruction"].lower())
        assert not re.search(rf"\b{re.escape(name)}\b", words), record["instruction"]


def values(arguments: Any) -> list[str]:
    if isinstance(arguments, dict):
        arguments = list(arguments.values())
    if isinstance(arguments, list):
        return [found for item in arguments for found in values(item)]
    return [str(arguments)]


def skeleton(record: dict[str, Any]) -> list[str]:
    """The words of an instruction with the call's values taken out."""
    text = record["instruction"]
    for value in sorted(values(record["function_call"]["arguments"]), key=len, reverse=True):
        text = text.replace(value, "_")
    return re.findall(r"[a-z']+|[\u4e00-\u9fff]|_", text.lower())


@pytest.mark.parametrize("tool", sorted({record["tool_info"]["tool_name"] for record in RECORDS}))
def test_no_instruction_is_another_with_a_value_exchanged(tool: str) -> None:
    same = [record for record in RECORDS if record["tool_info"]["tool_name"] == tool]
    for one, other in combinations(same, 2):
        alike = difflib.SequenceMatcher(None, skeleton(one), skeleton(other)).ratio()
        assert alike < 0.8, (one["instruction"], other["instruction"])


def test_the_file_is_what_the_table_says() -> None:
    table = yaml.safe_load((ROOT / "scripts" / "sample_calls.yaml").read_text(encoding="utf-8"))
    rows = [
        (text, name, args)
        for tools in table.values()
        for name, calls in tools.items()
        for text, args in calls
    ]
    found = [(record["instruction"], *record["function_call"].values()) for record in RECORDS]
    assert found == rows
