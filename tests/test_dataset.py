import json
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from conftest import SAMPLE, SHAPES, SHARED, record, write_json

from mcp_lora import dataset, questions, samples
from mcp_lora.dataset import Settings, convert, refresh
from mcp_lora.errors import McpLoraError

TRAIN_FILE = "mcp_train_data.json"


def load(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def converted(out: Path, *inputs: Path, **settings: Any) -> dict[str, Any]:
    """Convert files; the sum rule is checked, over all and for every file and shape."""
    stats = convert(Settings([str(file) for file in inputs], **settings), out)
    assert stats == load(out / "stats.json")
    for account in (stats, *stats["sources"]):
        assert account["read"] == sum(account["written"].values()) + sum(account["rejected"].values())
    for name, count in stats["written"].items():
        assert len(list(dataset.samples(out, name))) == count + stats["no_call_samples"].get(name, 0)
    rejected = (out / "rejected.jsonl").read_bytes().splitlines()
    assert len(rejected) == sum(stats["rejected"].values())
    return stats


def call_of(sample: dict[str, Any]) -> str:
    """The name of the tool that a sample calls."""
    return str(json.loads(sample["conversations"][1]["value"])["name"])


def names(sample: dict[str, Any]) -> list[str]:
    return [tool["name"] for tool in json.loads(sample["tools"])]


def instructions(out: Path, name: str) -> set[str]:
    described = load(out / "dataset_info.json")
    if name not in described:
        return set()
    return {sample["conversations"][0]["value"] for sample in dataset.samples(out, name)}


def many(servers: int = 30, tools: int = 5, rows: int = 4) -> list[dict[str, Any]]:
    """Records of many tools; a tool's name tells its server."""
    return [
        record(f"Question {s} {t} {r}", tool=f"tool{s}_{t}", server_info={"server_name": f"server{s}"})
        for s in range(servers)
        for t in range(tools)
        for r in range(rows)
    ]


def killed_at(step: str, after: bool, out: Path) -> int:
    """Convert the sample into a folder with SIGKILL at a step of mcp_lora.dataset; return the exit code."""
    script = f"""
import os, signal
from pathlib import Path
from mcp_lora import dataset
step = dataset.{step}
def killed(*words):
    if {after}: step(*words)
    os.kill(os.getpid(), signal.SIGKILL)
dataset.{step} = killed
dataset.convert(dataset.Settings([{str(SAMPLE)!r}], seed=2), Path({str(out)!r}))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    return done.returncode


@pytest.fixture
def sample_data(tmp_path: Path) -> Path:
    converted(tmp_path, SAMPLE)
    return tmp_path


def test_a_sample_is_what_the_engine_reads(tmp_path: Path) -> None:
    row = record("加 1", function_call={"name": "get-sum", "arguments": {"a": 1}})
    converted(tmp_path, write_json(tmp_path / "row.json", row))
    (sample,) = load(tmp_path / TRAIN_FILE)
    question, answer = sample["conversations"]
    assert question == {"from": "human", "value": "加 1"}
    assert answer["from"] == "function_call"
    assert json.loads(answer["value"]) == {"name": "get-sum", "arguments": {"a": 1}}
    assert sample["system"] == "You are a helpful assistant. Answer the user by calling the right tool."
    schema = {"type": "object", "properties": {"a": {"type": "number"}}}
    assert json.loads(sample["tools"]) == [
        {"name": "get-sum", "description": "Does get-sum", "parameters": schema}
    ]


def test_dataset_info_names_every_column_and_tag(sample_data: Path) -> None:
    info = load(sample_data / "dataset_info.json")
    assert sorted(info) == ["mcp_test_seen", "mcp_train"]
    assert info["mcp_train"]["file_name"] == TRAIN_FILE
    assert info["mcp_train"]["columns"] == {
        "messages": "conversations",
        "system": "system",
        "tools": "tools",
    }
    assert len(info["mcp_train"]["tags"]) == 7


def test_every_row_ends_in_exactly_one_place(tmp_path: Path) -> None:
    rows = [record(f"Question {i}", tool=f"tool{i % 7}") for i in range(50)]
    faulty = [record(function_call={}), "text", rows[3], record("half a pair: \ud83d")]
    source = tmp_path / "rows.json"
    source.write_text(json.dumps(rows + faulty))
    out = tmp_path / "out"
    stats = converted(out, source)
    assert stats["read"] == 54
    assert stats["rejected"] == {"no-call": 1, "unknown-shape": 1, "duplicate": 1, "not-json-value": 1}
    assert [(account["shape"], account["read"]) for account in stats["sources"]] == [
        ("filtered", 53),
        ("?", 1),
    ]
    found = instructions(out, "mcp_train") | instructions(out, "mcp_test_seen")
    assert found == {row["instruction"] for row in rows}
    lines = (out / "rejected.jsonl").read_text(encoding="utf-8").splitlines()
    rejected = [json.loads(line) for line in lines]
    assert [(line["file"], line["row"], line["record"]) for line in rejected] == [
        (str(source), 51 + i, row) for i, row in enumerate(faulty)
    ]
    assert all(line["sentence"] for line in rejected)


@pytest.mark.parametrize("turns", ["call", "all"])
def test_every_shape_is_converted(tmp_path: Path, turns: str) -> None:
    out = tmp_path / "out"
    stats = converted(out, SHAPES / "rows", tools=[str(SHAPES / "tools")], turns=turns, test=0)
    accounts = {source["shape"]: source for source in stats["sources"]}
    assert len(accounts) == 9
    assert all(account["written"] == {"mcp_train": 2} for account in accounts.values())
    tags = Counter(
        tuple(turn["from"] for turn in sample["conversations"]) for sample in load(out / TRAIN_FILE)
    )
    first = ("human", "function_call")
    answered = (*first, "observation", "gpt")
    assert tags == (
        {first: 16, ("human", "gpt"): 2} if turns == "call" else {first: 12, answered: 4, ("human", "gpt"): 2}
    )
    assert stats["cleaned"].get("trailing-result", 0) == (0 if turns == "call" else 3)


def test_an_argument_that_json_null_is_kept(tmp_path: Path) -> None:
    """And so is a number that is bigger than 64 bits."""
    schema = {"properties": {"a": {"type": ["integer", "null"]}, "b": {"type": "integer"}}}
    info = {"tool_name": "get-sum", "input_schema": schema}
    arguments = {"a": None, "b": 10**30}
    row = record(tool_info=info, function_call={"name": "get-sum", "arguments": arguments})
    converted(tmp_path, write_json(tmp_path / "row.json", row))
    (sample,) = load(tmp_path / TRAIN_FILE)
    assert json.loads(sample["conversations"][1]["value"])["arguments"] == arguments


def test_an_exact_duplicate_is_one_after_cleaning(tmp_path: Path) -> None:
    rows = [record("Add."), record(": Add. "), record("Add!"), record("Add.", tool="other")]
    stats = converted(tmp_path, write_json(tmp_path / "rows.json", rows), test=0)
    assert stats["rejected"] == {"duplicate": 1} and stats["written"] == {"mcp_train": 3}


def test_candidates_are_distinct_and_hold_the_right_tool(sample_data: Path) -> None:
    servers = {item["tool_info"]["tool_name"]: item["server_info"]["server_name"] for item in load(SAMPLE)}
    sizes = Counter(servers.values())
    places = Counter()
    for sample in load(sample_data / TRAIN_FILE):
        right, offered = call_of(sample), names(sample)
        assert len(offered) == len(set(offered)) == 10 and right in offered
        mates = sum(servers[name] == servers[right] for name in offered) - 1
        assert mates >= min(5, sizes[servers[right]] - 1)
        places[offered.index(right)] += 1
    assert sorted(places) == list(range(10))


def test_another_definition_of_a_tool_stays_with_its_row(tmp_path: Path) -> None:
    changed = record("Add again.")
    changed["tool_info"] = changed["tool_info"] | {"tool_description": "changed"}
    rows = [record("Add."), changed, record("Other.", tool="other")]
    converted(tmp_path, write_json(tmp_path / "rows.json", rows), test=0)
    found = {
        sample["conversations"][0]["value"]: {
            tool["name"]: tool["description"] for tool in json.loads(sample["tools"])
        }
        for sample in load(tmp_path / TRAIN_FILE)
    }
    assert [found[text]["get-sum"] for text in ("Add.", "Add again.", "Other.")] == [
        "Does get-sum",
        "changed",
        "Does get-sum",
    ]


def test_a_catalogue_gives_more_candidates(tmp_path: Path) -> None:
    source = write_json(tmp_path / "row.json", record())
    converted(tmp_path / "out", source, tools=[str(SHAPES / "tools")])
    (sample,) = load(tmp_path / "out" / TRAIN_FILE)
    assert sorted(names(sample)) == ["calculate", "convert-unit", "fetch", "get-sum", "get_time", "search"]


SPLIT = {"holdout_servers": 0.1, "holdout_tools": 0.1, "test": 0.1}


def test_what_is_held_out_appears_nowhere_in_training(tmp_path: Path) -> None:
    rows = many()
    stats = converted(tmp_path, write_json(tmp_path / "rows.json", rows), **SPLIT)
    assert list(stats["written"]) == [
        "mcp_train",
        "mcp_test_seen",
        "mcp_test_unseen_tool",
        "mcp_test_unseen_server",
    ]
    assert (tmp_path / "mcp_test_unseen_tool.json").is_file()
    assert (tmp_path / "mcp_test_unseen_server.json").is_file()
    trained = list(dataset.samples(tmp_path, "mcp_train"))
    offered = {name for sample in trained for name in names(sample)}
    seen = {call_of(sample) for sample in trained}
    tools = {
        name: {call_of(sample) for sample in dataset.samples(tmp_path, name)} for name in stats["written"]
    }
    assert tools["mcp_test_seen"] <= seen
    assert not offered & (tools["mcp_test_unseen_tool"] | tools["mcp_test_unseen_server"])
    servers = {name.split("_")[0] for name in tools["mcp_test_unseen_server"]}
    assert not servers & {name.split("_")[0] for name in offered}
    for name in ("mcp_test_seen", "mcp_test_unseen_tool"):
        for sample in dataset.samples(tmp_path, name):
            assert set(names(sample)) <= seen | {call_of(sample)}


def test_more_data_moves_nothing_from_a_test_into_training(tmp_path: Path) -> None:
    rows = many()
    write_json(tmp_path / "few.json", rows[: len(rows) // 2])
    write_json(tmp_path / "more.json", rows)
    converted(tmp_path / "one", tmp_path / "few.json", **SPLIT)
    converted(tmp_path / "two", tmp_path / "more.json", **SPLIT)
    for name in ("mcp_test_seen", "mcp_test_unseen_tool", "mcp_test_unseen_server"):
        before = instructions(tmp_path / "one", name)
        assert before and not before & instructions(tmp_path / "two", "mcp_train")


def test_a_tool_that_is_tested_as_seen_is_trained_on(tmp_path: Path) -> None:
    converted(tmp_path, write_json(tmp_path / "rows.json", many(rows=2)), test=0.9)
    trained = {call_of(sample) for sample in dataset.samples(tmp_path, "mcp_train")}
    assert {call_of(sample) for sample in dataset.samples(tmp_path, "mcp_test_seen")} <= trained
    assert len(trained) == 150


def test_too_little_data_for_a_split_is_said(tmp_path: Path) -> None:
    stats = converted(tmp_path, write_json(tmp_path / "rows.json", [record()]), **SPLIT)
    assert stats["written"] == {"mcp_train": 1}
    assert [note.split(", ")[0] for note in stats["notes"]] == [
        "too little data for mcp_test_seen",
        "too little data for mcp_test_unseen_tool",
        "too little data for mcp_test_unseen_server",
    ]


def test_nothing_left_to_train_on_is_an_error(tmp_path: Path) -> None:
    rows = [record(f"Q{i}", tool=f"t{i}") for i in range(2)]
    source = write_json(tmp_path / "rows.json", rows)
    with pytest.raises(McpLoraError, match="none is left to train on.*--holdout-tools"):
        for seed in range(100):
            converted(tmp_path / "out", source, holdout_tools=0.9, seed=seed)


def test_no_call_samples_lack_the_right_tool_and_say_so(tmp_path: Path) -> None:
    rows = [
        record(text, tool=f"tool{i % 9}")
        for i in range(40)
        for text in (f"Please add {i} and {i}, will you?", f"请把{i}和{i}加起来。")
    ]
    stats = converted(tmp_path, write_json(tmp_path / "rows.json", rows), no_call=0.5, test=0.3)
    extra = stats["no_call_samples"]
    assert 20 < sum(extra.values()) < 60 and sorted(extra) == ["mcp_test_no_call", "mcp_train"]
    right = {row["instruction"]: row["function_call"]["name"] for row in rows}
    none = 0
    for name in extra:
        for sample in dataset.samples(tmp_path, name):
            question, answer = (turn["value"] for turn in sample["conversations"])
            if sample["conversations"][1]["from"] == "gpt":
                none += 1
                assert right[question] not in names(sample) and names(sample)
                assert ("工具" in answer) == ("请" in question)
    assert none == sum(extra.values())


def test_a_row_of_its_own_without_a_call_is_tested_apart(tmp_path: Path) -> None:
    tool = {"type": "function", "function": {"name": "t", "parameters": {"type": "object"}}}
    rows = [
        {
            "messages": [{"role": "user", "content": f"Q{i}"}, {"role": "assistant", "content": "No."}],
            "tools": [tool],
        }
        for i in range(50)
    ]
    stats = converted(tmp_path, write_json(tmp_path / "rows.json", rows), test=0.3)
    assert list(stats["written"]) == ["mcp_train", "mcp_test_no_call"]
    assert not stats["no_call_samples"]


def test_a_test_asks_for_the_call_alone(tmp_path: Path) -> None:
    lines = (SHAPES / "rows/openai.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(lines[0]) for _ in range(40)]
    for i, row in enumerate(rows):
        row["messages"][1]["content"] += f" And {i}?"
    stats = converted(tmp_path, write_json(tmp_path / "rows.json", rows), turns="all", test=0.3)
    assert stats["written"]["mcp_test_seen"]
    assert {len(sample["conversations"]) for sample in dataset.samples(tmp_path, "mcp_train")} == {4}
    assert {len(sample["conversations"]) for sample in dataset.samples(tmp_path, "mcp_test_seen")} == {2}
    asked = questions.read(tmp_path, ["seen"])
    assert len(asked) == stats["written"]["mcp_test_seen"]
    assert [call.arguments["place"] for call in asked[0].expected] == ["Rome", "Quito"]


def test_same_input_and_seed_give_the_same_bytes(tmp_path: Path) -> None:
    for folder, seed in (("one", 7), ("two", 7), ("three", 8)):
        converted(tmp_path / folder, SAMPLE, seed=seed, no_call=0.1)
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert len(files) == 6 and TRAIN_FILE in files
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert (tmp_path / "one" / TRAIN_FILE).read_bytes() != (tmp_path / "three" / TRAIN_FILE).read_bytes()


def test_big_files_are_json_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    converted(tmp_path, SAMPLE)
    array = load(tmp_path / TRAIN_FILE)
    monkeypatch.setattr(samples, "LIMIT", 200_000)
    converted(tmp_path, SAMPLE)
    info = load(tmp_path / "dataset_info.json")
    assert info["mcp_train"]["file_name"] == "mcp_train_data.jsonl"
    assert info["mcp_test_seen"]["file_name"] == "mcp_test_seen.json"
    lines = (tmp_path / "mcp_train_data.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == array
    assert not (tmp_path / TRAIN_FILE).exists()


def test_nothing_usable_writes_nothing_over(sample_data: Path, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in sample_data.iterdir()}
    bad = write_json(tmp_path / "sub/bad.json", [record(function_call={})])
    with pytest.raises(McpLoraError, match=r"no usable row in .*1 × no-call.*mcp-lora convert OTHER_FILE"):
        converted(sample_data, bad)
    with pytest.raises(McpLoraError, match=r"not-in-catalogue.*mcp-lora convert --tools CATALOGUE"):
        converted(sample_data, SHAPES / "rows/function_call.json")
    assert {path: path.read_bytes() for path in sample_data.iterdir() if path.is_file()} == before
    assert not list(tmp_path.parent.glob(f".{tmp_path.name}.new*"))


def test_others_files_in_the_folder_stay(sample_data: Path) -> None:
    write_json(sample_data / "mine/notes.json", "mine")
    converted(sample_data, SAMPLE)
    assert load(sample_data / "mine/notes.json") == "mine"


@pytest.mark.parametrize("step", ["_exchange", "_is_ours"])
def test_others_files_outlive_a_conversion_that_is_killed(sample_data: Path, step: str) -> None:
    write_json(sample_data / "mine/notes.json", "mine")
    killed_at(step, True, sample_data)
    converted(sample_data, SAMPLE)
    assert load(sample_data / "mine/notes.json") == "mine"


@pytest.mark.parametrize("name", ["stats.json", "dataset_info.json"])
def test_a_damaged_description_is_an_error(sample_data: Path, name: str) -> None:
    (sample_data / name).write_text("{")
    with pytest.raises(McpLoraError, match=rf"{name} is damaged.*mcp-lora convert --out"):
        refreshed(None, sample_data) if name == "stats.json" else dataset.names(sample_data)


def test_a_damaged_or_foreign_dataset_is_an_error(sample_data: Path) -> None:
    file = sample_data / TRAIN_FILE
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(McpLoraError, match=r"mcp_train_data\.json .*mcp-lora convert --out"):
        list(dataset.samples(sample_data, "mcp_train"))
    write_json(file, [{"instruction": "of another make"}])
    with pytest.raises(McpLoraError, match=r"mcp_train_data\.json .*mcp-lora convert --out"):
        list(dataset.samples(sample_data, "mcp_train"))


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file is in the way")
    for out in (tmp_path / "out", tmp_path / "out/below"):
        with pytest.raises(McpLoraError, match="mcp-lora convert --out"):
            converted(out, SAMPLE)
    assert (tmp_path / "out").read_text() == "a file is in the way"


def test_files_are_replaced_one_by_one_where_folders_cannot_change_places(
    sample_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dataset, "_exchange", lambda one, two: False)
    monkeypatch.setattr(samples, "LIMIT", 200_000)
    converted(sample_data, SAMPLE, test=0)
    assert sorted(path.name for path in sample_data.iterdir()) == [
        "dataset_info.json",
        "mcp_train_data.jsonl",
        "rejected.jsonl",
        "stats.json",
    ]


@pytest.mark.skipif(sys.platform != "linux", reason="folders change places in one step on Linux alone")
@pytest.mark.parametrize("call", ["_dump", "_put", "_exchange", "_is_ours"])
@pytest.mark.parametrize("after", [False, True])
def test_a_conversion_that_is_killed_leaves_the_old_one_or_the_new(
    tmp_path: Path, call: str, after: bool
) -> None:
    """SIGKILL before or after each step from the moment that the new folder is complete."""
    old, new = tmp_path / "old", tmp_path / "new"
    converted(old, SAMPLE, seed=1)
    converted(new, SAMPLE, seed=2)
    wholes = [{file.name: file.read_bytes() for file in folder.iterdir()} for folder in (old, new)]
    assert killed_at(call, after, old) == -signal.SIGKILL
    assert {file.name: file.read_bytes() for file in old.iterdir()} in wholes
    converted(old, SAMPLE, seed=2)  # and the next one is not disturbed
    assert {file.name: file.read_bytes() for file in old.iterdir()} == wholes[1]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def refreshed(data: Path | None, out: Path) -> dict[str, Any] | None:
    """Refresh without a tokenizer, as it was converted."""
    return refresh(data, out, None)  # type: ignore[arg-type]  # None is what the conversion had


def test_fresh_data_is_left_and_newer_data_is_converted_with_the_same_settings(tmp_path: Path) -> None:
    source = write_json(tmp_path / "rows.json", [record(f"Q{i}", tool=f"t{i}") for i in range(9)])
    out = tmp_path / "out"
    converted(out, source, candidates=3)
    assert refreshed(None, out) is None
    assert refreshed(source, out) is None
    write_json(source, [record(f"Q{i}", tool=f"t{i}") for i in range(12)])
    later = (out / "stats.json").stat().st_mtime + 10
    os.utime(source, (later, later))
    stats = refreshed(None, out)
    assert stats and stats["read"] == 12
    assert all(len(names(sample)) == 3 for sample in load(out / TRAIN_FILE))


def test_a_conversion_of_an_earlier_version_is_made_anew(tmp_path: Path, tiny_model: Path) -> None:
    source = write_json(tmp_path / "row.json", record())
    converted(tmp_path / "out", source)
    stats = load(tmp_path / "out/stats.json")
    kept = {"inputs": [str(source)], "candidates": 3, "test": 0.1, "seed": 42}
    write_json(tmp_path / "out/stats.json", {"settings": kept, "files": stats["files"]})
    budget = {"model_name_or_path": str(tiny_model), "template": "qwen", "cutoff_len": 4096}
    again = refresh(None, tmp_path / "out", budget)
    assert again and again["settings"]["candidates"] == 3


def test_a_newer_catalogue_is_newer_data(tmp_path: Path) -> None:
    source = write_json(tmp_path / "row.json", record())
    tools = write_json(tmp_path / "tools/s.json", [{"name": "more", "parameters": {}}])
    converted(tmp_path / "out", source, tools=[str(tools.parent)])
    assert refreshed(None, tmp_path / "out") is None
    later = (tmp_path / "out/stats.json").stat().st_mtime + 10
    os.utime(tools, (later, later))
    assert refreshed(None, tmp_path / "out")


def test_other_data_is_converted_even_if_it_is_older(tmp_path: Path) -> None:
    old = write_json(tmp_path / "old.json", [record("old")])
    os.utime(old, (1, 1))
    converted(tmp_path / "out", SAMPLE)
    stats = refreshed(old, tmp_path / "out")
    assert stats and stats["read"] == 1


def test_a_conversion_outlives_what_it_was_made_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU box that got the converted data alone, and has an older sample."""
    monkeypatch.chdir(tmp_path)
    source = write_json(Path("data/filtered/filtered_20250101_000000.json"), [record("mine")])
    converted(Path("out"))
    converted(Path("named"), source)
    source.unlink()
    assert refreshed(None, Path("out")) is None
    assert refreshed(None, Path("named")) is None
    sample = write_json(Path("data/filtered/filtered_sample.json"), [record("sample")])
    os.utime(sample, (1, 1))
    assert refreshed(None, Path("out")) is None
    newer = write_json(Path("data/filtered/filtered_20260101_000000.json"), [record("newer")])
    later = Path("out/stats.json").stat().st_mtime + 10
    os.utime(newer, (later, later))
    stats = refreshed(None, Path("out"))
    assert stats and stats["files"] == [str(newer)]


def test_a_dataset_of_another_make_is_not_written_over(tmp_path: Path) -> None:
    write_json(tmp_path / "dataset_info.json", {})
    for attempt in (lambda: refreshed(SAMPLE, tmp_path), lambda: converted(tmp_path, SAMPLE)):
        with pytest.raises(McpLoraError, match="did not make"):
            attempt()


def test_questions_are_the_held_out_rows(sample_data: Path) -> None:
    asked = questions.read(sample_data, [])
    assert {question.instruction for question in asked} == instructions(sample_data, "mcp_test_seen")
    assert all(question.server for question in asked)
    assert all("server" not in sample for sample in dataset.samples(sample_data, "mcp_train"))


@pytest.mark.skipif(not SHARED.is_dir(), reason="the third-party data is not here")
def test_real_data_of_every_kind(tmp_path: Path) -> None:
    stats = converted(tmp_path, SHARED, tools=[str(SHARED / "tools"), str(SHARED / "mcp_tools")])
    by_shape: dict[str, list[int]] = {}
    for source in stats["sources"]:
        counts = by_shape.setdefault(source["shape"], [0, 0])
        counts[0] += source["read"]
        counts[1] += sum(source["written"].values())
    assert by_shape["filtered"] == [6, 6]
    assert by_shape["function_call"] == [1724, 1705]
    assert by_shape["trajectory"] == [100, 95]
    assert stats["rejected"] == {"unknown-shape": 4850, "no-call": 10, "duplicate": 2, "schema": 12}
