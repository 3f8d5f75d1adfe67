r"""Read tool-call data of any published or logged format: names are mapped first, then all share one path.

Four things are looked up in a record, each under any of its names: the history (messages, conversations,
contents, input, …), the answer (completion, response, outputs, …) or the gold calls (function_call, answers,
ground_truth), the tools, and the system message. A message has a role and a content, which is a text or a
list of parts; a part is a text, a thought, a call or a result. In OpenAI's format:

    {"messages": [{"role": "user", "content": "What is 128 * 46?"},
                  {"role": "assistant", "tool_calls": [{"id": "1", "type": "function", "function":
                      {"name": "calculate", "arguments": "{\"expression\": \"128 * 46\"}"}}]},
                  {"role": "tool", "tool_call_id": "1", "content": "5888"}],
     "tools": [{"type": "function", "function": {"name": "calculate", "parameters": {…}}}]}

FORMATS names the formats for the statistics; docs/data.md shows a record of each. To support other names,
add them to the tables below.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from mcp_lora.data import text_calls
from mcp_lora.data.calls import arguments_of, split_thought
from mcp_lora.data.records import (
    ANSWER,
    ARGUMENTS,
    CALL,
    NAMES,
    RESULT,
    SYSTEM,
    USER,
    Content,
    RowError,
    Tool,
    ToolCall,
    Turn,
    first,
    literal,
)
from mcp_lora.data.tools import tools_in

# The formats by the keys that identify them; the first match counts.
FORMATS: dict[str, set[str]] = {
    "filtered": {"tool_info"},
    "function_call": {"source_instruction"},
    "mcp_flow_test": {"instruction", "tool_name", "tools"},
    "xlam": {"query", "answers"},
    "bfcl": {"question", "function"},
    "toucan": {"messages", "question"},
    "glaive": {"chat"},
    "gemini": {"contents"},
    "otel": {"gen_ai.input.messages"},
    "otel-span": {"attributes"},
    "nemo-gym": {"responses_create_params"},
    "tau-bench": {"traj"},
    "batch-request": {"body"},
    "alpaca": {"instruction", "output"},
    "responses": {"input", "output"},
    "langsmith": {"inputs", "outputs"},
    "request-log": {"request", "response"},
    "trl": {"prompt", "completion"},
    "trl-preference": {"prompt", "chosen"},
    "sharegpt": {"conversations"},
    "openai": {"messages"},
}


def _names(names: str) -> tuple[str, ...]:
    return tuple(names.split())


# The names of a record's parts in all formats; the first name that is present counts.
_WRAPPERS = _names(
    "attributes request body input inputs data extra invocation_params optional_params toolConfig "
    "responses_create_params"
)
_QUESTIONS = _names("instruction source_instruction query question")
_HISTORY = _names("messages conversations conversation contents traj trajectory trace dialog chat prompt")
_HISTORY += ("gen_ai.input.messages", *_QUESTIONS, "input")
_ANSWERS = _names("completion output outputs response gen_ai.output.messages choices message chosen")
_GOLD = _names("function_call answers ground_truth tool_calls expected_tool_calls expected_calls")
_TOOLS = _names("tools functions function available_tools tool_defs tool_definitions tool_info")
_TOOLS += ("gen_ai.tool.definitions",)
_SYSTEMS = _names("system system_prompt systemInstruction system_instruction instructions")
_SYSTEMS += ("gen_ai.system_instructions",)
# What shows a line of a session log: a key in Claude Code's, the type in Codex's.
_CLAUDE_CODE = {"sessionId", "leafUuid"}
_CODEX = ("session_meta", "turn_context", "event_msg", "response_item", "compacted")
# The names in a message and its parts.
_ROLES = {
    SYSTEM: "system developer systemmessage systemprompt",
    USER: "user human humanmessage question",
    ANSWER: "answer assistant gpt ai aimessage aimessagechunk model bot chatbot agent chatgpt reasoning",
    CALL: "toolcall toolcalls functioncall",
    RESULT: "tool function observation toolresponse toolresult ipython toolmessage functionmessage "
    "environment functioncalloutput functionresponse",
}
_ROLE_OF = {name: role for role, names in _ROLES.items() for name in names.split()}
# The kind of a part by its plain name (see `_plain`): mcp_tool_use, tool-call, toolResult.
_KINDS = {
    "thought": re.compile(r"thinking|reasoning(text)?|summarytext|thought"),
    "result": re.compile(r".*(tool|function)(call)?(result|response|output)"),
    "call": re.compile(r".*(tooluse|toolcall|functioncall)"),
    "text": re.compile(r".*text|markdown|refusal"),
}
_GLAIVE = re.compile(r"(?:^|\n)\s*(USER|ASSISTANT|FUNCTION RESPONSE):")
_TOOL_RESPONSE = re.compile(r"<tool_response>\s*(.*?)\s*</tool_response>", re.DOTALL)
# The answer if no tool fits, by the question's script; kana before Han, as Japanese is written in both.
_REFUSAL = "None of the available tools can do this."
_REFUSALS = {
    r"[\u3040-\u30ff]": "利用できるツールでは、この依頼に対応できません。",
    r"[\uac00-\ud7af]": "사용할 수 있는 도구로는 이 요청을 처리할 수 없습니다.",
    r"[\u4e00-\u9fff]": "现有的工具都无法完成这个请求。",
    r"[\u0400-\u04ff]": "Ни один из доступных инструментов не может этого сделать.",
}
_REASONING = _names("reasoning_content reasoning thinking thought")
_RESULTS = _names("content output response result results value text")
_IDS = _names("tool_call_id tool_use_id toolUseId toolCallId call_id id")


def recognise(record: Any) -> str:
    """Return the name of a record's format by its keys, or `?` if it is unknown."""
    if isinstance(record, list):
        return "messages"
    keys = record.keys() if isinstance(record, dict) else set()
    return next((name for name, shown in FORMATS.items() if shown <= keys), "?")


