import json
import os
import shlex
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
import pytest
from conftest import SAMPLE, SHAPES, SHARED, record, write_json

from mcp_lora.data import conversion, dataset, files, formats, records, rows
from mcp_lora.data.conversion import Settings, convert, refresh
from mcp_lora.errors import McpLoraError
from mcp_lora.evaluate import questions

TRAIN_FILE = "mcp_train_data.json"


def load(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def converted(out: Path, *inputs: Path, **settings: Any) -> records.Statistics:
    """Convert files; the sum rule is checked, over all and for every file and shape."""
    stats = convert(Settings([str(file) for file in inputs], **settings), out)
    assert msgspec.to_builtins(stats) == load(out / "stats.json") and dataset.statistics(out) == stats
    for account in (stats, *stats.sources):
        assert account.read == sum(account.written.values()) + sum(account.rejected.values())
    for name, count in stats.written.items():
        assert len(list(dataset.samples(out, name))) == count + stats.no_call_samples.get(name, 0)
    rejected = (out / "rejected.jsonl").read_bytes().splitlines()
    assert len(rejected) == sum(stats.rejected.values())
    return stats


def call_of(sample: dict[str, Any]) -> str:
    """The name of the first tool that a sample calls."""
    calls = [call for message in sample["messages"] for call in message.get("tool_calls", [])]
    return str(calls[0]["function"]["name"])


def names(sample: dict[str, Any]) -> list[str]:
    return [tool["function"]["name"] for tool in sample["tools"]]


def question(sample: dict[str, Any]) -> str:
    return str(sample["messages"][1]["content"])


def instructions(out: Path, name: str) -> set[str]:
    return set(map(question, dataset.samples(out, name))) if name in dataset.names(out) else set()


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}


def many(servers: int = 30, tools: int = 5, rows: int = 4) -> list[dict[str, Any]]:
    """Records of many tools; a tool's name tells its server."""
    return [
        record(f"Question {s} {t} {r}", tool=f"tool{s}_{t}", server_info={"server_name": f"server{s}"})
        for s in range(servers)
        for t in range(tools)
        for r in range(rows)
    ]


