import json
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import chat_templates
import pytest
from conftest import SAMPLE, write_json

from mcp_lora.cli.app import main
from mcp_lora.data import dataset
from mcp_lora.data.conversion import Settings, convert
from mcp_lora.data.formats import refusal
from mcp_lora.data.records import RowError
from mcp_lora.errors import McpLoraError
from mcp_lora.prompts import chat_template, render

HELD_OUT = {"test": 0.12, "holdout_tools": 0.15, "holdout_servers": 0.15, "no_call": 0.3}


def answers(sample: dict[str, Any]) -> list[tuple[str, Any]]:
    """The questions of a sample, each with the calls or the text of its answer."""
    found = []
    for question, answer in pairwise(sample["messages"]):
        if answer["role"] == "assistant":
            calls = [call["function"] for call in answer.get("tool_calls", [])]
            found.append((question["content"], calls or answer["content"]))
    return found


def test_conversations_ask_every_question_once_about_candidates_that_fit(tmp_path: Path) -> None:
    alone = convert(Settings([str(SAMPLE)], **HELD_OUT), tmp_path / "alone")
    together = Settings([str(SAMPLE)], candidates="4-10", questions_per_sample=8, **HELD_OUT)
    stats = convert(together, tmp_path / "together")
    assert stats.written == alone.written and stats.no_call_samples == alone.no_call_samples
    one, other = (list(dataset.samples(tmp_path / name, "train")) for name in ("alone", "together"))
    expected = Counter(json.dumps(each) for sample in one for each in answers(sample))
    assert Counter(json.dumps(each) for sample in other for each in answers(sample)) == expected
    assert len(other) == stats.samples["train"] < len(one) / 6
    pairs = [pair for sample in one for pair in answers(sample)]
    gold = {question: calls[0]["name"] for question, calls in pairs if calls != refusal(question)}
    sizes, shared, refused = Counter[int](), 0, Counter[int]()
    for sample in other:
        names = [tool["function"]["name"] for tool in sample["tools"]]
        sizes[len(names)] += 1
        assert len({*names}) == len(names) and 4 <= len(names) <= 10
        assert len({question for question, _ in answers(sample)}) == len(answers(sample)) <= 8
        called = Counter(
            gold[question] for question, answer in answers(sample) if answer != refusal(question)
        )
        assert called.keys() <= {*names} and max(called.values(), default=0) <= 4
        shared += len(called) > 1
        for question, answer in answers(sample):
            assert (gold[question] in names) is (answer != refusal(question))
        ids = [call["id"] for message in sample["messages"] for call in message.get("tool_calls", [])]
        assert len({*ids}) == len(ids)
        for place, (question, answer) in enumerate(answers(sample)):
            refused[place // 4] += answer == refusal(question)
    assert 0.5 < refused[0] / refused[1] < 2  # their place in a conversation does not give refusals away
    assert len(sizes) > 3 and shared > len(other) / 2
    for split in ("seen", "unseen_tool", "unseen_server", "no_call"):
        name = f"{split}.jsonl"
        assert (tmp_path / "alone" / name).read_bytes() == (tmp_path / "together" / name).read_bytes()


def test_each_answer_is_trained_after_the_prompt_that_a_server_sends(
    tmp_path: Path, tiny_model: Path
) -> None:
    convert(Settings([str(SAMPLE)], questions_per_sample=4, **HELD_OUT), tmp_path)
    template = chat_template.load({"model_name_or_path": str(tiny_model)})
    settings = render.settings_of({"cutoff_len": 8192})
    for sample in list(dataset.samples(tmp_path, "train"))[:5]:
        (encoded,) = render.fit(template, sample, settings).samples
        trained = [place for place, label in enumerate(encoded.labels) if label != chat_template.IGNORED]
        starts = [place for place in trained if encoded.labels[place - 1] == chat_template.IGNORED]
        turns = [place for place, message in enumerate(sample["messages"]) if message["role"] == "assistant"]
        prompts = [
            template.ids(template.prompt(sample["messages"][:place], sample["tools"])) for place in turns
        ]
        assert [encoded.input_ids[:start] for start in starts] == prompts


def test_templates_that_rewrite_earlier_turns_save_nothing(tmp_path: Path) -> None:
    """And are named in docs/convert.md."""
    convert(Settings([str(SAMPLE)], questions_per_sample=8, test=0.0), tmp_path)
    found = Counter[str]()
    (sample, *_) = (one for one in dataset.samples(tmp_path, "train") if len(answers(one)) == 8)
    for _, text in chat_templates.templates():
        try:
            template = chat_template.ChatTemplate(chat_templates.tokenizer_of(text))
        except McpLoraError:
            continue
        try:
            found[f"{len(template.encode(sample))} samples"] += 1
        except RowError:
            found["rejected"] += 1
    print(dict(found))
    assert found == {"1 samples": 71, "8 samples": 28, "rejected": 4}


def test_conversations_of_several_turns_stay_samples_of_their_own(tmp_path: Path) -> None:
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "add", "arguments": '{"a": 1}'}}]}
    parameters = {"type": "object", "properties": {"a": {"type": "integer"}}}
    tools = [{"type": "function", "function": {"name": "add", "description": "", "parameters": parameters}}]
    rows = [
        {"messages": [*before, {"role": "user", "content": f"add {number}"}, call], "tools": tools}
        for number in range(6)
        for before in (
            [],
            [{"role": "user", "content": f"hi {number}"}, {"role": "assistant", "content": "hello"}],
            [{"role": "system", "content": f"You are number {number // 3}."}],
        )
    ]
    file = write_json(tmp_path / "rows.json", rows)
    stats = convert(Settings([str(file)], test=0.0, questions_per_sample=6), tmp_path / "out")
    assert stats.written == {"train": 18}
    samples = list(dataset.samples(tmp_path / "out", "train"))
    # by three, as no more than half of six may call the same tool
    assert Counter(len(answers(sample)) for sample in samples) == {2: 6, 3: 4}


