import json
from pathlib import Path

import pytest
from conftest import SAMPLE, preprocessed

from mcp_lora import engine
from mcp_lora.dataset import Settings, convert
from mcp_lora.records import ToolCall


def test_unknown_keys_and_templates_are_all_named() -> None:
    config = {"template": "qwem", "lora_rang": 3, "learning_rate": 1.0, "zzz": 1}
    assert engine.problems(config) == [
        "LLaMA-Factory knows no key lora_rang (did you mean lora_rank?)",
        "LLaMA-Factory knows no key zzz",
        "LLaMA-Factory knows no template qwem (did you mean qwen?)",
    ]


def test_a_missing_engine_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    from mcp_lora.errors import McpLoraError

    engine.require()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(McpLoraError, match="pip install"):
        engine.require()


CALL = '{"name": "get-sum", "arguments": {"a": 1}}'
SUM = ToolCall("get-sum", {"a": 1})


@pytest.mark.parametrize(
    ("text", "calls", "tried"),
    [
        (f"<tool_call>\n{CALL}\n</tool_call>", [SUM], False),
        (f"Let me see. <tool_call>{CALL}</tool_call> That will do.", [SUM], False),
        (f"<tool_call>\n{CALL}\n</tool_call>\n<tool_call>\n{CALL}\n</tool_call>", [SUM, SUM], False),
        (f"<tool_call>\n{CALL}", [SUM], False),
        (f"<tool_call>\n{CALL}\n</tool_call>\n<tool_call>\n{CALL[:30]}", [SUM], True),
        ('<tool_call>{"name": "a b/c.d", "parameters": {}}</tool_call>', [ToolCall("a b/c.d", {})], False),
        ('<tool_call>{"name": "get-sum", "arguments": "{\\"a\\": 1}"}</tool_call>', [SUM], False),
        ("I cannot do that.", [], False),
        (CALL, [], False),
        ('<tool_call>\n{"name": "get-sum", "argum', [], True),
        ('<tool_call>\n{"name": "get-sum", "arguments": "text"}\n</tool_call>', [], True),
        ('<tool_call>\n["name", "arguments"]\n</tool_call>', [], True),
        ("<tool_call>\n3\n</tool_call>", [], True),
    ],
)
def test_calls_are_read_from_an_answer(text: str, calls: list[ToolCall], tried: bool) -> None:
    assert engine.read_calls(text, "smollm2", "qwen") == (calls, tried)
    assert engine.read_calls(text, "qwen", None) == (calls, tried)


@pytest.mark.parametrize(
    ("tool_format", "text", "calls", "tried"),
    [
        ("default", 'Action: get_sum\nAction Input: {"a": 1}', [ToolCall("get_sum", {"a": 1})], False),
        ("default", 'Action: get-sum\nAction Input: {"a": 1}', [SUM], False),
        ("default", 'Action: get sum\nAction Input: {"a": 1', [], True),
        ("llama3", '{"name": "get-sum", "parameters": {"a": 1}}', [SUM], False),
        ("llama3", f"Sure: {CALL}.", [SUM], False),
        ("llama3", "Nothing fits.", [], False),
        (
            "llama3",
            '{"name": "get-sum", "description": "Adds", "parameters": {"type": "object"}} is one',
            [],
            True,
        ),
        ("mistral", f"[{CALL}, {CALL}]", [SUM, SUM], False),
        ("mistral", '[{"name": "get-sum", "arguments": {"a"', [], True),
        ("glm4", 'get-sum\n{"a": 1}', [SUM], False),
        (
            "glm4_moe",
            "<tool_call>get-sum\n<arg_key>a</arg_key>\n<arg_value>1</arg_value>\n</tool_call>",
            [],
            True,
        ),
    ],
)
def test_calls_are_read_in_every_format(
    tool_format: str, text: str, calls: list[ToolCall], tried: bool
) -> None:
    assert engine.read_calls(text, "qwen", tool_format) == (calls, tried)


@pytest.mark.parametrize(("template", "tool_format"), [("qwen", None), ("smollm2", "qwen")])
def test_the_engine_trains_on_the_call_alone_and_loses_no_sample(
    tmp_path: Path, tiny_model: Path, template: str, tool_format: str | None
) -> None:
    """The engine's own loading, conversion and tokenizing of a converted file."""
    from transformers import AutoTokenizer

    stats = convert(Settings([str(SAMPLE)], candidates=3), tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    rows = preprocessed(tmp_path, tiny_model, template, tool_format, cutoff_len=8192)
    assert len(rows) == stats["written"]["mcp_train"]
    source = json.loads((tmp_path / "mcp_train_data.json").read_text(encoding="utf-8"))
    for row, sample in zip(rows, source, strict=True):
        call = json.loads(sample["conversations"][1]["value"])
        trained = tokenizer.decode([token for token in row["labels"] if token != -100])
        expected = f"<tool_call>\n{json.dumps(call, ensure_ascii=False)}\n</tool_call><|im_end|>"
        assert trained.strip() == expected
        prompt = tokenizer.decode(row["input_ids"])
        assert sample["conversations"][0]["value"] in prompt and sample["system"] in prompt
        for tool in json.loads(sample["tools"]):
            assert json.dumps(tool["name"]) in prompt