def killed_at(step: str, number: int, out: Path) -> None:
    """Convert the sample into a folder, with SIGKILL after the nth call of one of its steps."""
    script = f"""
import os, signal
from pathlib import Path
from mcp_lora.data import conversion, dataset
step, calls = dataset.{step}, []
def killed(*words, **more):
    done = step(*words, **more)
    calls.append(words)
    if len(calls) == {number}:
        os.kill(os.getpid(), signal.SIGKILL)
    return done
dataset.{step} = killed
conversion.convert(conversion.Settings([{str(SAMPLE)!r}], seed=2), Path({str(out)!r}))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr


@pytest.fixture
def sample_data(tmp_path: Path) -> Path:
    converted(tmp_path, SAMPLE)
    return tmp_path


SYSTEM = "You are a helpful assistant. Answer the user by calling the right tool."
SUM = {
    "name": "get-sum",
    "description": "Does get-sum",
    "parameters": {"type": "object", "properties": {"a": {"type": "number"}}},
}


def test_a_sample_in_both_forms(tmp_path: Path) -> None:
    """A number of more than 64 bits is kept."""
    arguments = {"a": 10**30}
    row = record("加 1", function_call={"name": "get-sum", "arguments": arguments})
    row["tool_info"]["input_schema"]["$schema"] = "http://json-schema.org/draft-07/schema#"
    converted(tmp_path, write_json(tmp_path / "row.json", row))
    function = {"name": "get-sum", "arguments": f'{{"a":{10**30}}}'}
    call = {"id": "call_1", "type": "function", "function": function}
    messages = [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": "加 1"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
    ]
    expected = {"messages": messages, "tools": [{"type": "function", "function": SUM}]}
    assert json.loads((tmp_path / "train.jsonl").read_text(encoding="utf-8")) == expected
    (sample,) = load(tmp_path / TRAIN_FILE)
    asked, answered = sample["conversations"]
    assert asked == {"from": "human", "value": "加 1"} and answered["from"] == "function_call"
    assert json.loads(answered["value"]) == {"name": "get-sum", "arguments": arguments}
    assert sample["system"] == SYSTEM and json.loads(sample["tools"]) == [SUM]


def test_nothing_of_a_conversation_is_lost_and_llama_factory_gets_what_its_form_holds(tmp_path: Path) -> None:
    def call(name: str, value: int) -> dict[str, Any]:
        function = {"name": "get-sum", "arguments": f'{{"a":{value}}}'}
        return {"id": name, "type": "function", "function": function}

    messages = [
        {"role": "system", "content": "You add."},
        {"role": "user", "content": "Add."},
        {
            "role": "assistant",
            "content": "Both at once.",
            "reasoning_content": "Two sums.",
            "tool_calls": [call("x", 1), call("y", 2)],
        },
        {"role": "tool", "tool_call_id": "x", "content": "one"},
        {"role": "tool", "tool_call_id": "y", "content": "two"},
        {"role": "assistant", "content": "Done.", "reasoning_content": "That was it."},
    ]
    tools = [{"type": "function", "function": SUM}]
    row = {"messages": messages, "tools": tools}
    again = json.loads(json.dumps(row).replace('"x"', '"other id"'))
    stats = converted(tmp_path, write_json(tmp_path / "rows.json", [row, again]), turns="all", test=0)
    assert stats.rejected == {"duplicate": 1}
    assert list(dataset.samples(tmp_path, "train")) == [row]
    (sample,) = load(tmp_path / TRAIN_FILE)
    assert sample["system"] == "You add."
    values = {turn["from"]: turn["value"] for turn in sample["conversations"]}
    calls = [{"name": "get-sum", "arguments": {"a": value}} for value in (1, 2)]
    assert json.loads(values.pop("function_call")) == calls
    assert values == {
        "human": "Add.",
        "observation": "one\n</tool_response>\n<tool_response>\ntwo",
        "gpt": "Done.",
    }
    assert len(sample["conversations"]) == 4


def test_every_row_ends_in_exactly_one_place(tmp_path: Path) -> None:
    rows = [record(f"Question {i}", tool=f"tool{i % 7}") for i in range(50)]
    again = rows[3] | {"instruction": ": Question 3 "}  # the same once it is cleaned
    faulty = [record(function_call={}), "text", again, record("half a pair: \ud83d")]
    source = tmp_path / "rows.json"
    source.write_text(json.dumps(rows + faulty))
    out = tmp_path / "out"
    stats = converted(out, source)
    assert stats.rejected == {"no-call": 1, "unknown-format": 1, "duplicate": 1, "not-json-value": 1}
    assert [(account.format, account.read) for account in stats.sources] == [
        ("filtered", 53),
        ("?", 1),
    ]
    found = instructions(out, "train") | instructions(out, "seen")
    assert found == {row["instruction"] for row in rows}
    lines = (out / "rejected.jsonl").read_text(encoding="utf-8").splitlines()
    rejected = [json.loads(line) for line in lines]
    assert [(line["file"], line["row"], line["record"]) for line in rejected] == [
        (str(source), 51 + i, row) for i, row in enumerate(faulty)
    ]
    assert all(line["message"] for line in rejected)


@pytest.mark.parametrize("turns", ["call", "all"])
def test_every_shape_is_converted(tmp_path: Path, turns: str) -> None:
    out = tmp_path / "out"
    stats = converted(out, SHAPES / "rows", tools=[str(SHAPES / "tools")], turns=turns, test=0)
    accounts = {source.format: source for source in stats.sources}
    assert len(accounts) == 8
    assert all(account.written == {"train": 2} for account in accounts.values())
    roles = Counter(
        tuple(message["role"] for message in sample["messages"][1:])
        for sample in dataset.samples(out, "train")
    )
    pair, parallel = ("user", "assistant"), ("user", "assistant", "tool", "tool", "assistant")
    answered = ("user", "assistant", "tool", "assistant")
    assert roles == ({pair: 18} if turns == "call" else {pair: 14, answered: 2, parallel: 2})
    for sample in dataset.samples(out, "train"):
        messages = sample["messages"]
        called = [call["id"] for message in messages for call in message.get("tool_calls", [])]
        answered = [message["tool_call_id"] for message in messages if message["role"] == "tool"]
        assert answered in ([], called)
    assert stats.cleaned.get("trailing-result", 0) == (0 if turns == "call" else 3)


def test_candidates_are_distinct_and_hold_the_gold_tool(sample_data: Path) -> None:
    for sample in dataset.samples(sample_data, "train"):
        assert len(names(sample)) == len(set(names(sample))) == 10 and call_of(sample) in names(sample)


def test_another_definition_of_a_tool_stays_with_its_row(tmp_path: Path) -> None:
    changed = record("Add again.")
    changed["tool_info"] = changed["tool_info"] | {"tool_description": "changed"}
    rows = [record("Add."), changed, record("Other.", tool="other")]
    converted(tmp_path, write_json(tmp_path / "rows.json", rows), test=0)
    found = {
        question(sample): tool["function"]["description"]
        for sample in dataset.samples(tmp_path, "train")
        for tool in sample["tools"]
        if tool["function"]["name"] == "get-sum"
    }
    assert found == {"Add.": "Does get-sum", "Add again.": "changed", "Other.": "Does get-sum"}


def test_a_catalogue_gives_more_candidates(tmp_path: Path) -> None:
    source = write_json(tmp_path / "row.json", record())
    converted(tmp_path / "out", source, tools=[str(SHAPES / "tools")])
    (sample,) = dataset.samples(tmp_path / "out", "train")
    assert sorted(names(sample)) == ["calculate", "convert-unit", "fetch", "get-sum", "get_time", "search"]


SPLIT = {"holdout_servers": 0.1, "holdout_tools": 0.1, "test": 0.1}


def test_what_is_held_out_appears_nowhere_in_training_of_this_or_more_data(tmp_path: Path) -> None:
    rows, few, more = many(), tmp_path / "few", tmp_path / "more"
    stats = converted(few, write_json(tmp_path / "few.json", rows[: len(rows) // 2]), **SPLIT)
    converted(more, write_json(tmp_path / "more.json", rows), **SPLIT)
    assert list(stats.written) == ["train", "seen", "unseen_tool", "unseen_server"]
    for name in ("seen", "unseen_tool", "unseen_server"):
        assert (few / f"mcp_test_{name}.json").is_file()
        assert not instructions(few, name) & instructions(more, "train")
    trained = list(dataset.samples(more, "train"))
    offered = {name for sample in trained for name in names(sample)}
    seen = {call_of(sample) for sample in trained}
    tools = {name: {call_of(sample) for sample in dataset.samples(more, name)} for name in stats.written}
    assert tools["seen"] <= seen
    assert not offered & (tools["unseen_tool"] | tools["unseen_server"])
    servers = {name.split("_")[0] for name in tools["unseen_server"]}
    assert not servers & {name.split("_")[0] for name in offered}
    for name in ("seen", "unseen_tool"):
        for sample in dataset.samples(more, name):
            assert set(names(sample)) <= seen | {call_of(sample)}


def test_a_tool_that_is_tested_as_seen_is_trained_on(tmp_path: Path) -> None:
    converted(tmp_path, write_json(tmp_path / "rows.json", many(rows=2)), test=0.9)
    trained = {call_of(sample) for sample in dataset.samples(tmp_path, "train")}
    assert {call_of(sample) for sample in dataset.samples(tmp_path, "seen")} <= trained
    assert len(trained) == 150


def test_too_little_data_for_a_split_is_said(tmp_path: Path) -> None:
    stats = converted(tmp_path, write_json(tmp_path / "rows.json", [record()]), **SPLIT)
    assert stats.written == {"train": 1}
    assert [note.split(", ")[0] for note in stats.notes] == [
        "too little data for split seen",
        "too little data for split unseen_tool",
        "too little data for split unseen_server",
    ]


def test_nothing_left_to_train_on_is_an_error(tmp_path: Path) -> None:
    rows = [record(f"Q{i}", tool=f"t{i}") for i in range(2)]
    source = write_json(tmp_path / "rows.json", rows)
    with pytest.raises(McpLoraError, match="none of .* is left to train on.*--holdout-tools"):
        for seed in range(100):
            converted(tmp_path / "out", source, holdout_tools=0.9, seed=seed)


def test_no_call_samples_lack_the_gold_tool_and_say_so(tmp_path: Path) -> None:
    rows = [
        record(text, tool=f"tool{i % 9}")
        for i in range(40)
        for text in (f"Please add {i} and {i}, will you?", f"请把{i}和{i}加起来。")
    ]
    stats = converted(tmp_path, write_json(tmp_path / "rows.json", rows), no_call=0.5, test=0.3)
    extra = stats.no_call_samples
    assert 20 < sum(extra.values()) < 60 and sorted(extra) == ["no_call", "train"]
    right = {row["instruction"]: row["function_call"]["name"] for row in rows}
    none = 0
    for name in extra:
        for sample in dataset.samples(tmp_path, name):
            answer = sample["messages"][2]
            if "tool_calls" not in answer:
                none += 1
                assert right[question(sample)] not in names(sample) and names(sample)
                assert ("工具" in answer["content"]) == ("请" in question(sample))
    assert none == sum(extra.values())


def test_a_refusal_is_in_the_questions_language_where_its_script_tells() -> None:
    said = {"把3和4加": "工具", "足して": "ツール", "3과 4": "도구", "Сложи": "инструмент", "Añade": "tools"}
    for asked, word in said.items():
        assert word in formats.refusal(asked)


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
    assert list(stats.written) == ["train", "no_call"]
    assert not stats.no_call_samples


def test_a_test_asks_for_the_call_alone(tmp_path: Path) -> None:
    lines = (SHAPES / "rows/openai.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(lines[0]) for _ in range(40)]
    for i, row in enumerate(rows):
        row["messages"][1]["content"] += f" And {i}?"
    stats = converted(tmp_path, write_json(tmp_path / "rows.json", rows), turns="all", test=0.3)
    assert stats.written["seen"]
    assert {len(sample["messages"]) for sample in dataset.samples(tmp_path, "train")} == {6}
    assert {len(sample["messages"]) for sample in dataset.samples(tmp_path, "seen")} == {3}
    asked = questions.read(tmp_path, [])
    assert {question.instruction for question in asked} == instructions(tmp_path, "seen")
    assert [call.arguments["place"] for call in asked[0].expected] == ["Rome", "Quito"]


def test_same_input_and_seed_give_the_same_bytes(tmp_path: Path) -> None:
    for folder, seed in (("one", 7), ("two", 7), ("three", 8)):
        converted(tmp_path / folder, SAMPLE, seed=seed, no_call=0.1)
    one, two, three = (contents(tmp_path / folder) for folder in ("one", "two", "three"))
    assert one == two and len(one) == 9 and {"train.jsonl", TRAIN_FILE} <= set(one)
    assert one["train.jsonl"] != three["train.jsonl"]


def test_the_engine_is_told_where_the_data_is(sample_data: Path) -> None:
    info = load(sample_data / "dataset_info.json")
    assert {name: entry["file_name"] for name, entry in info.items()} == {
        "mcp_train": TRAIN_FILE,
        "mcp_test_seen": "mcp_test_seen.json",
    }
    columns = {"messages": "conversations", "system": "system", "tools": "tools"}
    assert info["mcp_train"]["columns"] == columns and info["mcp_train"]["formatting"] == "sharegpt"


def said(question: str, *called: str, system: str = "", **more: Any) -> dict[str, Any]:
    """A record in OpenAI's form that calls tools one after another."""
    messages: list[dict[str, Any]] = [{"role": "system", "content": system}] * bool(system)
    messages.append({"role": "user", "content": question})
    for name in called:
        function = {"name": name, "arguments": "{}"}
        messages.append({"role": "assistant", "tool_calls": [{"id": name, "function": function}]})
        messages.append({"role": "tool", "tool_call_id": name, "content": "done"})
    tools = [{"name": name, "parameters": {}} for name in ("open", "close", "wait")]
    return {"messages": [*messages, {"role": "assistant", "content": "Done."}], "tools": tools} | more


