r"""Read the shapes of tool-call data that users have: one small function a shape.

A shape is known by its keys. What each reads, as published:

filtered (MCP-Flow, the main input; `tool_response` and `final_response` are not read):
    {"instruction": "What is 128 * 46?",
     "server_info": {"server_name": "calculator", "server_description": "Evaluates arithmetic"},
     "tool_info": {"tool_name": "calculate", "tool_description": "Evaluates the expression",
                   "input_schema": {"type": "object",
                                    "properties": {"expression": {"type": "string"}}}},
     "function_call": {"name": "calculate", "arguments": {"expression": "128 * 46"}},
     "tool_response": {"content": "{\"text\": \"5888\"}"},
     "final_response": "128 * 46 is 5888."}
function_call (MCP-Flow; the schema is in a catalogue):
    {"source_instruction": "What is 128 * 46?", "tool": "calculate",
     "function_call": {"name": "calculate", "arguments": {"expression": "128 * 46"}}}
trajectory (MCP-Flow; a row is a list, `tool_calls` is one call, the schema is in a catalogue):
    [{"role": "user", "content": "What is 128 * 46?"},
     {"role": "assistant", "content": "", "tool_calls": {"type": "function", "function":
         {"name": "calculate", "arguments": {"expression": "128 * 46"}}}},
     {"role": "tool", "tool_call_id": 0, "name": "calculate",
      "content": "{\"content\": [{\"type\": \"text\", \"text\": \"5888\"}]}"}]
mcp_flow_test (MCP-Flow's test files):
    {"instruction": "What is 128 * 46?", "server_name": "calculator", "tool_name": "calculate",
     "function_call": "{\"name\": \"calculate\", \"arguments\": {…}}", "tools": "[…]",
     "conversations": […]}
openai:
    {"messages": [{"role": "user", "content": "What is 128 * 46?"},
                  {"role": "assistant", "tool_calls": [{"id": "1", "type": "function", "function":
                      {"name": "calculate", "arguments": "{\"expression\": \"128 * 46\"}"}}]},
                  {"role": "tool", "tool_call_id": "1", "content": "5888"}],
     "tools": [{"type": "function", "function": {"name": "calculate", "parameters": {…}}}]}
sharegpt (Hermes writes calls as <tool_call>{…}</tool_call> in a `gpt` turn):
    {"conversations": [{"from": "human", "value": "What is 128 * 46?"},
                       {"from": "function_call", "value": "{\"name\": \"calculate\", …}"},
                       {"from": "observation", "value": "5888"}],
     "tools": "[{\"name\": \"calculate\", …}]", "system": "…"}
xlam (parameters are a flat map):
    {"id": 1, "query": "What is 128 * 46?",
     "tools": "[{\"name\": \"calculate\", \"parameters\": {\"expression\": {\"type\": \"str\"}}}]",
     "answers": "[{\"name\": \"calculate\", \"arguments\": {\"expression\": \"128 * 46\"}}]"}
toucan (a `tool_call` is a Python literal, parallel ones follow each other):
    {"uuid": "1", "subset_name": "single-turn-original", "question": "What is 128 * 46?",
     "target_tools": "calculate", "tools": "[…]", "messages":
         "[{\"role\": \"tool_call\", \"content\": \"{'name': 'calculate', 'arguments': '{…}'}\"}]"}
toolmind (arguments are a string or an object):
    {"conversations": [{"role": "user", "content": "What is 128 * 46?"},
                       {"role": "assistant", "tool_calls": [{"function": {…}}]}], "tools": […]}
"""

import ast
import contextlib
import json
import re
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

from mcp_lora.catalogue import tool_of
from mcp_lora.errors import McpLoraError
from mcp_lora.records import ANSWER, CALL, RESULT, USER, Content, Fault, Tool, ToolCall, Turn

FILTERED_FOLDER = Path("data/filtered")
FILTERED = "filtered_*.json"
SAMPLE = "filtered_sample.json"

Find = Callable[[str], Tool]  # from the catalogue, by name