def row(question: str, answer: Any, *tools: str) -> dict[str, Any]:
    """A row that brings tools, and calls one of them or answers with text."""
    parameters = {"type": "object", "properties": {"a": {"type": "integer"}}}
    functions = [{"name": name, "description": "", "parameters": parameters} for name in tools]
    message: dict[str, Any] = {"role": "assistant", "content": answer}
    if answer in tools:
        call = {"function": {"name": answer, "arguments": '{"a": 1}'}}
        message = {"role": "assistant", "tool_calls": [call]}
    return {
        "messages": [{"role": "user", "content": question}, message],
        "tools": [{"type": "function", "function": function} for function in functions],
    }


def test_a_row_without_a_call_keeps_its_own_candidates(tmp_path: Path) -> None:
    rows = [
        row("What is the weather?", "No tool tells the weather.", "calculate", "convert_currency"),
        row("How many euros?", "No tool converts.", "calculate", "get_weather"),
        row("Is it raining?", "get_weather", "get_weather", "calculate"),
    ]
    file = write_json(tmp_path / "rows.json", rows)
    convert(Settings([str(file)], test=0.0, questions_per_sample=4), tmp_path / "out")
    found = {}
    for sample in dataset.samples(tmp_path / "out", "train"):
        names = {tool["function"]["name"] for tool in sample["tools"]}
        found |= {question: names for question, _ in answers(sample)}
    for one in rows[:2]:
        assert found[one["messages"][0]["content"]] == {*names_of(one)}


def names_of(one: dict[str, Any]) -> list[str]:
    return [tool["function"]["name"] for tool in one["tools"]]


def test_what_another_row_brings_does_not_do_what_a_refusal_lacks(tmp_path: Path) -> None:
    rows = [
        row("Is it raining?", "get_weather", "get_weather", "calculate"),
        row("What is 1 + 2?", "calculate", "calculate", "weather_get"),
    ]
    file = write_json(tmp_path / "rows.json", rows)
    convert(Settings([str(file)], test=0.0, no_call=1.0, questions_per_sample=4), tmp_path / "out")
    for sample in dataset.samples(tmp_path / "out", "train"):
        weather = {"get_weather", "weather_get"} & {*names_of(sample)}
        called = [answer != refusal(question) for question, answer in answers(sample) if "rain" in question]
        assert len(weather) <= 1 and (not called or weather == ({"get_weather"} if all(called) else set()))


def test_a_refusal_needs_a_candidate(tmp_path: Path) -> None:
    rows = [row(f"Is it raining in {city}?", "get_weather", "get_weather") for city in ("Rome", "Oslo")]
    file = write_json(tmp_path / "rows.json", rows)
    stats = convert(Settings([str(file)], test=0.0, no_call=1.0, questions_per_sample=4), tmp_path / "out")
    assert stats.no_call_samples == {} and stats.written == {"train": 2}
    assert all(sample["tools"] for sample in dataset.samples(tmp_path / "out", "train"))


@pytest.mark.parametrize("wrong", ["0", "4-", "10-4", "x"])
def test_a_wrong_number_of_candidates_is_an_error(wrong: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["convert", str(SAMPLE), "--candidates", wrong])
    assert ended.value.code == 2 and "--candidates 4-10" in capsys.readouterr().err