def test_the_same_question_is_never_trained_on_and_tested(tmp_path: Path) -> None:
    """Near copies of it are, in case, spaces and punctuation, whatever tool they are asked for."""
    rows = [
        said(text, tool)
        for number in range(200)
        for text, tool in (
            (f"Do it, number {number}!", "open"),
            (f"do it number {number}", "close"),
            (f"Do it  number {number}?", "wait"),
        )
    ]
    rows += [
        said(f"{tool} {1000 + number}", tool) for number in range(100) for tool in ("open", "close", "wait")
    ]
    for more in ({"test": 0.3}, {"test": 0.3, "holdout_tools": 0.4}):
        stats = converted(tmp_path, write_json(tmp_path / "rows.json", rows), candidates=2, **more)
        asked = {
            split: {
                "".join(filter(str.isalnum, question.casefold()))
                for question in instructions(tmp_path, split)
            }
            for split in stats.written
        }
        assert len(asked) >= 2 and len(asked["train"]) > 50
        assert not any(asked["train"] & asked[split] for split in asked if split != "train")


def test_a_duplicate_is_equal_in_all_that_is_trained_on_and_shown(tmp_path: Path) -> None:
    row = said("Go.", "open")
    rows = [
        row,
        row,
        said("Go.", "open", system="Be brief."),
        row | {"tools": row["tools"][:1]},
        said("Go.", "wait"),
    ]
    stats = converted(tmp_path, write_json(tmp_path / "rows.json", rows), test=0)
    assert stats.rejected == {"duplicate": 1} and stats.written == {"train": 4}


