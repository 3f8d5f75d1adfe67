"""What is trained is what the model's own chat template renders; and what it writes is read back."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy
import pytest
from chat_templates import (
    ANSWER,
    CALLS,
    QUESTION,
    RESULT,
    SYSTEM,
    TOOLS,
    Outcome,
    calling,
    fetched,
    outcome_of,
    table,
    templates,
    tokenizer_of,
)
from conftest import ROOT

from mcp_lora.data.calls import same_calls, split_thought
from mcp_lora.data.records import RowError, ToolCall
from mcp_lora.errors import Interrupted, McpLoraError
from mcp_lora.prompts import render
from mcp_lora.prompts.chat_template import IGNORED, ChatTemplate, schemas

# Why a template is refused.
REFUSED = {
    "Apriel-1.6-15b-Thinker-fixed": "its generation prompt is no part of any conversation",
    "CohereForAI-c4ai-command-r-plus-tool_use": "it needs Cohere's own way to hand tools over",
    "fireworks-ai-llama-3-firefunction-v2": "it takes tools from a variable of its own",
    "llama-cpp-rwkv-world": "no token ends a turn",
    "tencent-Hy3": "its tokens have a placeholder for a name that the file does not hold",
    "trl/idefics3": "content has to be a list of parts",
    "trl/llava_next": "content has to be a list of parts",
    "trl/smolvlm": "content has to be a list of parts",
}
# Families that the project is for: these are trained with their own template.
OWN = (
    "Qwen-Qwen2.5-7B-Instruct",
    "Qwen-Qwen3-0.6B",
    "Qwen3.5-4B",
    "Qwen3-Coder",
    "Qwen-QwQ-32B",
    "meta-llama-Llama-3.1-8B-Instruct",
    "meta-llama-Llama-3.2-3B-Instruct",
    "meta-llama-Llama-3.3-70B-Instruct",
    "Mistral-Small-3.2-24B-Instruct-2506",
    "mistralai-Ministral-3-14B-Reasoning-2512",
    "mistralai-Mistral-Nemo-Instruct-2407",
    "GLM-4.6",
    "GLM-4.7-Flash",
    "google-gemma-4-31B-it",
    "openai-gpt-oss-120b",
    "ibm-granite-granite-4.0",
    "ibm-granite-granite-4.1",
    "LFM2.5-8B-A1B",
    "NousResearch-Hermes-3-Llama-3.1-8B-tool_use",
    "MiniMax-M2",
    "deepseek-ai-DeepSeek-V3.2",
)
# And these with ours, as they show no tools, or show them and write no call.
OURS = (
    "google-gemma-2-2b-it",
    "trl/gemma3",
    "microsoft-Phi-3.5-mini-instruct",
    "HuggingFaceTB-SmolLM3-3B",
    "LFM2.5-Instruct",
    "ibm-granite-granite-3.3-2B-Instruct",
)
# What a template's own form cannot say: such rows are left out and counted.
LEFT_OUT = {
    "parallel calls": "Llama 3 refuses them; gpt-oss, GigaChat, Solar write one; Kimi K3 counts",
    "types": "Gemma 4 writes None for null, as Python does",
    "quotes, lines": "LFM2.5 writes a text in quotes as it is; MiniCPM5 wraps it in CDATA",
    "marks as text": "MiniCPM5 wraps it in CDATA",
}
# The prompt opens a thought, or says something else, that the history does not hold: the prompt is kept.
SERVED = {"deepseek-ai-DeepSeek-V3.2"}


@pytest.fixture(scope="module")
def texts() -> dict[str, str]:
    return dict(templates())


@pytest.fixture(scope="module")
def outcomes(texts: dict[str, str]) -> dict[str, Outcome]:
    return {name: outcome_of(text) for name, text in texts.items()}


def test_every_template_is_trained_or_refused_with_a_reason(outcomes: dict[str, Outcome]) -> None:
    refused = {name: outcome.refused for name, outcome in outcomes.items() if outcome.refused}
    assert refused.keys() == REFUSED.keys(), refused
    assert all("mcp-lora train --model" in message for message in refused.values())
    assert {outcomes[name].words for name in OWN} == {"its own"}
    assert {outcomes[name].words for name in OURS} == {"mcp-lora's"}
    left_out = {what for outcome in outcomes.values() for what in outcome.left_out}
    assert left_out == LEFT_OUT.keys()
    assert all(outcome.samples for outcome in outcomes.values() if outcome.template)


def test_the_readmes_table_is_what_the_command_prints(outcomes: dict[str, Outcome]) -> None:
    readme = (ROOT / "docs/training.md").read_text(encoding="utf-8")
    shown = re.findall(r"^\| \S+ \| (?:its own|mcp-lora's) \| .*$", readme, re.M)
    assert len(shown) > 20 and {*shown} <= {*table(outcomes)}
    counts = Counter(outcome.words for outcome in outcomes.values())
    own, ours, refused = counts["its own"], counts["mcp-lora's"], counts["refused"]
    told = f"{own} of {len(outcomes)} published chat templates are trained as they are, "
    assert f"{told}{ours} with mcp-lora's, {refused} are" in readme


def served(message: dict[str, Any], template: ChatTemplate) -> dict[str, Any]:
    """A message as a server hands it on: arguments as an object; a few templates need them as text."""
    message = {key: value for key, value in message.items() if value is not None}
    if "tool_calls" in message:
        message = {"content": template.empty_content} | json.loads(json.dumps(message))
        for call in message["tool_calls"]:
            if template.arguments_parsed:
                call["function"]["arguments"] = json.loads(call["function"]["arguments"])
    return message


@pytest.mark.parametrize(
    "answers",
    [
        [calling(CALLS["one call"])],
        [calling(CALLS["parallel calls"])],
        [calling(CALLS["one call"]), RESULT, ANSWER],
        [calling(CALLS["one call"], "Let me see.")],
    ],
    ids=["one call", "parallel calls", "call, result, answer", "text beside a call"],
)
def test_trained_ids_are_those_of_the_chat_template(
    outcomes: dict[str, Outcome], answers: list[dict[str, Any]]
) -> None:
    plain = 0
    for name, outcome in outcomes.items():
        template = outcome.template
        if not template or (len(answers[0]["tool_calls"]) > 1 and "parallel calls" in outcome.left_out):
            continue
        messages = [SYSTEM, QUESTION, *answers]
        tokenizer, words = template.tokenizer, [served(message, template) for message in messages]

        def ids(upto: int, prompting: bool, tokenizer: Any = tokenizer, words: Any = words) -> list[int]:
            found: list[int] = tokenizer.apply_chat_template(
                words[:upto],
                tools=TOOLS,
                add_generation_prompt=prompting,
                enable_thinking=False,
                thinking=False,
                date_string="26 Jul 2024",
                strftime_now=lambda form: {"%Y-%m-%d": "2024-07-26"}.get(form, "26 Jul 2024"),
                return_dict=False,
            )
            return found

        samples = template.encode({"messages": messages, "tools": TOOLS})
        turns = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
        spans = [span for sample in samples for span in targets(sample.labels)]
        assert len(spans) == len(turns), name
        for sample in samples:
            assert len(sample.input_ids) == len(sample.labels)
        for place, span in zip(turns, spans, strict=True):
            prompt, whole = ids(place, True), ids(place + 1, False)
            # the prompt that a server sends stands before the target, token by token
            assert any(sample.input_ids[: len(prompt)] == prompt for sample in samples), name
            if whole[: len(prompt)] == prompt:
                plain += 1
                assert whole[len(prompt) : len(prompt) + len(span) - 1] == span[:-1], name
            read = template.read(tokenizer.decode(span), schemas(TOOLS))
            expected = [
                ToolCall(call["function"]["name"], json.loads(call["function"]["arguments"]))
                for call in messages[place].get("tool_calls", [])
            ]
            assert same_calls(read.calls, expected) and not read.broken, name
    assert plain > 60  # where the prompt is the beginning of the whole


def targets(labels: list[int]) -> list[list[int]]:
    """The trained spans."""
    found: list[list[int]] = []
    before = IGNORED
    for label in labels:
        if label != IGNORED and before == IGNORED:
            found.append([])
        if label != IGNORED:
            found[-1].append(label)
        before = label
    return found


# canitoolcall's families, and the templates that write them.
WRITERS = {
    "qwen3-hermes": "Qwen-Qwen3-0.6B",
    "gemma4": "google-gemma-4-31B-it",
    "gpt-oss": "openai-gpt-oss-120b",
    "llama": "meta-llama-Llama-3.3-70B-Instruct",
}
BY_MODEL = {
    "qwen3-xml": {"Coder": "Qwen3-Coder", "": "Qwen3.5-4B"},
    "glm": {"4.5": "GLM-4.6", "4.6": "GLM-4.6", "": "GLM-4.7-Flash"},
    "kimi": {"K3": "Kimi-K3", "": "moonshotai-Kimi-K2"},
    "mistral": {
        "3.2": "Mistral-Small-3.2-24B-Instruct-2506",
        "7B": "mistralai-Mistral-Nemo-Instruct-2407",
        "Nemo": "mistralai-Mistral-Nemo-Instruct-2407",
        "": "mistralai-Ministral-3-14B-Reasoning-2512",
    },
    "deepseek": {"V3.2": "deepseek-ai-DeepSeek-V3.2", "V4.1": "", "V4": "deepseek-ai-DeepSeek-V4", "": ""},
}
# Fixtures that are read otherwise, and why; the key is how their ids begin.
EXCEPTIONS = {
    "deepseek/v3": "no template of DeepSeek V3, R1 or V3.1 at hand shows tools",
    "deepseek/v41": "no template of DeepSeek V4.1 at hand",
    "deepseek/sglang": "of DeepSeek V3 and V3.1, as above",
    "deepseek/vllm": "of DeepSeek V3 and V3.1, as above",
    "deepseek/": "of DeepSeek V3 and V3.1, as above",
    "llama/l4-": "no template of Llama 4 at hand; it writes calls in Python's syntax",
    "llama/l3-sglang-text-before-python-tag": "a bare object is a call where it is all of an answer",
    "kimi/k3-": "the file at hand writes other marks than the fixtures",
    "kimi/k2i-vllm-noise-between-markers": "text between the marks of a call is no call",
    "gpt-oss/vllm-sequential-calls": "a server stops at the first <|call|>",
    "glm/glm47-missing-last-close-arg-value": "a value that is not closed is no value: a text may hold marks",
    "qwen3-xml/vllm-coder-missing-close-parameter": "as above",
    "qwen3-xml/bug-missing-close-parameter-before-function": "as above",
    "glm/glm47-": "the last value is not closed",
}


def test_published_answers_are_read(texts: dict[str, str]) -> None:
    readers: dict[str, ChatTemplate] = {}
    wrong, right = [], 0
    for file in sorted(fetched("canitoolcall==0.1.1").glob("canitoolcall/_data/fixtures/*/*.jsonl")):
        for line in file.read_text(encoding="utf-8").splitlines():
            fixture = json.loads(line)
            family, model = fixture["family"], fixture["models"][0]
            choices = BY_MODEL.get(family, {"": WRITERS.get(family, "")})
            writer = next(name for part, name in choices.items() if part in model)
            if not writer:
                wrong.append(fixture["id"])
                continue
            if writer not in readers:
                readers[writer] = ChatTemplate(tokenizer_of(texts[writer]))
            reading = readers[writer].read(fixture["raw_output"], schemas(fixture["tools"]))
            if "expected" in fixture:
                calls = fixture["expected"].get("tool_calls") or []
                fits = same_calls(
                    reading.calls, [ToolCall(call["name"], call["arguments"]) for call in calls]
                )
            else:
                fits = reading.broken or not reading.calls
            right += fits
            if not fits:
                wrong.append(fixture["id"])
    unlisted = [name for name in wrong if not name.startswith(tuple(EXCEPTIONS))]
    assert not unlisted
    assert right > 360


def test_two_turns_share_a_sample_where_one_prompt_goes_on_from_the_other(texts: dict[str, str]) -> None:
    messages = [SYSTEM, QUESTION, calling(CALLS["one call"]), RESULT, ANSWER]
    row = {"messages": messages, "tools": TOOLS}
    qwen = ChatTemplate(tokenizer_of(texts["Qwen-Qwen2.5-7B-Instruct"]))
    (sample,) = qwen.encode(row)
    assert len(targets(sample.labels)) == 2
    (last,) = qwen.encode(row, last_only=True)
    assert len(targets(last.labels)) == 1 and last.input_ids == sample.input_ids
    # Qwen3 leaves the empty thought out of an earlier turn
    hybrid = ChatTemplate(tokenizer_of(texts["Qwen-Qwen3-0.6B"]))
    assert [len(targets(one.labels)) for one in hybrid.encode(row)] == [1, 1]


def test_an_answer_of_weight_0_is_context(texts: dict[str, str]) -> None:
    messages = [SYSTEM, QUESTION, ANSWER | {"weight": 0}, QUESTION, calling(CALLS["one call"])]
    qwen = ChatTemplate(tokenizer_of(texts["Qwen-Qwen2.5-7B-Instruct"]))
    (sample,) = qwen.encode({"messages": messages, "tools": TOOLS})
    assert len(targets(sample.labels)) == 1 and "get-sum" in sample.target and "It is 7." in sample.prompt


def test_thinking_is_off_where_it_can_be_and_trained_where_it_is_on(texts: dict[str, str]) -> None:
    answer = calling(CALLS["one call"]) | {"reasoning_content": "It wants a sum."}
    tokenizer = tokenizer_of(texts["Qwen-Qwen3-0.6B"])
    prompt, target = ChatTemplate(tokenizer).turn([QUESTION], answer, TOOLS)
    assert prompt.endswith("<think>\n\n</think>\n\n") and "It wants a sum." not in target
    prompt, target = ChatTemplate(tokenizer, thinking=True).turn([QUESTION], answer, TOOLS)
    assert prompt.endswith("<|im_start|>assistant\n")
    assert target.startswith("<think>\nIt wants a sum.\n</think>\n\n<tool_call>")
    # QwQ opens a thought in every prompt that may think, and the answer closes it
    always = ChatTemplate(tokenizer_of(texts["Qwen-QwQ-32B"]), thinking=True)
    prompt, target = always.turn([QUESTION], answer, TOOLS)
    assert prompt.endswith("<think>\n") and target.startswith("It wants a sum.\n</think>\n\n<tool_call>")


def test_dates_and_ids_are_the_same_every_day(texts: dict[str, str]) -> None:
    llama = ChatTemplate(tokenizer_of(texts["meta-llama-Llama-3.1-8B-Instruct"]))
    assert "Today Date: 26 Jul 2024" in llama.turn([QUESTION], ANSWER, TOOLS)[0]
    mistral = ChatTemplate(tokenizer_of(texts["Mistral-Small-3.2-24B-Instruct-2506"]))
    long_id = calling(CALLS["one call"])
    long_id["tool_calls"][0]["id"] = "call_of_some_other_length"
    result = RESULT | {"tool_call_id": "call_of_some_other_length"}
    prompt, _ = mistral.turn([QUESTION, long_id, result, ANSWER, QUESTION, long_id, result], ANSWER, TOOLS)
    assert prompt.count("000000001") == prompt.count("000000002") >= 1  # though the data repeats itself


def test_an_interruption_is_no_fault_of_a_template(
    texts: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = tokenizer_of(texts["Qwen-Qwen2.5-7B-Instruct"])

    def interrupted(*words: Any, **options: Any) -> str:
        raise Interrupted(130)

    monkeypatch.setattr(tokenizer, "apply_chat_template", interrupted)
    with pytest.raises(Interrupted):
        ChatTemplate(tokenizer)


def test_a_model_without_tools_gets_ours(texts: dict[str, str]) -> None:
    for name in ("google-gemma-2-2b-it", "microsoft-Phi-3.5-mini-instruct"):
        template = ChatTemplate(tokenizer_of(texts[name]))
        prompt, target = template.turn([SYSTEM, QUESTION], calling(CALLS["parallel calls"]), TOOLS)
        assert not template.is_own and "Hermes" in template.note
        assert "Be good." in prompt and "<tools>" in prompt and target.count("<tool_call>") == 2
    bare = tokenizer_of("")
    bare.chat_template = None
    template = ChatTemplate(bare)
    assert template.turn([SYSTEM, QUESTION], ANSWER, TOOLS)[1] == f"It is 7.{bare.eos_token}"


def test_distractors_make_room_and_nothing_is_cut(texts: dict[str, str]) -> None:
    template = ChatTemplate(tokenizer_of(texts["Qwen-Qwen2.5-7B-Instruct"]))
    row = {"messages": [SYSTEM, QUESTION, calling(CALLS["one call"])], "tools": TOOLS}
    whole = len(template.encode(row)[0].input_ids)
    fitted = render.fit(template, row, render.settings_of({"cutoff_len": whole - 1}))
    assert fitted.dropped == 1 and [tool["function"]["name"] for tool in fitted.row["tools"]] == [
        "get-sum.v2/x",
        "add",
    ]
    with pytest.raises(RowError, match="without any distractor"):
        render.fit(template, row, render.settings_of({"cutoff_len": 300}))


def test_text_that_a_template_leaves_out_beside_a_call_is_counted(texts: dict[str, str]) -> None:
    row = {"messages": [SYSTEM, QUESTION, calling(CALLS["one call"], "Let me see.")], "tools": TOOLS}
    for name, lost in (("Qwen-Qwen2.5-7B-Instruct", 0), ("mistralai-Mistral-Nemo-Instruct-2407", 1)):
        (sample,) = ChatTemplate(tokenizer_of(texts[name])).encode(row)
        assert sample.lost == lost and ("Let me see." in sample.target) == (not lost)


def test_steps_have_the_same_samples_in_any_number_of_batches_and_little_padding(
    texts: dict[str, str], tmp_path: Path
) -> None:
    from datasets import load_from_disk

    template = ChatTemplate(tokenizer_of(texts["Qwen-Qwen2.5-7B-Instruct"]))
    file = tmp_path / "train.jsonl"
    rows = [
        {
            "messages": [
                QUESTION | {"content": "why " * (number * 7 % 50)},
                {"role": "assistant", "content": "So."},
            ]
        }
        for number in range(50)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    kept, _ = render.render(template, file, tmp_path / "rendered", {})
    folder, _ = render.render(template, file, tmp_path / "rendered", {}, 16)
    before, after = ([*map(tuple, load_from_disk(str(one))["train"]["input_ids"])] for one in (kept, folder))
    assert sorted(before) == sorted(after) and before != after
    lengths = [*map(len, after)]
    steps = [lengths[start : start + 16] for start in range(0, 50, 16)]
    assert all(step == sorted(step, reverse=True) for step in steps) and lengths != sorted(
        lengths, reverse=True
    )
    assert lengths[0] == max(lengths)  # memory runs out at once, or not at all
    assert render.lengths(folder).tolist() == lengths
    assert render.padding(render.lengths(folder), 4) < 0.5 * render.padding(render.lengths(kept), 4)


def test_a_call_is_read_as_a_server_reads_it(texts: dict[str, str]) -> None:
    template = ChatTemplate(tokenizer_of(texts["Qwen-Qwen2.5-7B-Instruct"]))
    call = '<tool_call>\n{{"{}": "add", "{}": {{"a": 1}}}}\n</tool_call>'
    assert template.read(call.format("name", "arguments"), {}).calls == [ToolCall("add", {"a": 1})]
    assert template.read(call.format("tool", "input"), {}).calls == []


def test_reasoning_that_started_in_the_prompt_may_have_brackets() -> None:
    assert split_thought("The list is [1, 2].</think>It is 2 m.") == ("It is 2 m.", "The list is [1, 2].")
    quoted = '{"name": "say", "arguments": {"text": "a </think> b"}}'
    assert split_thought(quoted) == (quoted, "")


def test_padding_is_what_a_batch_has_beside_its_samples() -> None:
    lengths = numpy.array([3, 1, 2, 2, 5])
    assert render.padding(lengths, 2) == 1 - 13 / (2 * 3 + 2 * 2 + 5)
    assert render.padding(lengths, 1) == 0


def test_a_seed_of_zero_is_one() -> None:
    seeds = [{}, {"seed": None}, {"seed": 0}, {"seed": 7}]
    assert [render.settings_of(config)["seed"] for config in seeds] == [42, 42, 0, 7]


def test_a_data_set_is_rendered_once_and_every_row_is_accounted_for(
    texts: dict[str, str], tmp_path: Path
) -> None:
    from datasets import load_from_disk

    llama = ChatTemplate(tokenizer_of(texts["meta-llama-Llama-3.1-8B-Instruct"]))
    answers = [calling(CALLS["one call"], "So."), calling(CALLS["parallel calls"])]
    rows = [
        {"messages": [SYSTEM, QUESTION | {"content": f"What is {number}?"}, answer], "tools": TOOLS}
        for number, answer in enumerate(answers * 20)
    ]
    rows[0]["messages"][1]["content"] = "very " * 5000
    file = tmp_path / "train.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    settings = {"cutoff_len": 4096, "val_size": 0.1, "preprocessing_num_workers": 2}
    folder, made = render.render(llama, file, tmp_path / "rendered", settings)
    assert made["left_out"] == {"too-long": 1, "not-renderable": 20} and len(made["reasons"]) == 2
    assert any(reason.startswith("row 1: ") and "cutoff_len is 4096" in reason for reason in made["reasons"])
    assert made["samples"] + made["validation"] == 19 == made["lost_texts"]
    splits = load_from_disk(str(folder))
    assert {name: len(split) for name, split in splits.items()} == {
        "train": made["samples"],
        "validation": made["validation"],
    }
    expected = [llama.encode(row)[0].input_ids for row in rows[2::2]]
    assert sorted([*splits["train"]["input_ids"], *splits["validation"]["input_ids"]]) == sorted(expected)
    written = (folder / "rendered.json").stat().st_mtime_ns
    again, same = render.render(llama, file, tmp_path / "rendered", settings | {"learning_rate": 1})
    assert (again, same) == (folder, made) and (folder / "rendered.json").stat().st_mtime_ns == written
    other, more = render.render(
        llama, file, tmp_path / "rendered", {"cutoff_len": 4096, "train_on_prompt": True, "max_samples": 3}
    )
    assert other != folder and more["samples"] == 1 and more["validation"] == 0
    row = load_from_disk(str(other))["train"][0]
    assert row["labels"] == row["input_ids"]
    with pytest.raises(McpLoraError, match="val_size=500 of 40 rows leaves nothing"):
        render.render(llama, file, tmp_path / "rendered", settings | {"val_size": 500})
    file.write_text(f"{json.dumps(rows[2])}\n\n{{}}\n", encoding="utf-8")
    made = render.render(llama, file, tmp_path / "rendered", {"cutoff_len": 4096})[1]
    assert made["samples"] == 1 and made["left_out"] == {"damaged": 2}
    file.write_bytes(b'{"messages": "\xff"}\n')
    with pytest.raises(McpLoraError, match="cannot be read, or copied into .*utf-8.*: mcp-lora convert"):
        render.render(llama, file, tmp_path / "rendered", settings)
    file.write_text(json.dumps(rows[1]) + "\n", encoding="utf-8")
    with pytest.raises(McpLoraError, match="no row of .* is left to train on .*row 1: .*mcp-lora inspect 1"):
        render.render(llama, file, tmp_path / "rendered", settings)


def test_the_engine_stops_where_a_turn_ends(texts: dict[str, str], tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    base = tmp_path / "base"
    tokenizer_of(texts["Qwen-Qwen2.5-7B-Instruct"]).save_pretrained(base)
    (base / "config.json").write_text("{}")
    qwen = ChatTemplate(AutoTokenizer.from_pretrained(base))
    assert qwen.stopping_model({"model_name_or_path": str(base)}, tmp_path / "same") == str(base)
    tokenizer_of(texts["GLM-4.6"]).save_pretrained(base)
    glm = ChatTemplate(AutoTokenizer.from_pretrained(base))
    stopping = AutoTokenizer.from_pretrained(
        glm.stopping_model({"model_name_or_path": str(base)}, tmp_path / "stopping")
    )
    assert {*map(str, stopping._extra_special_tokens)} == {"<|user|>", "<|observation|>"}
    assert (tmp_path / "stopping/config.json").is_symlink()
    assert len(stopping) == len(glm.tokenizer)


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
def test_calls_are_read_from_an_answer(
    texts: dict[str, str], text: str, calls: list[ToolCall], tried: bool
) -> None:
    reading = ChatTemplate(tokenizer_of(texts["Qwen-Qwen2.5-7B-Instruct"])).read(text)
    assert (reading.calls, reading.broken) == (calls, tried)
    if text.startswith("Let me see."):
        assert reading.content == "Let me see."