def records(found: Iterable[Any]) -> Iterator[Any]:
    """Yield a file's records; the events of a session log, one per line, become one record per session.

    Messages outside a conversation form one record, and {"data": […]} contains records.
    """
    sessions: dict[str, list[Any]] = {}
    messages, events = [], []
    for record in found:
        if not isinstance(record, dict):
            yield record
        elif _is_event(record):
            if {"message", "payload"} & record.keys():
                sessions.setdefault(str(record.get("sessionId")), []).append(record)
            else:  # a summary, for instance
                events.append(record)
        elif record.keys() == {"data"} and isinstance(record["data"], list):
            yield from records(record["data"])
        elif _role(record) and {"content", "value", "tool_calls"} & record.keys():
            messages.append(record)
        else:
            yield record
    yield from sessions.values() if sessions else events
    if messages:
        yield messages


def is_session(record: Any) -> bool:
    """Tell whether a record consists of the events of a session log, or is one."""
    event = record[0] if isinstance(record, list) and record else record
    return isinstance(event, dict) and _is_event(event)


def _is_event(record: Mapping[str, Any]) -> bool:
    """Tell whether a record is a line of a session log, and no conversation with an id of its session."""
    is_line = "type" in record and (_CLAUDE_CODE & record.keys() or record["type"] in _CODEX)
    return bool(is_line) and not {*_HISTORY} & record.keys()


def read(record: Any, find: Callable[[str], Tool]) -> Content:
    """Return the conversation and the tools in a record.

    A message that cannot be read ends the conversation and becomes its `error`; the rest may be usable.

    Args:
        record: as it is in a file.
        find: returns a tool from the catalogues, for a record without tools.

    Raises RowError if it contains no conversation, or a tool is in no catalogue.
    """
    record = {"messages": record} if isinstance(record, list) else _unwrapped(record)
    content = Content([])
    info = record.get("server_info")
    server = first(info, ("server_name", "name")) if isinstance(info, dict) else record.get("server_name")
    server = server if isinstance(server, str) else ""
    content.tools += tools_in(first(record, _TOOLS), server, content.cleaned)
    try:
        for message in _all_messages(record):
            content.turns += _turns(message, content)
    except RowError as error:
        if not content.turns:
            raise
        content.error = error
    if not content.tools:
        names = dict.fromkeys(call.name for turn in content.turns for call in turn.calls)
        content.tools = [find(name) for name in names]
    by_name: dict[str, Tool] = {}
    for tool in content.tools:
        by_name.setdefault(tool.name, tool)
    content.tools = list(by_name.values())
    return content


def refusal(question: str) -> str:
    """Return the answer that no candidate tool fits, in the question's language or else in English."""
    return next((answer for script, answer in _REFUSALS.items() if re.search(script, question)), _REFUSAL)