def test_a_sample_for_each_call_or_the_first_alone(tmp_path: Path) -> None:
    source = write_json(tmp_path / "rows.json", [said("Go.", "open", "wait", "close")])
    stats = convert(Settings([str(source)], test=0), tmp_path)
    assert (stats.cleaned, stats.samples) == ({"later-call": 2}, {"train": 1})
    stats = convert(Settings([str(source)], test=0, turns="each"), tmp_path)
    assert (stats.cleaned, stats.written, stats.samples) == ({}, {"train": 1}, {"train": 3})
    assert load(tmp_path / "stats.json")["samples"]["train"] == 3
    for number, sample in enumerate(dataset.samples(tmp_path, "train")):
        answers = [message for message in sample["messages"] if message["role"] == "assistant"]
        assert [answer.get("weight") for answer in answers] == [0] * number + [None]
        assert answers[-1]["tool_calls"][0]["function"]["name"] == ("open", "wait", "close")[number]


def test_a_row_is_explained_in_each_step(tmp_path: Path) -> None:
    row = said("Go.", "open")
    source = write_json(tmp_path / "rows.json", [said("Stop."), row, said("Go.", "shut")])
    settings = Settings([str(source)])
    steps = dict(conversion.explain(settings, 2))
    assert (
        list(steps) == ["as read (openai)", "as understood", "as written"]
        and steps["as read (openai)"] == row
    )
    assert [turn["role"] for turn in steps["as understood"]] == ["user", "call", "result", "answer"]
    assert call_of(steps["as written"][0]) == "open"
    assert "shut is called, but not among the tools" in dict(conversion.explain(settings, 3))["rejected"]
    with pytest.raises(McpLoraError, match="fewer than 4 rows"):
        list(conversion.explain(settings, 4))
    (tmp_path / "null.jsonl").write_text("null\n")
    steps = dict(conversion.explain(Settings([str(tmp_path / "null.jsonl")]), 1))
    assert steps["as read (?)"] is None and "not NoneType" in steps["rejected"]
    broken = tmp_path / "rows.jsonl"
    broken.write_text("{broken\n")
    steps = dict(conversion.explain(Settings([str(broken)]), 1))
    assert steps["as read (?)"] == "{broken" and "not JSON" in steps["rejected"]


