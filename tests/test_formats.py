"""Every form that people publish or log: a record of each, and the conversation that is read from it."""

import json
import random
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from conftest import ROOT, SHAPES, SHARED, catalogue_of, write_json

from mcp_lora.data import conversion, dataset, files, formats
from mcp_lora.data.records import ANSWER, CALL, RESULT, SYSTEM, USER, Content, RowError, Tool, ToolCall, Turn
from mcp_lora.data.tools import schema_of, tools_in
from mcp_lora.errors import McpLoraError

SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
FUNCTION = {"name": "tide", "description": "Tide", "parameters": SCHEMA}
TOOL = {"type": "function", "function": FUNCTION}
BARE = {"name": "tide", "description": "Tide", "inputSchema": SCHEMA}
ARGUMENTS = {"city": "Oslo"}
NAMED = {"name": "tide", "arguments": ARGUMENTS}
AS_TEXT = {"name": "tide", "arguments": json.dumps(ARGUMENTS)}
OPENAI_CALL = {"id": "c1", "type": "function", "function": AS_TEXT}
ASKED = {"role": "user", "content": "Tide in Oslo?"}
CALLED = {"role": "assistant", "content": None, "tool_calls": [OPENAI_CALL]}
DONE = [{"role": "tool", "tool_call_id": "c1", "content": "2 m"}, {"role": "assistant", "content": "2 m."}]
OPENAI = [ASKED, CALLED, *DONE]
ITEMS = [
    {"type": "reasoning", "summary": [{"type": "summary_text", "text": "Ask the tool."}]},
    {"type": "function_call", "call_id": "c1"} | AS_TEXT,
    {"type": "function_call_output", "call_id": "c1", "output": "2 m"},
    {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "2 m."}]},
]
RESULT_BLOCKS = [{"type": "text", "text": "2 m"}, {"type": "image", "source": {}}]
BLOCKS: list[dict[str, Any]] = [
    ASKED,
    {
        "role": "assistant",
        "content": [
            {"type": "thinking", "thinking": "Ask the tool.", "signature": "x"},
            {"type": "text", "text": "I look it up."},
            {"type": "tool_use", "id": "c1", "name": "tide", "input": ARGUMENTS},
        ],
    },
    {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c1", "content": RESULT_BLOCKS}]},
    {"role": "assistant", "content": [{"type": "text", "text": "2 m."}]},
]
EVENT = {"timestamp": "t", "sessionId": "s"}
GEMINI_SCHEMA = {"type": "OBJECT", "properties": {"city": {"type": "STRING"}}}

RECORDS: dict[str, Any] = {
    "openai": {"messages": OPENAI, "tools": [TOOL]},
    "legacy functions": {
        "messages": [
            ASKED,
            {"role": "assistant", "content": "", "function_call": AS_TEXT},
            {"role": "function", "name": "tide", "content": "2 m"},
            DONE[1],
        ],
        "functions": [FUNCTION],
    },
    "texts of JSON": {"messages": json.dumps(OPENAI), "tools": json.dumps([json.dumps(TOOL)])},
    "sharegpt": {
        "conversations": [
            {"from": "human", "value": "Tide in Oslo?"},
            {"from": "function_call", "value": json.dumps(NAMED)},
            {"from": "observation", "value": "2 m"},
            {"from": "gpt", "value": "2 m."},
        ],
        "tools": json.dumps([FUNCTION]),
    },
    "hermes": {
        "conversations": [
            {
                "from": "system",
                "value": f"You call tools.\n<tools>\n{json.dumps(TOOL)}\n</tools>\nNever guess.",
            },
            {"from": "human", "value": "Tide in Oslo?"},
            {"from": "gpt", "value": f"<tool_call>\n{NAMED}\n</tool_call>"},
            {"from": "tool", "value": "<tool_response>\n2 m\n</tool_response>"},
            {"from": "gpt", "value": "2 m."},
        ]
    },
    "glaive": {
        "system": f"SYSTEM: You have these functions. Use them if required -\n{json.dumps(FUNCTION)}",
        "chat": "USER: Tide in Oslo?\n\n\nASSISTANT: <functioncall> "
        """{"name": "tide", "arguments": '{"city": "Oslo"}'} <|endoftext|>\n\n\n"""
        "FUNCTION RESPONSE: 2 m\n\n\nASSISTANT: 2 m. <|endoftext|>",
    },
    "anthropic": {"messages": BLOCKS, "tools": [BARE | {"input_schema": SCHEMA}], "system": "Be brief."},
    "claude code": [
        EVENT | {"type": "summary", "summary": "Tides", "leafUuid": "1"},
        *(EVENT | {"type": message["role"], "message": message} for message in BLOCKS),
    ],
    "responses": {
        "instructions": "Be brief.",
        "input": "Tide in Oslo?",
        "output": ITEMS,
        "tools": [BARE | {"type": "function"}],
    },
    "codex": [
        {"timestamp": "t", "type": "session_meta", "payload": {"id": "1", "cwd": "x"}},
        {"timestamp": "t", "type": "event_msg", "payload": {"type": "user_message", "message": "Tide?"}},
        *(
            {"timestamp": "t", "type": "response_item", "payload": item}
            for item in ({"type": "message"} | ASKED, *ITEMS)
        ),
    ],
    "gemini": {
        "systemInstruction": {"parts": [{"text": "Be brief."}]},
        "contents": [
            {"role": "user", "parts": [{"text": "Tide in Oslo?"}]},
            {"role": "model", "parts": [{"functionCall": {"name": "tide", "args": ARGUMENTS}}]},
            {
                "role": "user",
                "parts": [{"functionResponse": {"name": "tide", "response": {"result": "2 m"}}}],
            },
            {"role": "model", "parts": [{"text": "2 m."}]},
        ],
        "tools": [{"functionDeclarations": [{"name": "tide", "parameters": GEMINI_SCHEMA}]}],
    },
    "langchain": {
        "messages": [
            {"type": "human", "content": "Tide in Oslo?"},
            {"type": "ai", "content": "", "tool_calls": [{"name": "tide", "args": ARGUMENTS, "id": "c1"}]},
            {"type": "tool", "content": "2 m", "tool_call_id": "c1", "name": "tide"},
            {"lc": 1, "id": ["langchain", "messages", "AIMessage"], "kwargs": {"content": "2 m."}},
        ],
        "tools": [TOOL],
    },
    "langchain, serialized": {
        "messages": [
            {"type": "human", "data": {"content": "Tide in Oslo?"}},
            {"type": "ai", "data": {"content": "", "tool_calls": [{"name": "tide", "args": ARGUMENTS}]}},
        ],
        "tools": [TOOL],
    },
    "trl": {"prompt": [ASKED], "completion": [CALLED], "tools": [TOOL]},
    "request log": {
        "request": {"model": "m", "messages": [ASKED], "tools": [TOOL]},
        "response": {"id": "r", "choices": [{"index": 0, "message": CALLED}]},
    },
    "request log, anthropic": {
        "request": {"messages": [ASKED], "tools": [BARE]},
        "response": {"type": "message", "role": "assistant", "content": BLOCKS[1]["content"]},
    },
    "langsmith": {
        "inputs": {"messages": [[ASKED]], "tools": [TOOL]},
        "outputs": {"generations": [[{"text": "", "message": CALLED}]]},
    },
    "opentelemetry": {
        "attributes": {
            "gen_ai.input.messages": json.dumps(
                [{"role": "user", "parts": [{"type": "text", "content": "Tide in Oslo?"}]}]
            ),
            "gen_ai.output.messages": json.dumps(
                [{"role": "assistant", "parts": [{"type": "tool_call", "id": "c1"} | NAMED]}]
            ),
            "gen_ai.tool.definitions": json.dumps([FUNCTION]),
        }
    },
    "tau-bench": {"task_id": 1, "traj": OPENAI, "tools": [TOOL]},
    "bfcl": {
        "question": [[ASKED]],
        "function": [FUNCTION],
        "ground_truth": [{"tide": {"city": ["Oslo", "oslo"]}}],
    },
    "nemo, expected calls": {"messages": [ASKED], "tools": [TOOL], "tool_calls": [OPENAI_CALL]},
    "llama-factory v1": {
        "messages": [
            {"role": "user", "content": [{"type": "text", "value": "Tide in Oslo?"}]},
            {
                "role": "assistant",
                "content": [
                    {"type": "reasoning", "value": "Ask the tool."},
                    {"type": "tool_call", "value": json.dumps(NAMED)},
                ],
            },
        ],
        "tools": json.dumps([TOOL]),
    },
    "nemo data designer": {"answer": "2 m.", "answer__trace": OPENAI, "tools": [TOOL]},
    "xlam": {
        "query": "Tide in Oslo?",
        "tools": '[{"name": "tide", "parameters": {"city": {"type": "str"}}}]',
        "answers": json.dumps([NAMED]),
    },
    "filtered": {
        "instruction": "Tide in Oslo?",
        "server_info": {"server_name": "sea"},
        "tool_info": {"tool_name": "tide", "input_schema": SCHEMA},
        "function_call": NAMED,
    },
    "toolace": {
        "system": f"You may call these functions:\n{json.dumps([FUNCTION])}\nAnswer with [f(a=b)].",
        "conversations": [
            {"from": "user", "value": "Tide in Oslo?"},
            {"from": "assistant", "value": "[tide(city='Oslo')]"},
        ],
    },
    "hermes, in python's quotes": {
        "conversations": [
            {"from": "system", "value": f"<tools>{[TOOL]}</tools>"},
            {"from": "human", "value": "Tide in Oslo?"},
            {"from": "gpt", "value": f"<tool_call>\n{NAMED}\n</tool_call>"},
        ]
    },
    "bfcl, calls as text": {
        "question": [[ASKED]],
        "function": [FUNCTION],
        "ground_truth": ["tide(city='Oslo')"],
    },
    "nemo gym": {
        "responses_create_params": {"input": [ASKED], "tools": [{"type": "function"} | FUNCTION]},
        "expected_calls": [NAMED],
    },
    "alpaca": {"instruction": "Tide in Oslo?", "input": "", "output": json.dumps(NAMED), "tools": [FUNCTION]},
    "bedrock": {
        "messages": [
            {"role": "user", "content": [{"text": "Tide in Oslo?"}]},
            {
                "role": "assistant",
                "content": [{"toolUse": {"toolUseId": "c1", "name": "tide", "input": ARGUMENTS}}],
            },
            {
                "role": "user",
                "content": [{"toolResult": {"toolUseId": "c1", "content": [{"text": "2 m"}]}}],
            },
            {"role": "assistant", "content": [{"text": "2 m."}]},
        ],
        "toolConfig": {"tools": [{"toolSpec": {"name": "tide", "inputSchema": {"json": SCHEMA}}}]},
    },
    "ai sdk": {
        "messages": [
            ASKED,
            {
                "role": "assistant",
                "content": [{"type": "tool-call", "toolCallId": "c1", "toolName": "tide", "args": ARGUMENTS}],
            },
            {
                "role": "tool",
                "content": [{"type": "tool-result", "toolCallId": "c1", "toolName": "tide", "result": "2 m"}],
            },
            DONE[1],
        ],
        "tools": [TOOL],
    },
    "langchain, constructors": {
        "messages": [
            {
                "lc": 1,
                "type": "constructor",
                "id": ["langchain", "schema", "messages", "HumanMessage"],
                "kwargs": {"content": "Tide in Oslo?"},
            },
            {
                "lc": 1,
                "type": "constructor",
                "id": ["langchain", "schema", "messages", "AIMessage"],
                "kwargs": {"content": "", "additional_kwargs": {"tool_calls": [OPENAI_CALL]}},
            },
        ],
        "tools": [TOOL],
    },
    "langsmith, with its settings": {
        "inputs": {"messages": [[ASKED]]},
        "outputs": {"generations": [[{"text": "", "message": CALLED}]]},
        "extra": {"invocation_params": {"tools": [TOOL]}},
    },
    "litellm": {
        "messages": [ASKED],
        "optional_params": {"tools": [TOOL]},
        "response": {"choices": [{"message": CALLED}]},
    },
    "langfuse": {"input": {"messages": [ASKED], "tools": [TOOL]}, "output": CALLED},
    "opentelemetry's protocol": {
        "attributes": [
            {
                "key": "gen_ai.input.messages",
                "value": {
                    "stringValue": json.dumps(
                        [{"role": "user", "parts": [{"type": "text", "content": "Tide in Oslo?"}]}]
                    )
                },
            },
            {
                "key": "gen_ai.output.messages",
                "value": {
                    "stringValue": json.dumps(
                        [{"role": "assistant", "parts": [{"type": "tool_call", "id": "c1"} | NAMED]}]
                    )
                },
            },
            {"key": "gen_ai.tool.definitions", "value": {"stringValue": json.dumps([FUNCTION])}},
        ]
    },
    "swift": {
        "messages": [
            ASKED,
            {"role": "tool_call", "content": json.dumps(NAMED)},
            {"role": "tool_response", "content": "2 m"},
        ],
        "tools": [TOOL],
    },
}
WITHOUT_TOOLS = ("claude code", "codex")
THINKING = ("anthropic", "request log, anthropic", "claude code", "responses", "codex", "llama-factory v1")


def read(record: Any, server: str = "", tools: Path = SHAPES / "tools") -> Content:
    catalogue = catalogue_of(tools)
    return formats.read(record, lambda name: catalogue.find(name, server))


@pytest.mark.parametrize("name", RECORDS)
def test_a_record_of_each_form_is_read(name: str, tmp_path: Path) -> None:
    known = write_json(tmp_path / "sea.json", [BARE])
    content = read(RECORDS[name], "sea", known)
    said = [turn for turn in content.turns if turn.role != SYSTEM]
    assert content.error is None and (said[0].role, said[0].text) == (USER, "Tide in Oslo?")
    (call,) = [turn for turn in said if turn.role == CALL]
    assert call.calls == (ToolCall("tide", ARGUMENTS),)
    (tool,) = content.tools
    assert (tool.name, tool.parameters["properties"]) == ("tide", SCHEMA["properties"])
    assert (tool.server == "sea") == (name in (*WITHOUT_TOOLS, "filtered"))
    thoughts = "".join(turn.reasoning for turn in said)
    assert thoughts == ("Ask the tool." if name in THINKING else "")
    if len(said) > 3 or name == "responses":
        assert [turn.text for turn in said if turn.role == RESULT] == ["2 m"]
        assert (said[-1].role, said[-1].text) == (ANSWER, "2 m.")
    system = "".join(turn.text for turn in content.turns if turn.role == SYSTEM)
    assert '"parameters"' not in system
    if name == "hermes":
        assert system.startswith("You call tools.") and system.endswith("Never guess.")


def test_a_session_log_is_a_record_for_each_session() -> None:
    events = RECORDS["claude code"]
    other = [event | {"sessionId": "t"} for event in events]
    assert list(formats.records([*events, *other])) == [events[1:], other[1:]]
    assert list(formats.records([OPENAI, RECORDS["trl"]])) == [OPENAI, RECORDS["trl"]]


def test_rows_with_the_keys_of_a_log_are_rows() -> None:
    """Every one of them: none may vanish, or become a part of another."""
    chat = {"type": "chat", "sessionId": "s1", "messages": OPENAI, "tools": [TOOL]}
    others = [{"type": "x", "payload": {"a": number}} for number in range(2)]
    others += [{"timestamp": "t"} | one for one in others]
    without = [{"type": "note", "sessionId": "s1", "text": "a"}, {"type": "note", "sessionId": "s2"}]
    without.append({"type": "note", "sessionId": ["s1"]})
    for rows in ([chat, chat], others, without):
        assert list(formats.records(rows)) == rows
    assert all(map(formats.is_session, without)) and not formats.is_session(chat)  # what is redacted
    assert read(chat).turns[1].calls == (ToolCall("tide", ARGUMENTS),)


def test_a_system_message_keeps_json_that_is_no_tool() -> None:
    for said in (
        'The user is {"name": "Alice", "age": 3}. Be kind.',
        'Answer as {"name": "…", "parts": [{"name": "…"}]}.',
    ):
        content = read({"messages": [{"role": "system", "content": said}, *OPENAI], "tools": [TOOL]})
        assert content.turns[0].text == said and [tool.name for tool in content.tools] == ["tide"]
    ping = {"name": "ping", "description": "Pings.", "parameters": {}}
    said = f"Call these: {json.dumps([FUNCTION, ping])} Be kind."
    content = read({"messages": [{"role": "system", "content": said}, *OPENAI]})
    assert content.turns[0].text == "Call these:  Be kind."
    assert [tool.name for tool in content.tools] == ["tide", "ping"]


def test_the_first_definition_of_a_tool_counts() -> None:
    tools = [
        {
            "server_info": {"name": server},
            "tools": [{"name": "tide", "description": text, "inputSchema": SCHEMA}],
        }
        for server, text in (("A", "one"), ("B", "two"), ("A", "three"))
    ]
    (tool,) = read({"messages": OPENAI, "tools": tools}).tools
    assert (tool.server, tool.description) == ("A", "one")


def test_the_docs_show_a_record_of_each_form() -> None:
    docs = (ROOT / "docs/data.md").read_text(encoding="utf-8")
    for name, record in RECORDS.items():
        lines = record if name in WITHOUT_TOOLS else [record]  # a session log has a line an event
        shown = "\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
        assert f"### {name}\n\n```json\n{shown}\n```\n" in docs, name


def test_the_docs_show_tools_that_are_read() -> None:
    docs = (ROOT / "docs/data.md").read_text(encoding="utf-8")
    lines = docs.split("## Tools")[1].split("```json\n")[1].split("```")[0].splitlines()
    assert len(lines) > 5 and all([tool.name for tool in tools_in(line)] == ["tide"] for line in lines)


def test_session_logs_are_redacted_unless_told_otherwise(tmp_path: Path) -> None:
    events = json.loads(json.dumps(RECORDS["claude code"]).replace("I look it up.", "Mail ann@corp.example."))
    source = tmp_path / "session.jsonl"
    source.write_text("".join(json.dumps(event) + "\n" for event in events), encoding="utf-8")
    tools = [str(write_json(tmp_path / "sea.json", [BARE]))]
    for redact, kept in ((None, False), (False, True)):
        settings = conversion.Settings([str(source)], tools, test=0.0, redact=redact)
        stats = conversion.convert(settings, tmp_path / "out")
        assert stats.cleaned.get("redacted mail address", 0) == (not kept)
        text = (tmp_path / "out/train.jsonl").read_text(encoding="utf-8")
        assert ("ann@corp.example" in text) == kept and "Mail " in text


def test_a_question_in_two_fields_is_whole() -> None:
    record = RECORDS["alpaca"] | {"instruction": "Read this.", "input": '{"city": "Oslo"}'}
    assert read(record).turns[0].text == 'Read this.\n{"city": "Oslo"}'


def test_a_file_may_be_one_conversation_or_hold_its_rows_under_data() -> None:
    assert list(formats.records(OPENAI)) == [OPENAI]
    assert list(formats.records([{"data": [RECORDS["trl"], RECORDS["xlam"]]}])) == [
        RECORDS["trl"],
        RECORDS["xlam"],
    ]


ON_OFFER = {"tide": SCHEMA, "ping": {"type": "object", "properties": {}}}


@pytest.mark.parametrize(
    ("text", "calls", "beside"),
    [
        ('<TOOLCALL>[{"name": "ping", "arguments": {}}]</TOOLCALL>', ["ping"], ""),
        ('I ask. <tool_call>\n{"name": "ping", "arguments": {}}\n</tool_call>', ["ping"], "I ask."),
        ('{"name": "ping", "parameters": {}}', ["ping"], ""),
        ("[ping(), tide(city='Oslo')]", ["ping", "tide"], ""),
        ('Thought: x\nAction: tide\nAction Input: {"city": "Oslo"}', ["tide"], "Thought: x"),
        ('<function=tide>{"city": "Oslo"}</function>', ["tide"], ""),
        ('```json\n{"name": "ping", "arguments": {}}\n```', ["ping"], ""),
        ('[TOOL_CALLS][{"name": "ping", "arguments": {}}]', ["ping"], ""),
        ("<|channel|>commentary to=functions.ping <|constrain|>json<|message|>{}<|call|>", ["ping"], ""),
        ('{"tool": "tide", "args": {"city": "Oslo"}}', ["tide"], ""),
        ('{"name": "tide", "args": {"city": "Oslo"}}', ["tide"], ""),
        ('<tool_call>{"name": "tide", "input": {"city": "Oslo"}}</tool_call>', ["tide"], ""),
        ('{"action": "tide", "action_input": {"city": "Oslo"}}', ["tide"], ""),
        ('<TOOLCALL>[{"function": "tide", "parameters": {"city": "Oslo"}}]</TOOLCALL>', ["tide"], ""),
        (
            "Go.\n<tool_call>tide\n<arg_key>city</arg_key>\n<arg_value>Oslo</arg_value>\n</tool_call>",
            ["tide"],
            "Go.",
        ),
        ("<|python_start|>[ping()]<|python_end|>", ["ping"], ""),
        ('<|action_start|><|plugin|>\n{"name": "ping", "parameters": {}}<|action_end|>', ["ping"], ""),
        ('Action: ```json\n[{"tool_name": "ping", "parameters": {}}]\n```', ["ping"], ""),
        ('tide\n{"city": "Oslo"}', ["tide"], ""),
        ('>>>tide\n{"city": "Oslo"}', ["tide"], ""),
        ("```tool_code\ntide(city='Oslo')\n```", ["tide"], ""),
        ('{"thought": "", "tool_calls": [{"name": "ping", "arguments": {}}]}', ["ping"], ""),
        ('Sure:\n```json\n{"name": "ping", "arguments": {}}\n```', ["ping"], "Sure:"),
        ("I would ask tide about Oslo, which takes {city}.", [], None),
        ('{"name": "bob", "arguments": {}}', [], None),
        ("It is in [tide].", [], None),
        ("The function ping() takes nothing, call it as you like.", [], None),
        ("{'tide': {1, 2}}", [], None),  # which JSON has not
    ],
)
def test_a_call_as_text_is_a_call_and_other_text_is_none(text: str, calls: list[str], beside: str) -> None:
    messages = [ASKED, {"role": "assistant", "content": text}]
    tools = [{"name": name, "parameters": schema} for name, schema in ON_OFFER.items()]
    turn = read({"messages": messages, "tools": tools}).turns[-1]
    assert [call.name for call in turn.calls] == calls
    assert all(call.arguments == (ARGUMENTS if call.name == "tide" else {}) for call in turn.calls)
    assert turn.text == (text if beside is None else beside)


@pytest.mark.parametrize(
    ("text", "thought", "answer"),
    [
        ("<think>Hm.</think>\n\n2 m.", "Hm.", "2 m."),
        ("Hm.</think>2 m.", "Hm.", "2 m."),  # opened in the prompt
        ("Hm. </think>\n\n2 m.", "Hm.", "2 m."),
        ("Well.\n<think>\nHm.\n</think>\n2 m.", "Hm.", "Well.\n\n2 m."),
        ("[THINK]Hm.[/THINK]2 m.", "Hm.", "2 m."),
        ("A thought ends with </think>.", "", None),
        ('It is "</think>" there.', "", None),
        ("Put it between <think>these</think> tags.", "", None),
        ("Like this: `a</think>b`", "", None),
        ("As code:\n```\n<think>a</think>\n```", "", None),
        ('{"a": "b</think>c"}', "", None),
        ("2 m.<|end|>", "", None),  # which also ends turns
    ],
)
def test_a_thought_is_reasoning_and_what_mentions_its_marks_is_not(
    text: str, thought: str, answer: str | None
) -> None:
    content = read({"messages": [ASKED, {"role": "assistant", "content": text}], "tools": [TOOL]})
    assert (content.turns[-1].reasoning, content.turns[-1].text) == (thought, answer or text)


def test_a_call_as_text_that_cannot_be_read_is_never_an_answer() -> None:
    for text in (
        '<tool_call>{"name": "ping", "argu',
        '<tool_call>{"name": "bob", "arguments": {}}</tool_call>',
        'Write {"name": "tide", "arguments": {}} for that.',
        "result = tide('Oslo')",
        "tide {'tool_calls': [{1, 2}]}",
        "<use><name>tide</name></use>",
        "ping()",
        "I look it up:\n`ping()`",
        "So I ask: ping()",
        "```python\nping()\n```",
        'tide {"city": "Os',
    ):
        tools = [TOOL, {"name": "ping", "parameters": {}}]
        content = read({"messages": [ASKED, {"role": "assistant", "content": text}], "tools": tools})
        assert content.error and content.error.reason == "call-as-text" and len(content.turns) == 1


def test_ids_weights_errors_and_several_system_messages_are_kept() -> None:
    messages = [
        {"role": "system", "content": "One."},
        {"role": "system", "content": "Two."},
        ASKED,
        {"role": "assistant", "content": "No idea.", "weight": 0},
        ASKED,
        CALLED,
        {"role": "tool", "tool_call_id": "c1", "content": '{"content": [], "isError": true}'},
        {"role": "system", "content": "Be quick."},
        DONE[1],
    ]
    content = read({"messages": messages, "tools": [TOOL], "system": "Zero."})
    assert [turn.text for turn in content.turns if turn.role == SYSTEM] == [
        "Zero.",
        "One.",
        "Two.",
        "Be quick.",
    ]
    assert [turn.trained for turn in content.turns if turn.role == ANSWER] == [False, True]
    (result,) = [turn for turn in content.turns if turn.role == RESULT]
    assert result.failed and result.ids == ("c1",)


@pytest.mark.parametrize(
    ("written", "kind"),
    [
        ("Optional[str]", "string"),
        ("Dict[str, int]", "object"),
        ("float, optional", "number"),
        ("Tuple[int, int]", "array"),
        ("string", "string"),
        ("STRING", "string"),
        ("dict", "object"),
        ("Callable[[float], float]", None),
        ("Union[int, str]", None),
        (None, None),
    ],
)
def test_types_get_json_schemas_names(written: str | None, kind: str | None) -> None:
    for schema in ({"p": {"type": written}}, {"type": "object", "properties": {"p": {"type": written}}}):
        assert schema_of(schema)["properties"]["p"].get("type") == kind


def test_flat_parameters_become_a_schema_and_nulls_of_a_table_go() -> None:
    flat = {
        "customer": {"type": "str"},
        "limit": {"type": "int", "default": 10},
        "tags": {"type": "list, optional"},
    }
    assert schema_of(flat) == {
        "type": "object",
        "properties": {
            "customer": {"type": "string"},
            "limit": {"type": "integer", "default": 10},
            "tags": {"type": "array"},
        },
        "required": ["customer"],
    }
    table = {
        "type": "object",
        "properties": {"a": {"type": "string", "enum": None, "default": None}, "b": None},
    }
    assert schema_of(table)["properties"] == {"a": {"type": "string"}}


def of(shape: str) -> list[Content | RowError]:
    (file,) = (SHAPES / "rows").glob(f"{shape}.*")
    found: list[Content | RowError] = []
    for row in files.read(file):
        assert formats.recognise(row) == shape
        try:
            content = read(row, file.stem)
            found.append(content.error if content.error and len(content.turns) < 2 else content)
        except RowError as error:
            found.append(error)
    return found


def test_rows_of_mcp_flow() -> None:
    first = of("filtered")[0]
    assert isinstance(first, Content) and [(tool.server, tool.name) for tool in first.tools] == [
        ("office", "calculate")
    ]
    search, clock, missing = of("function_call")
    assert isinstance(search, Content) and isinstance(clock, Content)
    assert [tool.server for tool in search.tools + clock.tools] == ["web", "office"]
    assert (
        isinstance(missing, RowError) and missing.reason == "not-in-catalogue" and "translate" in str(missing)
    )
    flow = of("mcp_flow_test")[0]
    assert isinstance(flow, Content)
    assert flow.turns[1].calls == (ToolCall("calculate", {"expression": "19 + 21 + 44"}),)
    assert [(tool.server, tool.name) for tool in flow.tools] == [
        ("office", "calculate"),
        ("office", "get_time"),
    ]


def test_a_literal_is_never_run() -> None:
    messages = [ASKED, {"role": "tool_call", "content": "__import__('os').abort()"}]
    content = read({"messages": messages, "tools": [TOOL]})
    assert content.error and "neither JSON nor a Python literal" in str(content.error)


def test_the_same_rows_from_parquet_whose_decimals_are_numbers(tmp_path: Path) -> None:
    source = json.loads((SHAPES / "rows/toucan.json").read_text(encoding="utf-8"))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(source), tmp_path / "toucan.parquet")
    again = [read(row).turns for row in list(files.read(tmp_path / "toucan.parquet"))[:2]]
    assert again == [content.turns for content in of("toucan")[:2] if isinstance(content, Content)]
    from decimal import Decimal

    table = pyarrow.Table.from_pylist([{"a": Decimal("2.50"), "b": [Decimal("3")]}])
    pyarrow.parquet.write_table(table, tmp_path / "decimals.parquet")
    assert list(files.read(tmp_path / "decimals.parquet")) == [{"a": 2.5, "b": [3]}]