_SYSTEM = "system"
_NAMES = {
    _SYSTEM: ("system", "developer"),
    USER: ("user", "human"),
    ANSWER: ("assistant", "gpt"),
    CALL: ("tool_call", "function_call"),
    RESULT: ("tool", "function", "observation", "tool_response", "ipython"),
}
_ROLES = {name: role for role, names in _NAMES.items() for name in names}


def newest_filtered(folder: Path = FILTERED_FOLDER) -> Path:
    """Return the newest `filtered_*.json` of `folder`, or raise McpLoraError.

    The date in the name (`filtered_20251113_175326.json`) counts, and the file's own where the
    name has none: copying and cloning change the file's. The shipped sample comes last.
    """

    def age(file: Path) -> tuple[bool, str, str]:
        named = re.search(r"\d{8}_\d{6}", file.name)
        written = datetime.fromtimestamp(file.stat().st_mtime).strftime("%Y%m%d_%H%M%S")
        return file.name != SAMPLE, named.group() if named else written, file.name

    newest = max(folder.glob(FILTERED), key=age, default=None)
    if not newest:
        raise McpLoraError(
            f"no filtered_*.json in {folder}: put your data there, or name it: mcp-lora convert FILE"
        )
    return newest


# A record is of the first shape whose keys it has.
_KEYS: list[tuple[set[str], str]] = [
    ({"tool_info"}, "filtered"),
    ({"instruction", "server_info"}, "filtered"),
    ({"source_instruction"}, "function_call"),
    ({"instruction", "tool_name", "tools"}, "mcp_flow_test"),
    ({"query", "answers"}, "xlam"),
    ({"messages", "question"}, "toucan"),
    ({"messages"}, "openai"),
    ({"conversations"}, "sharegpt"),
    ({"instruction", "function_call"}, "filtered"),
]


def recognise(record: Any) -> str | None:
    """Return the name of a record's shape by its keys, None for none that we know."""
    if not isinstance(record, dict):
        return "trajectory" if isinstance(record, list) else None
    shape = next((shape for keys, shape in _KEYS if keys <= record.keys()), None)
    if shape == "sharegpt":
        turns = record["conversations"]
        first = turns[0] if isinstance(turns, list) and turns else None
        return "toolmind" if isinstance(first, dict) and "role" in first else shape
    return shape


def read(record: Any, shape: str | None, find: Find) -> Content:
    """Return what a record of a shape, a name of SHAPES or None, holds.

    Raises:
        Fault: it cannot be used.
    """
    if shape == "trajectory" or (shape and isinstance(record, dict)):
        return SHAPES[shape](record, find)
    if not isinstance(record, dict):
        what = f"a row is an object or a list of messages, not {type(record).__name__}"
    elif "tools" in record or {"name", "description"} <= record.keys():
        what = "a tool catalogue, which holds no call: give it with --tools"
    else:
        what = f"no known shape has these keys: {', '.join(map(str, record)) or 'none'}"
    raise Fault("unknown-shape", what)


def _filtered(row: Any, find: Find) -> Content:
    info, server = row.get("tool_info"), row.get("server_info")
    if not isinstance(info, dict):
        raise Fault("no-tool", "tool_info is missing")
    name = (server.get("server_name") if isinstance(server, dict) else None) or ""
    item = {"name": info.get("tool_name"), "description": info.get("tool_description")}
    tool = tool_of(str(name), item | {"parameters": info.get("input_schema")})
    return _asked(row, "instruction", row.get("function_call"), [tool])


def _trajectory(record: Any, find: Find) -> Content:
    content = _messages(record)
    content.turns = [
        turn._replace(text=_mcp_text(turn.text)) if turn.role == RESULT else turn for turn in content.turns
    ]
    return _with_tools(content, find)


def _mcp_flow_test(row: Any, find: Find) -> Content:
    server = row.get("server_name")
    tools = _tools(row.get("tools"), server if isinstance(server, str) else "")
    return _asked(row, "instruction", _json(row.get("function_call")), tools)


def _xlam(row: Any, find: Find) -> Content:
    tools = [
        tool | {"parameters": _flat_schema(tool["parameters"])}
        if isinstance(tool, dict) and isinstance(tool.get("parameters"), dict)
        else tool
        for tool in _list(row.get("tools"), "tools")
    ]
    return _asked(row, "query", _list(row.get("answers"), "answers"), _tools(tools))