def test_an_input_is_not_written_over(sample_data: Path) -> None:
    before = contents(sample_data)
    with pytest.raises(McpLoraError, match="would be overwritten: mcp-lora convert --output OTHER_FOLDER"):
        converted(sample_data, sample_data / "train.jsonl")
    assert contents(sample_data) == before


def test_a_row_of_which_the_calls_are_context_is_tested_as_one_without_a_call(tmp_path: Path) -> None:
    rows = [said(f"Go {number}.", "open") for number in range(60)]
    for row in rows[:30]:
        row["messages"][1]["weight"] = 0
    converted(tmp_path, write_json(tmp_path / "rows.json", rows), test=0.5, turns="all")
    tests = {split: list(dataset.samples(tmp_path, split)) for split in ("seen", "no_call")}
    assert all("tool_calls" in one["messages"][-1] for one in tests["seen"])
    assert tests["no_call"] and all(one["messages"][-1]["content"] == "Done." for one in tests["no_call"])


def test_parameters_that_no_schema_defines_are_counted(tmp_path: Path) -> None:
    row = said("Go.", "open")
    row["messages"][1]["tool_calls"][0]["function"]["arguments"] = '{"far": true}'
    source = write_json(tmp_path / "rows.json", [row, said("Go.", "wait")])
    assert converted(tmp_path, source, test=0).cleaned == {"unknown-parameter": 1}
    assert converted(tmp_path, source, test=0, strict_schema=True).rejected == {"schema": 1}


def test_a_tool_with_an_invalid_schema_is_named(tmp_path: Path) -> None:
    row = said("Go.", "open")
    row["tools"][0]["parameters"] = {"properties": {"far": {"pattern": "("}}}
    stats = converted(tmp_path, write_json(tmp_path / "rows.json", [row]), test=0)
    (note,) = stats.notes
    assert note.startswith("the schema of open is invalid, its calls are not validated: ")
    assert any(note in line for line in dataset.summary(stats, tmp_path))


def test_nothing_usable_writes_nothing_over(sample_data: Path, tmp_path: Path) -> None:
    before = contents(sample_data)
    bad = write_json(tmp_path / "sub/bad.json", [record(function_call={})])
    with pytest.raises(McpLoraError, match=r"no usable row .*1 × no-call; .* row 1 of .*convert OTHER_FILE"):
        converted(sample_data, bad)
    with pytest.raises(McpLoraError, match=r"not-in-catalogue.*mcp-lora convert --tools CATALOGUE"):
        converted(sample_data, SHAPES / "rows/function_call.json")
    assert contents(sample_data) == before
    assert not (sample_data / ".new").exists()
    beside = sample_data.with_name(f"{sample_data.name}.rejected.jsonl")
    rejected = list(map(json.loads, beside.read_text(encoding="utf-8").splitlines()))
    assert {line["reason"] for line in rejected} == {"not-in-catalogue"}


def test_nothing_usable_into_this_folder_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = write_json(tmp_path / "bad.json", [record(function_call={})])
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(McpLoraError, match=r"no usable row .*here\.rejected\.jsonl"):
        converted(Path("."), bad)
    assert (tmp_path / "here.rejected.jsonl").is_file() and not list(Path(".").iterdir())


def test_a_record_too_deep_to_be_redacted_is_rejected_and_not_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def redact(record: Any) -> Any:  # at what depth it fails depends on the version of Python
        if "hunter2abc1" in str(record):
            raise RecursionError
        return record, Counter()

    monkeypatch.setattr(rows, "redact", redact)
    (tmp_path / "rows.jsonl").write_text(f'[[["hunter2abc1"]]]\n{json.dumps(said("Go.", "open"))}\n')
    stats = converted(tmp_path / "out", tmp_path / "rows.jsonl", test=0, redact=True)
    assert stats.written == {"train": 1} and stats.rejected == {"not-json-value": 1}
    assert "hunter2abc1" not in (tmp_path / "out/rejected.jsonl").read_text()


def test_a_damaged_description_is_an_error(sample_data: Path) -> None:
    (sample_data / "stats.json").write_text("{")
    with pytest.raises(McpLoraError, match=r"stats\.json is damaged.*mcp-lora convert --output"):
        refresh([], sample_data)


