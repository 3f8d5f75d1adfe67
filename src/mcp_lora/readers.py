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
import json
import re
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from mcp_lora import files
from mcp_lora.catalogue import Catalogue, new_tool, tool_of
from mcp_lora.errors import McpLoraError
from mcp_lora.records import (
    ANSWER,
    CALL,
    RESULT,
    USER,
    Content,
    Fault,
    Origin,
    Rejected,
    Tool,
    ToolCall,
    Turn,
)

FILTERED_FOLDER = Path("data/filtered")
FILTERED = "filtered_*.json"
SAMPLE = "filtered_sample.json"

_ROLES = {
    "user": USER,
    "human": USER,
    "assistant": ANSWER,
    "gpt": ANSWER,
    "tool_call": CALL,
    "function_call": CALL,
    "tool": RESULT,
    "function": RESULT,
    "observation": RESULT,
    "tool_response": RESULT,
    "ipython": RESULT,
}


def newest_filtered(folder: Path = FILTERED_FOLDER) -> Path:
    """Return the newest `filtered_*.json` of `folder`.

    The date in the name (`filtered_20251113_175326.json`) counts, and the file's own where the
    name has none: copying and cloning change the file's. The shipped sample comes last.

    Raises:
        McpLoraError: the folder holds no such file.
    """
    found = list(folder.glob(FILTERED))
    if not found:
        raise McpLoraError(
            f"no filtered_*.json in {folder}: put your data there, or name it: mcp-lora convert FILE"
        )

    def age(file: Path) -> tuple[bool, str, str]:
        named = re.search(r"\d{8}_\d{6}", file.name)
        written = datetime.fromtimestamp(file.stat().st_mtime).strftime("%Y%m%d_%H%M%S")
        return file.name != SAMPLE, named.group() if named else written, file.name

    return max(found, key=age)


def read(
    file: Path,
    catalogue: Catalogue,
    shape: str | None = None,
    progress: files.Progress = lambda done: None,
) -> Iterator[tuple[Origin, Content | Rejected]]:
    """Yield every row of a file with what it holds, or with what is wrong.

    Args:
        file: see `mcp_lora.files`.
        catalogue: where the tools are whose schemas the rows lack.
        shape: a name of SHAPES; none means the one that each row's keys show.
        progress: told how many bytes have been read.
    """
    path = str(file)

    def find(tool: str) -> Tool:
        return catalogue.find(tool, file.stem)

    for number, record in enumerate(files.read(file, progress), start=1):
        if isinstance(record, files.Broken):
            origin = Origin(path, number, "?", record.text)
            yield origin, Rejected(origin, "not-json", record.sentence)
            continue
        name = shape or recognise(record)
        origin = Origin(path, number, name or "?", record)
        try:
            if not name:
                raise Fault("unknown-shape", _what_it_looks_like(record))
            yield origin, SHAPES[name](record, find)
        except Fault as fault:
            yield origin, Rejected(origin, fault.reason, fault.sentence)


def recognise(record: Any) -> str | None:
    """Return the name of a record's shape by its keys, None for none that we know."""
    if isinstance(record, list):
        return "trajectory"
    keys = set(record) if isinstance(record, dict) else set()
    if "tool_info" in keys or {"instruction", "server_info"} <= keys:
        return "filtered"
    if "source_instruction" in keys:
        return "function_call"
    if {"instruction", "tool_name", "tools"} <= keys:
        return "mcp_flow_test"
    if {"query", "answers"} <= keys:
        return "xlam"
    if "messages" in keys:
        return "toucan" if "question" in keys else "openai"
    if "conversations" in keys:
        turns = record["conversations"]
        first = turns[0] if isinstance(turns, list) and turns else None
        return "toolmind" if isinstance(first, dict) and "role" in first else "sharegpt"
    return "filtered" if {"instruction", "function_call"} <= keys else None


def _what_it_looks_like(record: Any) -> str:
    if not isinstance(record, dict):
        return f"a row is an object or a list of messages, not {type(record).__name__}"
    if "tools" in record or {"name", "description"} <= set(record):
        return "a tool catalogue, which holds no call: give it with --tools"
    return f"no known shape has these keys: {', '.join(map(str, record)) or 'none'}"


Find = Callable[[str], Tool]