SHAPES: dict[str, Callable[[Any, Find], Content]] = {
    "filtered": _filtered,
    "function_call": lambda row, find: _with_tools(
        _asked(row, "source_instruction", row.get("function_call")), find
    ),
    "trajectory": _trajectory,
    "mcp_flow_test": _mcp_flow_test,
    "openai": lambda row, find: _chat(row.get("messages"), row),
    "sharegpt": lambda row, find: _chat(row.get("conversations"), row),
    "xlam": _xlam,
    "toucan": lambda row, find: _chat(_json(row.get("messages")), row),
    "toolmind": lambda row, find: _chat(row.get("conversations"), row),
}


def _asked(row: dict[str, Any], question: str, calls: Any, tools: list[Tool] | None = None) -> Content:
    """Read a question and the call, or the parallel calls, that answer it."""
    text = row.get(question)
    if not isinstance(text, str):
        raise Fault("no-instruction", f"{question} is missing, or no text")
    return Content([Turn(USER, text), _call(calls)], tools or [])


def _chat(messages: Any, row: dict[str, Any]) -> Content:
    """Read a conversation, and the tools and the system message that stand beside it."""
    content = _messages(messages)
    content.tools = _tools(row.get("tools") or row.get("functions"))
    if isinstance(row.get("system"), str):
        content.system = row["system"] or content.system
    return content


def _with_tools(content: Content, find: Find) -> Content:
    names = dict.fromkeys(call.name for turn in content.turns for call in turn.calls)
    if not names:
        raise Fault("no-call", "the conversation calls no tool, and names none")
    content.tools = [find(name) for name in names]
    return content


def _messages(value: Any) -> Content:
    """Read a list of messages, {role, content, tool_calls} or {from, value}."""
    if not isinstance(value, list):
        raise Fault("bad-message", "messages is no list")
    content = Content([])
    for message in value:
        if not isinstance(message, dict):
            raise Fault("bad-message", "a message is no object")
        role = message.get("role", message.get("from"))
        text = _plain(message.get("content", message.get("value")))
        kind = _ROLES.get(role) if isinstance(role, str) else None
        if kind is None:
            raise Fault("bad-message", f"a message has the role {role!r}, which is not known")
        if kind == _SYSTEM:
            content.system = text
        elif kind == USER:
            content.turns.append(Turn(USER, text))
        elif kind == RESULT:
            given = _id(message.get("tool_call_id"))
            parts = _TOOL_RESPONSE.findall(text) or [text]
            content.turns += [Turn(RESULT, part, ids=(given,) if given else ()) for part in parts]
        else:
            content.turns.append(_answer(message, text, kind))
    return content


_TOOL_CALL = re.compile(r"<tool_call>\s*(.*?)\s*</tool_call>", re.DOTALL)
_TOOL_RESPONSE = re.compile(r"<tool_response>\s*(.*?)\s*</tool_response>", re.DOTALL)


def _answer(message: dict[str, Any], text: str, kind: str) -> Turn:
    """Read what an assistant says, calls, or both."""
    calls = message.get("tool_calls") or message.get("function_call")
    if kind == CALL:
        calls, text = _literal(text), ""
    elif not calls and "<tool_call>" in text:
        calls = [_literal(found) for found in _TOOL_CALL.findall(text)]
        text = _TOOL_CALL.sub("", text)
    reasoning = message.get("reasoning_content")
    reasoning = reasoning if isinstance(reasoning, str) else ""
    if calls or kind == CALL:
        return _call(calls)._replace(text=text.strip(), reasoning=reasoning)
    if "<functioncall>" in text:
        raise Fault("no-call", "the calls are written as <functioncall> text, which cannot be read")
    return Turn(ANSWER, text, reasoning=reasoning)