@pytest.mark.parametrize("end", ['{"messages": [', '{"instruction": "of another make"}'])
def test_a_damaged_or_foreign_row_is_an_error(sample_data: Path, end: str) -> None:
    with (sample_data / "train.jsonl").open("a", encoding="utf-8") as file:
        file.write(end)
    with pytest.raises(McpLoraError, match=r"train\.jsonl cannot be used.*mcp-lora convert --output"):
        list(dataset.samples(sample_data, "train"))
    with pytest.raises(McpLoraError, match="contains train, seen, not no_call: mcp-lora convert"):
        list(dataset.samples(sample_data, "no_call"))


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file is in the way")
    for out in (tmp_path / "out", tmp_path / "out/below"):
        with pytest.raises(McpLoraError, match="mcp-lora convert --output"), dataset.locked(out):
            converted(out, SAMPLE)
    assert (tmp_path / "out").read_text() == "a file is in the way"


def test_a_folder_keeps_what_others_put_there_and_nothing_of_the_old_conversion(sample_data: Path) -> None:
    write_json(sample_data / "rendered/old.json", "old")
    write_json(sample_data / "mine/notes.json", "mine")
    converted(sample_data, SAMPLE, test=0)
    expected = {"dataset_info.json", TRAIN_FILE, "rejected.jsonl", "stats.json", "train.jsonl", "mine"}
    assert {path.name for path in sample_data.iterdir()} == expected
    assert load(sample_data / "mine/notes.json") == "mine"


@pytest.mark.parametrize(("step", "number"), [("dump", 2), ("Path.replace", 1), ("Path.replace", 4)])
def test_a_conversion_that_is_killed_leaves_the_old_one_or_is_made_again(
    tmp_path: Path, step: str, number: int
) -> None:
    """Before its files are put in place, or between two of them: what is next, a refresh, finds it."""
    old, new = tmp_path / "old", tmp_path / "new"
    converted(old, SAMPLE, seed=1)
    converted(new, SAMPLE, seed=2)
    write_json(old / "mine/notes.json", "mine")
    before, after = contents(old), contents(new)
    killed_at(step, number, old)
    unharmed = contents(old) == before
    assert unharmed == (dataset.statistics(old) is not None) == (step == "dump")
    assert conversion.is_up_to_date(old) == unharmed
    # no rows of the old one stand beside new ones
    left = {file: content for file, content in contents(old).items() if file != "stats.json"}
    assert left.items() <= before.items() or left.items() <= after.items()
    assert (refresh([], old)[1] is None) == unharmed
    assert contents(old) == (before if unharmed else after)
    converted(old, SAMPLE, seed=2)  # and the next one is not disturbed
    assert contents(old) == after and load(old / "mine/notes.json") == "mine"
    assert not (old / ".new").exists()


def test_changed_contents_are_converted_with_the_last_settings(tmp_path: Path) -> None:
    source = write_json(tmp_path / "rows.json", [record(f"Q{i}", tool=f"t{i}") for i in range(9)])
    tools = write_json(tmp_path / "tools/s.json", [{"name": "more", "parameters": {}}])
    out = tmp_path / "out"
    stats = converted(out, source, candidates=3, tools=[str(tools)])
    assert set(stats.inputs) == {str(source), str(tools)}
    os.utime(source, (2e9, 2e9))
    for data in ([], [source]):
        assert conversion.is_up_to_date(out) and "up to date" in refresh(data, out)[0]
    write_json(source, [record(f"Q{i}", tool=f"t{i}") for i in range(12)])
    os.utime(source, (1, 1))
    assert not conversion.is_up_to_date(out)
    done, statistics = refresh([], out)
    assert statistics and statistics.read == 12 and "--candidates 3" in done
    assert all(len(names(sample)) == 3 for sample in dataset.samples(out, "train"))
    write_json(tools, [{"name": "other", "parameters": {}}])
    assert refresh([], out)[1]
    dataset.file_of(out, "train").unlink()  # what is not there cannot be used
    assert refresh([], out)[1]
    _, statistics = refresh([SAMPLE], out)
    assert statistics and statistics.read > 200
    with pytest.raises(McpLoraError, match=r"no data in nowhere\.json"):
        refresh([Path("nowhere.json")], out)


def test_a_conversion_that_was_not_finished_is_made_anew_with_its_settings(tmp_path: Path) -> None:
    source = write_json(tmp_path / "row.json", record())
    kept = {"inputs": [str(source)], "candidates": 3, "test": 0.1, "seed": 42}
    write_json(tmp_path / "out/stats.json", {"settings": kept})
    assert dataset.statistics(tmp_path / "out") is None
    _, again = refresh([], tmp_path / "out")
    assert again and again.settings.candidates == 3 and again.samples == {"train": 1}
    write_json(tmp_path / "out/stats.json", {"settings": kept, "files": [str(source)]})
    with pytest.raises(
        McpLoraError, match=r"stats\.json is damaged .*files.*: remove it, and mcp-lora convert"
    ):
        refresh([], tmp_path / "out")