def _filtered(record: Any, find: Find) -> Content:
    row = _object(record)
    info, server = row.get("tool_info"), row.get("server_info")
    if not isinstance(info, dict):
        raise Fault("no-tool", "tool_info is missing")
    tool = new_tool(
        (server.get("server_name") if isinstance(server, dict) else None) or "",
        info.get("tool_name"),
        info.get("tool_description"),
        info.get("input_schema"),
    )
    turns = [Turn(USER, _text(row.get("instruction"), "instruction"))]
    return Content([*turns, _call(row.get("function_call"))], [tool])


def _function_call(record: Any, find: Find) -> Content:
    row = _object(record)
    call = _call(row.get("function_call"))
    turns = [Turn(USER, _text(row.get("source_instruction"), "source_instruction")), call]
    return Content(turns, [find(item.name) for item in call.calls])


def _trajectory(record: Any, find: Find) -> Content:
    content = _messages(record)
    content.turns = [
        turn._replace(text=_mcp_text(turn.text)) if turn.role == RESULT else turn for turn in content.turns
    ]
    names = dict.fromkeys(call.name for turn in content.turns for call in turn.calls)
    if not names:
        raise Fault("no-call", "the conversation calls no tool, and names none")
    content.tools = [find(name) for name in names]
    return content


def _mcp_flow_test(record: Any, find: Find) -> Content:
    row = _object(record)
    server = row.get("server_name")
    tools = _tools(row.get("tools"), server if isinstance(server, str) else "")
    turns = [Turn(USER, _text(row.get("instruction"), "instruction"))]
    return Content([*turns, _call(_json(row.get("function_call")))], tools)


def _openai(record: Any, find: Find) -> Content:
    row = _object(record)
    content = _messages(row.get("messages"))
    content.tools = _tools(row.get("tools") or row.get("functions"))
    return content


def _sharegpt(record: Any, find: Find) -> Content:
    row = _object(record)
    content = _messages(row.get("conversations"))
    content.tools = _tools(row.get("tools"))
    if isinstance(row.get("system"), str) and row["system"]:
        content.system = row["system"]
    return content


def _xlam(record: Any, find: Find) -> Content:
    row = _object(record)
    tools = []
    for tool in _list(_json(row.get("tools")), "tools"):
        if isinstance(tool, dict) and isinstance(tool.get("parameters"), dict):
            tool = tool | {"parameters": _flat_schema(tool["parameters"])}
        tools.append(tool)
    answers = _list(_json(row.get("answers")), "answers")
    turns = [Turn(USER, _text(row.get("query"), "query")), _call(answers)]
    return Content(turns, _tools(tools))


def _toucan(record: Any, find: Find) -> Content:
    row = _object(record)
    content = _messages(_json(row.get("messages")))
    content.tools = _tools(row.get("tools"))
    return content


# The shapes and what reads each; toolmind is sharegpt under other keys, which _messages knows.
SHAPES: dict[str, Callable[[Any, Find], Content]] = {
    "filtered": _filtered,
    "function_call": _function_call,
    "trajectory": _trajectory,
    "mcp_flow_test": _mcp_flow_test,
    "openai": _openai,
    "sharegpt": _sharegpt,
    "xlam": _xlam,
    "toucan": _toucan,
    "toolmind": _sharegpt,
}


def _messages(value: Any) -> Content:
    """Read a list of messages, {role, content, tool_calls} or {from, value}, into turns."""
    content = Content([], [])
    for message in _list(value, "messages"):
        if not isinstance(message, dict):
            raise Fault("bad-message", "a message is no object")
        role = message.get("role", message.get("from"))
        text = _plain(message.get("content", message.get("value")))
        if role in ("system", "developer"):
            content.system = text
            continue
        kind = _ROLES.get(role) if isinstance(role, str) else None
        if kind is None:
            raise Fault("bad-message", f"a message has the role {role!r}, which is not known")
        calls = message.get("tool_calls") or message.get("function_call")
        if kind == ANSWER and not calls and "<tool_call>" in text:
            calls = [_literal(found) for found in _TOOL_CALL.findall(text)]
            text = _TOOL_CALL.sub("", text)
        reasoning = message.get("reasoning_content")
        reasoning = reasoning if isinstance(reasoning, str) else ""
        if kind == CALL:
            content.turns.append(_call(_literal(text))._replace(reasoning=reasoning))
        elif kind == ANSWER and calls:
            content.turns.append(_call(calls)._replace(text=text.strip(), reasoning=reasoning))
        elif kind == ANSWER and "<functioncall>" in text:
            raise Fault("no-call", "the calls are written as <functioncall> text, which cannot be read")
        elif kind == RESULT:
            given = _id(message.get("tool_call_id"))
            ids = (given,) if given else ()
            parts = _TOOL_RESPONSE.findall(text)
            content.turns += [Turn(RESULT, part, ids=ids) for part in parts or [text]]
        else:
            content.turns.append(Turn(kind, text, reasoning=reasoning if kind == ANSWER else ""))
    return content