def _unwrapped(record: Any) -> Any:
    """Return a record with the keys of the objects that wrap its request."""
    if not isinstance(record, dict):
        what = f"a row is an object or a list of messages, not {type(record).__name__}"
        raise RowError("unknown-format", what)
    for name in _WRAPPERS:
        inner = record.get(name) if name == "input" else _parsed(record.get(name), quietly=True)
        if name == "attributes" and isinstance(inner, list):  # OpenTelemetry's protocol
            pairs = [one for one in inner if isinstance(one, dict) and isinstance(one.get("value"), dict)]
            inner = {str(one.get("key")): next(iter(one["value"].values()), None) for one in pairs}
        if isinstance(inner, dict):
            record = inner | {key: value for key, value in record.items() if key != name}
    return record


def _all_messages(record: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield a record's messages: system, history, and the answer or the gold call."""
    if system := first(record, _SYSTEMS):
        system = system.get("parts", system) if isinstance(system, dict) else system  # Gemini's
        yield {"role": "system", "content": system}
    gold, question = _parsed(first(record, _GOLD)), first(record, _QUESTIONS)
    traces = [key for key in record if key.endswith("__trace")]  # NeMo Data Designer's
    turns = question if gold is not None and question is not None else first(record, (*_HISTORY, *traces))
    if turns and turns == record.get("instruction") and isinstance(record.get("input"), str):  # Alpaca's
        turns = f"{turns}\n{record['input']}".strip()
    if turns is None:
        raise RowError("unknown-format", _hint(record))
    history = list(_messages(turns, USER))
    yield from history
    if gold == []:  # no tool fits
        yield {"role": "assistant", "content": refusal(str(question or ""))}
    elif gold is not None:
        gold = gold if isinstance(gold, list) else [gold]
        if all(isinstance(one, str) and one.rstrip().endswith(")") for one in gold):  # add(a=1)
            yield {"role": "assistant", "content": f"[{', '.join(gold)}]"}
        else:
            yield {"role": "assistant", "tool_calls": gold}
    elif history and _role(history[-1]) not in (ANSWER, CALL):
        yield from _messages(first(record, _ANSWERS), ANSWER)


def _messages(value: Any, role: str) -> Iterator[dict[str, Any]]:
    """Yield the messages in a value; a bare text is a message of `role`."""
    if isinstance(value, str):
        parsed = _parsed(value, quietly=True)
        items = parsed if isinstance(parsed, list) else [parsed]
        if any(isinstance(one, dict) and (_role(one) or _inner(one) is not None) for one in items):
            value = parsed  # a question may be JSON, too; this is not one
    if isinstance(value, str):
        turns = _GLAIVE.split(value)[1:]
        if not turns:
            yield {"role": role, "content": value}
        for who, text in zip(turns[::2], turns[1::2], strict=True):
            name = "tool" if who == "FUNCTION RESPONSE" else who.lower()
            yield {"role": name, "content": text.replace("<|endoftext|>", "").strip()}
    elif isinstance(value, list):
        for item in value:
            yield from _messages(item, role)
    elif isinstance(value, dict):
        inner = None if _role(value) else _inner(value)
        yield from [value] if inner is None else _messages(inner, role)
    elif value is not None:
        raise RowError("bad-message", f"a message is not an object but {type(value).__name__}")


def _inner(value: Mapping[str, Any]) -> Any:
    """Return the messages in a server's response or a trace."""
    return first(value, ("messages", *_ANSWERS, "generations", "candidates"))


def _role(message: Mapping[str, Any]) -> str | None:
    """Return the role of a message, or None if it is unknown."""
    named = message.get("role") or message.get("from") or message.get("type")
    if isinstance(message.get("lc"), int) and isinstance(message.get("id"), list):
        named = (message["id"] or [""])[-1]
    return _ROLE_OF.get(_plain(named)) if isinstance(named, str) else None


def _plain(name: str) -> str:
    """Return a name without case and separators: tool-call and toolCall become toolcall."""
    return name.lower().replace("_", "").replace("-", "")


def _opened(message: dict[str, Any]) -> dict[str, Any] | None:
    """Return a message without its wrapper, None for an event of a session log that is no message."""
    if message.get("isMeta") or message.get("isSidechain"):
        return None
    for name in ("message", "payload", "data", "kwargs"):  # Claude Code, Codex, LangChain twice
        if isinstance(inner := message.get(name), dict):
            if name == "payload" and not _role(inner):
                return None
            return {key: value for key, value in message.items() if key in ("type", "lc", "id")} | inner
    if isinstance(inner := message.get("content"), dict) and "parts" in inner:  # Gemini's candidates
        return inner
    return message if _role(message) or not {"timestamp", "sessionId"} & set(message) else None


def _turns(message: dict[str, Any], content: Content) -> Iterator[Turn]:
    """Yield the turns of a message; the tools that a system message lists are added to `content`."""
    if (opened := _opened(message)) is None:
        return
    if (role := _role(opened)) is None:
        raise RowError("bad-message", f"a message has the keys {', '.join(opened)}, and no known role")
    parts = list(_parts(opened, role))
    texts, thoughts = ([text for kind, text in parts if kind == wanted] for wanted in ("text", "thought"))
    results = [item for kind, item in parts if kind == "result"]
    calls = [item for kind, item in parts if kind == "call"]
    text = "\n".join(texts)
    if role == SYSTEM:
        content.tools += tools_in(opened.get("tools"), "", content.cleaned)
        text, listed = _without_tools(text)
        content.tools += listed
        yield Turn(SYSTEM, text)
    elif role == RESULT:
        for item in results or [opened]:
            yield from _results(item)
    elif role == USER:
        for item in results:
            yield from _results(item)
        if text.strip() or not results:
            yield Turn(USER, text)
    else:
        text, thought = split_thought(text)
        thoughts = [*thoughts, thought] if thought else thoughts
        if role == CALL:
            named = opened if isinstance(opened.get("name"), str) else _literal(text)
            calls, text = (named if isinstance(named, list) else [named]), ""
        turn = _call(calls) if calls else Turn(ANSWER)
        if not calls and text.strip():
            schemas = {tool.name: tool.parameters for tool in content.tools}
            if reading := text_calls.read(text, schemas):
                turn = Turn(CALL, calls=tuple(reading.calls), ids=("",) * len(reading.calls))
                text = reading.content
        trained = opened.get("weight") != 0
        yield turn._replace(text=text.strip(), reasoning="\n".join(thoughts), trained=trained)


def _parts(message: Mapping[str, Any], role: str) -> Iterator[tuple[str, Any]]:
    """Yield the parts of a message: ("text", text), ("thought", text), ("call", item), ("result", item)."""
    for name in _REASONING:
        if isinstance(text := message.get(name), str) and text.strip():
            yield "thought", text
    value = first(message, ("content", "parts", "value", "summary", "text", "refusal", "message"))
    for part in value if isinstance(value, list) else [value]:
        if role == RESULT and not (isinstance(part, dict) and _kind(part)[0] == "result"):
            continue  # the whole content is the result
        if isinstance(part, dict):
            yield _part(part)
        elif isinstance(part, str):
            yield "text", part
        elif part is not None:
            raise RowError("bad-message", f"a message's content is not text but {type(part).__name__}")
    more = message.get("additional_kwargs")  # LangChain's
    for name in ("tool_calls", "function_call"):
        calls = message.get(name) or (more.get(name) if isinstance(more, dict) else None)
        calls = _literal(calls) if isinstance(calls, str) else calls
        for call in calls if isinstance(calls, list) else [calls] * bool(calls):
            yield "call", call


def _kind(part: dict[str, Any]) -> tuple[str, str]:
    """Return the kind of a part, and the name that shows it: its `type`, or one of its keys."""
    for name in (part.get("type"), *part):
        for kind, pattern in _KINDS.items():
            if isinstance(name, str) and pattern.fullmatch(_plain(name)):
                return kind, name
    return "", ""


def _part(part: dict[str, Any]) -> tuple[str, Any]:
    """Return the kind and the value of one part of a message's content."""
    kind, name = _kind(part)
    if not kind:
        kind = part.get("type") or ", ".join(part)
        raise RowError("bad-message", f"content has blocks of type {kind}, which are neither text nor calls")
    if part.get("thought") is True or kind in ("text", "thought"):
        text = first(part, (*_REASONING, "text", "content", "value", "refusal"))
        return "thought" if part.get("thought") is True else kind, str(text or "")
    inner = part.get(name, part)
    return kind, _parsed(part["value"]) if "value" in part else inner if isinstance(inner, dict) else part


def _results(item: Mapping[str, Any]) -> Iterator[Turn]:
    """Yield the results in a message or a part: one, or each <tool_response> in its text."""
    value = first(item, _RESULTS)
    known = _parsed(value, quietly=True)
    failed = item.get("is_error") or item.get("isError") or (isinstance(known, dict) and known.get("isError"))
    given, text = _id(item), _result_text(value)
    for part in _TOOL_RESPONSE.findall(text) or [text]:
        yield Turn(RESULT, part, ids=(given,) if given else (), failed=bool(failed))


def _result_text(value: Any) -> str:
    """Return the text of a result: MCP's {"content": [{"type": "text", "text": "5888"}]}, or any value.

    Images and files are left out, as no chat template renders them.
    """
    if isinstance(value, dict) and len(value) == 1 and isinstance(value.get("result"), str):  # Gemini's
        return str(value["result"])
    known = _parsed(value, quietly=True)
    parts = known.get("content") if isinstance(known, dict) else known
    parts = parts if isinstance(parts, list) else []
    if parts and all(isinstance(part, dict) and {"type", "text"} & part.keys() for part in parts):
        texts = [first(part, ("text", "value", "content")) for part in parts]
        return "\n".join(text for text in texts if isinstance(text, str))
    return value if isinstance(value, str) else "" if value is None else json.dumps(value, ensure_ascii=False)


def _id(item: Mapping[str, Any]) -> str:
    """Return the id of a call, or of the call that a result belongs to; "" if there is none."""
    given = (item.get(key) for key in _IDS)
    return next((name for name in given if isinstance(name, str) and name.isprintable()), "")


def _call(items: list[Any]) -> Turn:
    """Read calls: {name, arguments}, {function: {…}} around it, or BFCL's {name: {argument: [values]}}."""
    calls, ids = [], []
    for item in items:
        item = _literal(item) if isinstance(item, str) else item
        item = item if isinstance(item, dict) else {}
        ids.append(_id(item))
        if isinstance(item.get("custom"), dict):
            raise RowError("custom-call", "a custom tool call contains free text, not arguments")
        if isinstance(item.get("function"), dict):
            item = item["function"]
        if "name" not in item and len(item) == 1:
            ((name, values),) = item.items()
            if isinstance(values, dict) and all(isinstance(value, list) for value in values.values()):
                chosen = {key: value[0] for key, value in values.items() if value and value[0] != ""}
                item = {"name": name, "arguments": chosen}
        if not isinstance(name := first(item, NAMES), str):
            raise RowError("no-call", "a call has no name, or there is no call")
        arguments = arguments_of(first(item, ARGUMENTS), _literal)
        if not isinstance(arguments, dict):
            raise RowError("bad-arguments", f"the arguments of {name} are not a JSON object")
        calls.append(ToolCall(name, arguments))
    if not calls:
        raise RowError("no-call", "the list of calls is empty")
    return Turn(CALL, "", tuple(calls), tuple(ids))


def _without_tools(text: str) -> tuple[str, list[Tool]]:
    """Return a system message without the tools that it lists as JSON, and these tools."""
    tools: list[Tool] = []
    text = re.sub(r"(?<=<tools>).*?(?=</tools>)", text_calls.as_json, text, flags=re.DOTALL)
    kept, place = "", 0
    for found in re.finditer(r"[\[{]", text):
        if found.start() < place:
            continue
        try:
            value, end = json.JSONDecoder().raw_decode(text, found.start())
            listed = list(tools_in(value))
            if not any(tool.description or tool.parameters["properties"] for tool in listed):
                continue  # any object with a name
        except (ValueError, RecursionError, RowError):
            continue
        kept, place, tools = kept + text[place : found.start()], end, tools + listed
    return re.sub(r"<tools>\s+</tools>", "", kept + text[place:]).strip() if tools else text, tools


def _parsed(value: Any, quietly: bool = False) -> Any:
    """Return the value of a string that is an object or array in JSON or Python, else `value` itself."""
    if isinstance(value, str) and value.lstrip()[:1] in ("{", "[") and value.rstrip()[-1:] in ("}", "]"):
        try:
            return literal(value)
        except ValueError:
            if not quietly:
                raise RowError("bad-json", f"a field is not JSON: {value[:80]}") from None
    return value


def _literal(text: str) -> Any:
    """Return the value of JSON, or of a Python literal as Toucan writes it."""
    try:
        return literal(text)
    except ValueError:
        raise RowError("bad-json", f"a call is neither JSON nor a Python literal: {text[:80]}") from None


def _hint(record: Mapping[str, Any]) -> str:
    if "tools" in record or {"name", "description"} <= set(record):
        return "this is a tool catalogue without calls: pass it with --tools"
    keys = ", ".join(map(str, record)) or "none"
    return f'no known format has the keys {keys}; use {{"messages": […], "tools": […]}}, see docs/data.md'
