import json
import os
from pathlib import Path
from typing import Any

import pytest
from conftest import SAMPLE, SHARED, record, write_json

from mcp_lora import dataset
from mcp_lora.dataset import convert, refresh
from mcp_lora.errors import McpLoraError


def load(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def instructions(file: Path) -> list[str]:
    return [row["conversations"][0]["value"] for row in load(file)]


def names(row: dict[str, Any]) -> list[str]:
    return [tool["name"] for tool in json.loads(row["tools"])]


@pytest.fixture
def sample_data(tmp_path: Path) -> Path:
    convert([SAMPLE], tmp_path)
    return tmp_path


def test_a_sample_is_what_the_engine_reads(tmp_path: Path) -> None:
    source = write_json(
        tmp_path / "row.json", record("加 1", function_call={"name": "get-sum", "arguments": {"a": 1}})
    )
    convert([source], tmp_path)
    (row,) = load(tmp_path / "mcp_train_data.json")
    assert row == {
        "conversations": [
            {"from": "human", "value": "加 1"},
            {"from": "function_call", "value": '{"name": "get-sum", "arguments": {"a": 1}}'},
        ],
        "system": dataset.SYSTEM,
        "tools": '[{"name": "get-sum", "description": "Does get-sum", '
        '"parameters": {"type": "object", "properties": {"a": {"type": "number"}}}}]',
    }


def test_dataset_info_names_every_column_and_tag(sample_data: Path) -> None:
    info = load(sample_data / "dataset_info.json")
    assert sorted(info) == ["mcp_test", "mcp_train"]
    assert info["mcp_train"]["file_name"] == "mcp_train_data.json"
    assert info["mcp_train"]["columns"] == {
        "messages": "conversations",
        "system": "system",
        "tools": "tools",
    }
    assert len(info["mcp_train"]["tags"]) == 7


def test_every_row_ends_in_exactly_one_place(tmp_path: Path) -> None:
    rows = [record(f"Question {i}", tool=f"tool{i % 7}") for i in range(50)]
    faulty = [record(function_call={}), "text", rows[3]]
    source = write_json(tmp_path / "rows.json", rows + faulty)
    stats = convert([source], tmp_path / "out")
    assert stats["read"] == 53 == stats["train"] + stats["test"] + stats["rejected"]
    assert (stats["train"], stats["test"], stats["rejected"]) == (45, 5, 3)
    assert stats["reasons"] == {"no call": 1, "not a JSON object": 1, "duplicate": 1}
    assert load(tmp_path / "out/stats.json") == stats
    found = instructions(tmp_path / "out/mcp_train_data.json") + instructions(
        tmp_path / "out/mcp_test_data.json"
    )
    assert sorted(found) == sorted(row["instruction"] for row in rows)
    lines = (tmp_path / "out/rejected.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [
        {"file": str(source), "row": 51 + i, "reason": reason, "record": row}
        for i, (reason, row) in enumerate(zip(stats["reasons"], faulty, strict=True))
    ]


def test_held_out_rows_are_spread_over_the_tools_and_leave_each_its_last(tmp_path: Path) -> None:
    rows = [record(f"Question {i}", tool="often" if i < 80 else f"once{i}") for i in range(100)]
    stats = convert([write_json(tmp_path / "rows.json", rows)], tmp_path, test=0.2)
    assert stats["test"] == 20
    held_out = [row["conversations"][1]["value"] for row in load(tmp_path / "mcp_test_data.json")]
    assert all('"often"' in call for call in held_out)


def test_the_sample_holds_out_a_tenth_of_each_big_tool(sample_data: Path) -> None:
    trained = {
        json.loads(row["conversations"][1]["value"])["name"]
        for row in load(sample_data / "mcp_train_data.json")
    }
    tested = [
        json.loads(row["conversations"][1]["value"])["name"]
        for row in load(sample_data / "mcp_test_data.json")
    ]
    assert len(trained) == 31 and len(tested) == 29
    assert max(tested.count(name) for name in tested) == 2  # of the tools with most rows


def test_candidates_hold_the_right_tool_once_and_its_server_first(sample_data: Path) -> None:
    servers = {item["tool_info"]["tool_name"]: item["server_info"]["server_name"] for item in load(SAMPLE)}
    sizes = {server: list(servers.values()).count(server) for server in servers.values()}
    places = set()
    for row in load(sample_data / "mcp_train_data.json"):
        right = json.loads(row["conversations"][1]["value"])["name"]
        offered = names(row)
        assert len(offered) == len(set(offered)) == 10
        own = [name for name in offered if servers[name] == servers[right]]
        assert len(own) == min(10, sizes[servers[right]])
        places.add(offered.index(right))
    assert places == set(range(10))


def test_two_servers_tools_of_one_name_are_never_offered_together(tmp_path: Path) -> None:
    rows = [record(f"Q{i}", server_info={"server_name": f"s{i}"}) for i in range(5)]
    rows.append(record("Q", tool="other"))
    convert([write_json(tmp_path / "rows.json", rows)], tmp_path, test=0)
    for row in load(tmp_path / "mcp_train_data.json"):
        assert sorted(names(row)) == ["get-sum", "other"]


def test_same_input_and_seed_give_the_same_bytes(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        convert([SAMPLE], tmp_path / folder, seed=7)
    convert([SAMPLE], tmp_path / "three", seed=8)
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert files == [
        "dataset_info.json",
        "mcp_test_data.json",
        "mcp_train_data.json",
        "rejected.jsonl",
        "stats.json",
    ]
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    train = "mcp_train_data.json"
    assert (tmp_path / "one" / train).read_bytes() != (tmp_path / "three" / train).read_bytes()


def test_nothing_usable_writes_nothing_over(sample_data: Path, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in sample_data.iterdir()}
    bad = write_json(tmp_path / "sub/bad.json", [record(function_call={})])
    with pytest.raises(McpLoraError, match=r"no usable row in .*1 × no call.*mcp-lora convert"):
        convert([bad], sample_data)
    assert {path: path.read_bytes() for path in sample_data.iterdir() if path.is_file()} == before


def test_a_rejected_row_that_is_no_unicode_is_kept(tmp_path: Path) -> None:
    rows = [record("good"), record("half a pair: \ud83d")]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    convert([tmp_path / "rows.json"], tmp_path)
    assert load(tmp_path / "rejected.jsonl")["record"] == rows[1]


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file is in the way")
    with pytest.raises(McpLoraError, match="mcp-lora convert --out"):
        convert([SAMPLE], tmp_path / "out")


def test_fresh_data_is_left_and_newer_data_is_converted_with_the_same_settings(tmp_path: Path) -> None:
    source = write_json(tmp_path / "rows.json", [record(f"Q{i}", tool=f"t{i}") for i in range(9)])
    out = tmp_path / "out"
    convert([source], out, candidates=3)
    assert refresh(None, out) is None
    assert refresh(source, out) is None
    write_json(source, [record(f"Q{i}", tool=f"t{i}") for i in range(12)])
    later = (out / "stats.json").stat().st_mtime + 10
    os.utime(source, (later, later))
    stats = refresh(None, out)
    assert stats and stats["read"] == 12
    assert all(len(names(row)) == 3 for row in load(out / "mcp_train_data.json"))


def test_other_data_is_converted_even_if_it_is_older(tmp_path: Path) -> None:
    old = write_json(tmp_path / "old.json", [record("old")])
    os.utime(old, (1, 1))
    convert([SAMPLE], tmp_path / "out")
    stats = refresh(old, tmp_path / "out")
    assert stats and stats["read"] == 1


def test_a_conversion_outlives_what_it_was_made_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU box that got the converted data alone, and has an older sample."""
    monkeypatch.chdir(tmp_path)
    source = write_json(Path("data/filtered/filtered_20250101_000000.json"), [record("mine")])
    convert([], Path("out"))
    convert([source], Path("named"))
    source.unlink()
    assert refresh(None, Path("out")) is None
    assert refresh(None, Path("named")) is None
    sample = write_json(Path("data/filtered/filtered_sample.json"), [record("sample")])
    os.utime(sample, (1, 1))
    assert refresh(None, Path("out")) is None
    newer = write_json(Path("data/filtered/filtered_20260101_000000.json"), [record("newer")])
    later = Path("out/stats.json").stat().st_mtime + 10
    os.utime(newer, (later, later))
    stats = refresh(None, Path("out"))
    assert stats and stats["files"] == [str(newer)]


def test_a_dataset_of_another_make_is_not_written_over(tmp_path: Path) -> None:
    write_json(tmp_path / "dataset_info.json", {})
    with pytest.raises(McpLoraError, match="did not make"):
        refresh(SAMPLE, tmp_path)


def test_questions_are_the_held_out_rows(sample_data: Path) -> None:
    questions = dataset.questions(sample_data)
    assert [text for text, _ in questions] == instructions(sample_data / "mcp_test_data.json")
    assert all(call.name for _, call in questions)


@pytest.mark.skipif(not SHARED.is_dir(), reason="the third-party data is not here")
def test_real_filtered_data_is_converted_whole(tmp_path: Path) -> None:
    stats = convert(sorted((SHARED / "filtered").glob("*.json")), tmp_path)
    assert (stats["read"], stats["rejected"], stats["tools"]) == (6, 0, 3)