_TOOL_CALL = re.compile(r"<tool_call>\s*(.*?)\s*</tool_call>", re.DOTALL)
_TOOL_RESPONSE = re.compile(r"<tool_response>\s*(.*?)\s*</tool_response>", re.DOTALL)


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
    """Read a list of tools, or the JSON of one: OpenAI's {type, function} or MCP's."""
    found: dict[str, Tool] = {}
    for item in _list(_json(value) if value else [], "tools"):
        if isinstance(item, dict) and isinstance(item.get("function"), dict):
            item = item["function"]
        if isinstance(item, dict) and not {"parameters", "inputSchema", "input_schema"} & set(item):
            item = item | {"parameters": {}}  # OpenAI lets a tool without parameters leave them out
        tool = tool_of(server, item)
        found.setdefault(tool.name, tool)
    return list(found.values())


# xLAM's parameter types are Python's.
_PYTHON_TYPES = {
    "str": "string",
    "int": "integer",
    "float": "number",
    "bool": "boolean",
    "list": "array",
    "tuple": "array",
    "set": "array",
    "dict": "object",
}


def _flat_schema(parameters: dict[str, Any]) -> dict[str, Any]:
    """Turn xLAM's flat map, {"limit": {"type": "int, optional", "default": 10}}, into JSON Schema."""
    if parameters.get("type") == "object" and "properties" in parameters:
        return parameters
    properties, required = {}, []
    for name, parameter in parameters.items():
        if not isinstance(parameter, dict):
            raise Fault("no-schema", f"the parameter {name} is no object")
        kind = parameter.get("type")
        words = kind if isinstance(kind, str) else ""
        base = re.sub(r"^Optional\[(.*)\]$", r"\1", words.split(",")[0].strip())
        plain = _PYTHON_TYPES.get(re.split(r"[\[ (]", base)[0].lower())
        properties[name] = {key: item for key, item in parameter.items() if key != "type"}
        if plain or kind in ("string", "integer", "number", "boolean", "array", "object"):
            properties[name] = {"type": plain or kind} | properties[name]
        if "optional" not in words.lower() and "default" not in parameter:
            required.append(name)
    return {"type": "object", "properties": properties, "required": required}


def _mcp_text(text: str) -> str:
    """Return the text of an MCP result, {"content": [{"type": "text", "text": "5888"}]}."""
    try:
        parts = json.loads(text)["content"]
        texts = [part["text"] for part in parts if part["type"] == "text"]
        return "\n".join(texts) if texts else text
    except (ValueError, TypeError, LookupError, RecursionError):
        return text


def _object(record: Any) -> dict[str, Any]:
    if not isinstance(record, dict):
        raise Fault("unknown-shape", f"the row is no object but {type(record).__name__}")
    return record


def _list(value: Any, what: str) -> Iterable[Any]:
    if not isinstance(value, list):
        raise Fault("bad-message" if what == "messages" else f"no-{what}", f"{what} is no list")
    return value


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise Fault("no-instruction", f"{what} is missing, or no text")
    return value


def _plain(value: Any) -> str:
    """Return a message's content, which may come in parts: [{"type": "text", "text": "…"}]."""
    if isinstance(value, list):
        texts = [part.get("text") for part in value if isinstance(part, dict)]
        if len(texts) == len(value) and all(isinstance(text, str) for text in texts):
            return "\n".join(map(str, texts))
    if value is not None and not isinstance(value, str):
        raise Fault("bad-message", "a message's content is no text")
    return value or ""


def _json(value: Any) -> Any:
    """Return what a string of JSON holds, and anything else as it is."""
    if isinstance(value, str):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            raise Fault("bad-json", f"a field is no JSON: {value[:80]}") from None
    return value


def _literal(text: str) -> Any:
    """Return what JSON, or a Python literal as Toucan writes it, holds."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    try:
        return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        raise Fault("bad-json", f"a call is neither JSON nor a Python literal: {text[:80]}") from None