def test_statistics_are_read_again_also_those_of_another_version(tmp_path: Path) -> None:
    settings = {"inputs": ["a"], "candidates": "4-10", "redact": None, "of_another_version": 1}
    found = {"read": 1, "samples": {"train": 1}, "inputs": {"a": "b"}, "of_another_version": 1}
    found |= {"settings": settings, "sources": [{"file": "a", "format": "f", "written": {"train": 1}}]}
    write_json(tmp_path / "stats.json", found)
    stats = dataset.statistics(tmp_path)
    assert (
        stats
        and stats.settings == Settings(["a"], candidates="4-10")
        and stats.sources[0].written["train"] == 1
    )
    dataset.dump(stats, tmp_path / "stats.json")
    assert dataset.statistics(tmp_path) == stats


def test_a_conversion_outlives_what_it_was_made_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU box that got the converted data alone, and has the shipped sample."""
    (tmp_path / "one").mkdir()
    monkeypatch.chdir(tmp_path / "one")
    source = write_json(Path("data/filtered/filtered_20250101_000000.json"), [record("mine")])
    converted(Path("out"))
    converted(Path("named"), source.absolute())
    monkeypatch.chdir(tmp_path)
    Path("one").rename("two")
    monkeypatch.chdir("two")
    assert "up to date" in refresh([], Path("out"))[0]  # where it lies does not matter
    source.unlink()
    for _ in range(2):
        for folder in (Path("out"), Path("named")):
            assert "not on this machine" in refresh([], folder)[0] and conversion.is_up_to_date(folder)
        write_json(Path("data/filtered/filtered_sample.json"), [record("sample")])
    newer = write_json(Path("data/filtered/filtered_20260101_000000.json"), [record("newer")])
    _, stats = refresh([], Path("out"))
    assert stats and list(stats.inputs) == [str(newer.absolute())]
    assert refresh([], Path("named"))[1] is None


def test_each_training_on_the_shipped_sample_alone_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    sample = write_json(Path("data/filtered/filtered_sample.json"), [record(f"Q{i}") for i in range(9)])
    _, stats = refresh([], Path("out"))
    note, *_ = stats.notes if stats else [""]
    assert "shipped sample" in note and refresh([], Path("out"))[0].endswith(f"; warning: {note}")
    converted(Path("out"), sample)  # which was chosen
    assert refresh([], Path("out"))[0].endswith("up to date")


@pytest.mark.parametrize("name", ["dataset_info.json", "stats.json", "train.jsonl", "seen.jsonl"])
def test_a_file_of_another_make_is_not_written_over(tmp_path: Path, name: str) -> None:
    write_json(tmp_path / name, {"a": 1})
    for attempt in (lambda: refresh([SAMPLE], tmp_path), lambda: converted(tmp_path, SAMPLE)):
        with pytest.raises(McpLoraError, match=rf"{name}, not created by mcp-lora"):
            attempt()
    assert contents(tmp_path) == {name: (tmp_path / name).read_bytes()}


def test_what_a_user_has_changed_or_added_stays(sample_data: Path) -> None:
    (sample_data / "mcp_test_notes.jsonl").write_text("mine")
    info = load(sample_data / "dataset_info.json")
    write_json(sample_data / "dataset_info.json", info | {"mine": {"file_name": "mine.json"}})
    converted(sample_data, SAMPLE, seed=7)
    assert load(sample_data / "dataset_info.json")["mine"] == {"file_name": "mine.json"}
    assert (sample_data / "mcp_test_notes.jsonl").read_text() == "mine"
    (sample_data / "train.jsonl").write_text("mine")
    with pytest.raises(McpLoraError, match=r"train\.jsonl, not created by mcp-lora or modified since"):
        converted(sample_data, SAMPLE)
    assert (sample_data / "train.jsonl").read_text() == "mine"


def test_an_output_is_no_input(tmp_path: Path) -> None:
    write_json(tmp_path / "data/rows.json", [record(f"Add {n}.") for n in range(20)])
    for _ in range(2):
        stats = converted(tmp_path / "data/llama_factory", tmp_path / "data")
        assert stats.read == 20
    assert any("files were skipped" in note for note in stats.notes)


def test_a_sample_without_the_gold_tool_has_as_many_candidates(tmp_path: Path) -> None:
    converted(tmp_path, SAMPLE, candidates=4, no_call=0.5, test=0.0)
    assert {len(sample["tools"]) for sample in dataset.samples(tmp_path, "train")} == {4}


def test_a_conversion_can_be_repeated_by_its_command(tmp_path: Path) -> None:
    from mcp_lora.cli.app import main

    settings = {"seed": 7, "tools": [str(SHAPES / "tools")], "strict_schema": True, "redact": False}
    first = converted(tmp_path / "one", SAMPLE, **settings)
    words = shlex.split(conversion.command(first.settings, tmp_path / "two"))
    with pytest.raises(SystemExit) as caught:
        main(words[1:])
    assert not caught.value.code and dataset.statistics(tmp_path / "two") == first


@pytest.mark.skipif(not SHARED.is_dir(), reason="the third-party data is not here")
def test_real_data_of_every_kind(tmp_path: Path) -> None:
    stats = converted(tmp_path, SHARED, tools=[str(SHARED / "tools"), str(SHARED / "mcp_tools")])
    by_shape: dict[str, list[int]] = {}
    for source in stats.sources:
        counts = by_shape.setdefault(source.format, [0, 0])
        counts[0] += source.read
        counts[1] += sum(source.written.values())
    assert by_shape["filtered"] == [6, 6]
    assert by_shape["function_call"] == [1724, 1705]
    assert by_shape["messages"] == [100, 95]
    assert stats.rejected == {
        "unknown-format": 4850,
        "no-call": 10,
        "duplicate": 2,
        "schema": 7,
        "failed-call": 5,
    }


def test_waiting_for_another_conversion_has_a_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "WAIT", 0)
    out = tmp_path / "out"
    told = pytest.raises(McpLoraError, match="has been converting into .*out for an hour")
    with dataset.locked(out), told, dataset.locked(out):
        pass
    with dataset.locked(out):
        pass


def test_a_row_is_explained_as_it_is_converted(tmp_path: Path) -> None:
    tools = [
        write_json(tmp_path / f"tools/{name}.json", [{"name": "add", "parameters": schema}])
        for name, schema in (("one", {"a": {"type": "number"}}), ("two", {"b": {"type": "string"}}))
    ]
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "add", "arguments": {"a": 1}}}]}
    source = write_json(tmp_path / "one.json", [{"messages": [{"role": "user", "content": "1?"}, call]}])
    settings = Settings([str(source)], [str(file) for file in tools], test=0.0)
    assert conversion.convert(settings, tmp_path / "out").written == {"train": 1}
    assert "as written" in dict(conversion.explain(settings, 1))


def test_a_row_of_failed_calls_counts_as_a_sample_only_if_there_is_one(tmp_path: Path) -> None:
    def row(question: str, failed: bool) -> dict[str, Any]:
        call = {"id": "1", "function": {"name": "add", "arguments": "{}"}}
        result = {"role": "tool", "tool_call_id": "1", "content": "Error: no", "is_error": failed}
        messages = [{"role": "user", "content": question}, {"role": "assistant", "tool_calls": [call]}]
        messages += [result, {"role": "assistant", "content": "It failed."}]
        return {"messages": messages, "tools": [{"name": "add", "parameters": {}}]}

    source = write_json(tmp_path / "rows.json", [row("One?", False), row("Two?", True)])
    stats = converted(tmp_path / "out", source, turns="each", test=0.0)
    assert sum(stats.written.values()) + sum(stats.rejected.values()) == 2
    assert stats.samples.get("train", 0) >= stats.written.get("train", 0), stats.rejected


def test_plain_conversations_are_trained_on_if_they_are_kept(tmp_path: Path) -> None:
    asked = [f"Why is {number} a number?" for number in range(30)]
    said = [[{"role": "user", "content": text}, {"role": "assistant", "content": "So."}] for text in asked]
    more = [{"from": "human", "value": "And 1 + 1?"}, {"from": "gpt", "value": "2"}]
    plain: list[Any] = [{"messages": each} for each in said]
    plain += [{"messages": more_said, "tools": []} for more_said in (said[0] + said[1], said[2][:1])]
    plain += [{"conversations": more}]
    inputs = [str(SAMPLE), str(write_json(tmp_path / "plain.json", plain))]
    rejected = convert(Settings(inputs, test=0.5), tmp_path / "out")
    assert rejected.rejected == {"no-tool": 32, "no-instruction": 1}
    kept = convert(Settings(inputs, test=0.5, keep_plain=True, questions_per_sample=8), tmp_path / "out")
    # the conversation of two questions ends with the first answer, as an earlier row does
    assert kept.rejected == {"no-instruction": 1, "duplicate": 1}
    assert kept.written == rejected.written | {"train": rejected.written["train"] + 31}
    trained = [one for one in dataset.samples(tmp_path / "out", "train") if not one["tools"]]
    assert {*map(str, (one["messages"] for one in trained))} == {
        *map(str, [*said, [{"role": "user", "content": "And 1 + 1?"}, {"role": "assistant", "content": "2"}]])
    }
    # as LLaMA-Factory would render it by itself
    array = load(tmp_path / "out" / TRAIN_FILE)
    assert {(row["system"], row["tools"]) for row in array if not row["tools"]} == {("", "")}
    whole = convert(Settings(inputs, turns="all", keep_plain=True, test=0.5), tmp_path / "out")
    assert whole.rejected == {"no-instruction": 1}