def test_results_in_parts_of_a_tools_message_and_questions_in_json(tmp_path: Path) -> None:
    part = {"type": "tool_call_response", "id": "c1", "response": "2 m"}
    for parts in ([part], [{"functionResponse": {"name": "tide", "response": {"result": "2 m"}}}]):
        record = {"messages": [ASKED, CALLED, {"role": "tool", "parts": parts}], "tools": [TOOL]}
        assert read(record).turns[-1].text == "2 m"
    for question in ('{"alarm": "on"}', "{one} or {two}", "[1, 2]"):
        turns = read({"instruction": question, "function_call": NAMED, "tools": [TOOL]}).turns
        assert (turns[0].role, turns[0].text) == (USER, question)


@pytest.mark.parametrize(
    ("row", "reason", "says"),
    [
        ("text", "unknown-format", "not str"),
        ({"a": 1}, "unknown-format", "keys a;"),
        ({"name": "t", "description": "d"}, "unknown-format", "--tools"),
        ({"messages": [{"human": "x"}], "tools": [TOOL]}, "bad-message", "keys human"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "bad-message", "type image"),
        ({"messages": [{"role": "user", "content": 3}]}, "bad-message", "int"),
        ({"messages": OPENAI, "tools": [{"parameters": {}}]}, "no-tool", "no name"),
        ({"messages": OPENAI, "tools": [{"name": "t", "parameters": 3}]}, "no-schema", "t has no"),
        ({"messages": OPENAI, "tools": "[{"}, "no-tool", "not JSON"),
    ],
)
def test_what_cannot_be_read_says_why(row: Any, reason: str, says: str) -> None:
    with pytest.raises(RowError, match=says) as caught:
        read(row)
    assert caught.value.reason == reason


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        ({"function": {"arguments": "{}"}}, "no-call"),
        ({"name": "tide", "arguments": "{"}, "bad-json"),
        ({"name": "tide", "arguments": [1]}, "bad-arguments"),
        ({"type": "custom", "custom": {"name": "tide", "input": "x"}}, "custom-call"),
    ],
)
def test_a_call_that_cannot_be_read_ends_the_conversation(call: Any, reason: str) -> None:
    content = read(
        {"messages": [*OPENAI, ASKED, {"role": "assistant", "tool_calls": [call]}], "tools": [TOOL]}
    )
    assert len(content.turns) == 5 and content.error and content.error.reason == reason