def _call(value: Any) -> Turn:
    """Read one call or several in parallel: {name, arguments}, or that in {function: …}."""
    calls, ids = [], []
    for item in value if isinstance(value, list) else [value]:
        ids.append(_id(item.get("id")) if isinstance(item, dict) else "")
        if isinstance(item, dict) and isinstance(item.get("function"), dict):
            item = item["function"]
        if not isinstance(item, dict) or not isinstance(name := item.get("name"), str) or not name:
            raise Fault("no-call", "a call has no name, or there is none")
        arguments = item.get("arguments")
        if isinstance(arguments, str):
            arguments = _json(arguments) if arguments.strip() else {}
        if not isinstance(arguments, dict):
            raise Fault("bad-arguments", f"the arguments of {name} are no JSON object")
        calls.append(ToolCall(name, arguments))
    if not calls:
        raise Fault("no-call", "the list of calls is empty")
    return Turn(CALL, "", tuple(calls), tuple(ids))


def _id(value: Any) -> str:
    """Return a call's id; empty for what is no text, or holds half a surrogate pair."""
    return value if isinstance(value, str) and value.isprintable() else ""


def _tools(value: Any, server: str = "") -> list[Tool]:
    """Read a list of tools, or the JSON of one; the first of a name counts."""
    found: dict[str, Tool] = {}
    for item in _list(value or [], "tools"):
        tool = tool_of(server, item, {})  # OpenAI lets a tool without parameters leave them out
        found.setdefault(tool.name, tool)
    return list(found.values())


# xLAM's parameter types are Python's.
_PYTHON_TYPES = {"str": "string", "int": "integer", "float": "number", "bool": "boolean", "dict": "object"}
_PYTHON_TYPES |= dict.fromkeys(("list", "tuple", "set"), "array")


def _flat_schema(parameters: dict[str, Any]) -> dict[str, Any]:
    """Turn xLAM's flat map, {"limit": {"type": "int, optional", "default": 10}}, into JSON Schema."""
    if parameters.get("type") == "object" and "properties" in parameters:
        return parameters
    properties, required = {}, []
    for name, parameter in parameters.items():
        if not isinstance(parameter, dict):
            raise Fault("no-schema", f"the parameter {name} is no object")
        words = parameter["type"] if isinstance(parameter.get("type"), str) else ""
        base = re.sub(r"^Optional\[(.*)\]$", r"\1", words.split(",")[0].strip())
        kind = _PYTHON_TYPES.get(re.split(r"[\[ (]", base)[0].lower())
        if words in _PYTHON_TYPES.values():
            kind = words
        rest = {key: item for key, item in parameter.items() if key != "type"}
        properties[name] = {"type": kind} | rest if kind else rest
        if "optional" not in words.lower() and "default" not in parameter:
            required.append(name)
    return {"type": "object", "properties": properties, "required": required}


def _mcp_text(text: str) -> str:
    """Return the text of an MCP result, {"content": [{"type": "text", "text": "5888"}]}."""
    try:
        texts = [part["text"] for part in json.loads(text)["content"] if part["type"] == "text"]
        return "\n".join(texts) if texts else text
    except (ValueError, TypeError, LookupError, RecursionError):
        return text


def _plain(value: Any) -> str:
    """Return a message's content, which may come in parts: [{"type": "text", "text": "…"}]."""
    if isinstance(value, list):
        texts = [part.get("text") for part in value if isinstance(part, dict)]
        if len(texts) == len(value) and all(isinstance(text, str) for text in texts):
            return "\n".join(map(str, texts))
    if value is not None and not isinstance(value, str):
        raise Fault("bad-message", "a message's content is no text")
    return value or ""


def _list(value: Any, what: str) -> list[Any]:
    value = _json(value)
    if not isinstance(value, list):
        raise Fault(f"no-{what}", f"{what} is no list")
    return value


def _json(value: Any) -> Any:
    """Return what a string of JSON holds, and anything else as it is."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        raise Fault("bad-json", f"a field is no JSON: {value[:80]}") from None


def _literal(text: str) -> Any:
    """Return what JSON, or a Python literal as Toucan writes it, holds."""
    with contextlib.suppress(ValueError, RecursionError):
        return json.loads(text)
    try:
        return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        raise Fault("bad-json", f"a call is neither JSON nor a Python literal: {text[:80]}") from None