@pytest.mark.parametrize("given", [None, "", "{}", {}, '"{}"'])
def test_no_arguments_are_written_in_many_ways(given: Any) -> None:
    call = {"name": "tide"} | ({} if given is None else {"arguments": given})
    record = {"messages": [ASKED, {"role": "assistant", "tool_calls": [call]}], "tools": [TOOL]}
    assert read(record).turns[-1] == Turn(CALL, "", (ToolCall("tide", {}),), ("",))


def test_a_tool_without_properties_gets_an_empty_set() -> None:
    content = read(RECORDS["filtered"] | {"tool_info": {"tool_name": "tide", "input_schema": {}}})
    assert content.tools == [Tool("sea", "tide", "", {"type": "object", "properties": {}})]


JUNK: list[Any] = [
    None,
    3,
    "",
    [],
    {},
    "text",
    [[]],
    [None],
    True,
    1.5,
    "[",
    "[]",
    {"type": 3},
    {"name": ["x"]},
]


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) in a value."""
    keys = value.keys() if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    return [one for key in keys for one in ((value, key), *places(value[key]))]


def test_rows_of_every_form_with_anything_wrong_in_them_end_in_one_place(tmp_path: Path) -> None:
    chosen = random.Random(3)
    rows = []
    for record in [*RECORDS.values()] * 40:
        row = json.loads(json.dumps(record))
        for container, key in chosen.sample(places(row), 2):
            if isinstance(container, dict) and chosen.random() < 0.3:
                container.pop(key, None)
            elif isinstance(container, dict) or key < len(container):
                container[key] = chosen.choice(JUNK)
        rows.append(row)
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    for turns in ("call", "all", "each"):
        stats = conversion.convert(conversion.Settings([str(source)], turns=turns), tmp_path / "out")
        assert stats.read == sum(stats.written.values()) + sum(stats.rejected.values()) >= len(rows) / 2
        assert min(sum(stats.written.values()), sum(stats.rejected.values())) > 50


CASES = ROOT.parent / "shared/cases"
# Rows whose outcome is noted for other arguments than they hold.
MISTAKEN = ("tools_in_system_message", "toolace", "langsmith_run")
needs_cases = pytest.mark.skipif(not CASES.is_dir(), reason="the cases are not here")


def converted(row: Any, folder: Path, tools: list[str], turns: str) -> dict[str, Any] | None:
    source = folder / "row.jsonl"
    source.write_text(json.dumps(row) + "\n", encoding="utf-8")
    settings = conversion.Settings([str(source)], tools, turns=turns, test=0.0)
    try:
        conversion.convert(settings, folder / "out")
    except McpLoraError as error:
        assert "no usable row" in str(error)
        return None
    (sample,) = dataset.samples(folder / "out", "train")
    return sample


@needs_cases
def test_the_shared_cases_come_out_right(tmp_path: Path) -> None:
    for number, line in enumerate((CASES / "rows.jsonl").read_text(encoding="utf-8").splitlines()):
        case = json.loads(line)
        name, right = case["case"], case["right"]
        folder = tmp_path / str(number)
        folder.mkdir()
        sample = converted(case["row"], folder, [], "all" if "results" in right else "call")
        if "rejected" in right:
            assert sample is None, name
            continue
        assert sample, name
        messages = sample["messages"]
        calling = next((message for message in messages if "tool_calls" in message), {})
        calls = [
            {"name": call["function"]["name"], "arguments": json.loads(call["function"]["arguments"])}
            for call in calling.get("tool_calls", [])
        ]
        assert bool(calls) != right.get("no_call", False), name
        if right.get("calls") and name not in MISTAKEN:
            assert calls == right["calls"], name
        assert calling.get("reasoning_content") == right.get("reasoning", calling.get("reasoning_content")), (
            name
        )
        assert calling.get("content") == right.get("content", calling.get("content")), name
        system = "\n".join(message["content"] for message in messages if message["role"] == "system")
        assert system == right.get("system", system), name
        assert all(text in system for text in right.get("system_has", [])), name
        results = [message["content"] for message in messages if message["role"] == "tool"]
        assert results == right.get("results", results), name


@needs_cases
def test_the_shared_catalogues_are_read(tmp_path: Path) -> None:
    (row,) = files.read(CASES / "catalogues/rows.jsonl")
    for file in sorted((CASES / "catalogues").glob("*.json")):
        folder = tmp_path / file.stem
        folder.mkdir()
        sample = converted(row, folder, [str(file)], "call")
        assert sample and [tool["function"]["name"] for tool in sample["tools"]] == ["lamp_on"], file.name
        assert sample["tools"][0]["function"]["parameters"]["properties"] == {"room": {"type": "string"}}


@pytest.mark.skipif(not SHARED.is_dir(), reason="the third-party data is not here")
def test_real_files_are_read_to_the_last_row() -> None:
    counts = {
        file.name: sum(bool(read(row).turns) for row in files.read(file))
        for file in (SHARED / "filtered").glob("*.json")
    }
    assert counts == {"filtered_20251113_175326.json": 5, "模板.json": 1}
