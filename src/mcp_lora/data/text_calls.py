r"""Calls that stand in an answer's text: forms in which models and data sets write them, read by example.

Each form writes a call with marked names and values, and mcp_lora.data.calls learns from that how it is
read. The first that reads a text wins; what is written around a call stays the text beside it.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import cache
from typing import Any

from mcp_lora.data.calls import CallFormat, Reading
from mcp_lora.data.records import Fault, ToolCall, literal

_Writer = Callable[[list[ToolCall]], str]


def _each(form: str, between: str = "\n") -> _Writer:
    """Write each call by a form with places for its name, arguments, or both as JSON."""

    def write(calls: list[ToolCall]) -> str:
        return between.join(
            form.format(
                name=name,
                arguments=json.dumps(arguments),
                call=json.dumps({"name": name, "arguments": arguments}),
                parameters=_pairs("<parameter={}>\n{}\n</parameter>\n", arguments),
                attributes=_pairs('<parameter name="{}">{}</parameter>\n', arguments),
                keys=_pairs("<arg_key>{}</arg_key>\n<arg_value>{}</arg_value>\n", arguments),
            )
            for name, arguments in calls
        )

    return write


def _pairs(form: str, arguments: Mapping[str, Any]) -> str:
    return "".join(form.format(key, value) for key, value in arguments.items())


def _list(opening: str = "", closing: str = "", name: str = "name", arguments: str = "arguments") -> _Writer:
    """Write all calls as one JSON array."""
    return lambda calls: (
        opening + json.dumps([{name: call.name, arguments: call.arguments} for call in calls]) + closing
    )


def _object(name: str, arguments: str) -> _Writer:
    """Write each call as an object under other keys than OpenAI's."""
    return lambda calls: "\n".join(json.dumps({name: call.name, arguments: call.arguments}) for call in calls)


def _python(opening: str, closing: str) -> _Writer:
    """Write calls in Python's syntax."""
    return lambda calls: opening + ", ".join(map(_in_python, calls)) + closing


def _in_python(call: ToolCall) -> str:
    return f"{call.name}({', '.join(f'{key}={value!r}' for key, value in call.arguments.items())})"


_FORMS = (
    _each("<tool_call>\n<function={name}>\n{parameters}</function>\n</tool_call>"),  # Qwen3-Coder
    _each("<tool_call>{name}\n{keys}</tool_call>"),  # GLM-4.5
    _each("<tool_call>{name}\n```json\n{arguments}\n```</tool_call>"),  # Hunyuan
    _each("<tool_call>\n{call}\n</tool_call>"),  # Hermes, Qwen
    _list("<tool_call>", "</tool_call>"),
    _list("<tool_calls>", "</tool_calls>"),
    _list("<TOOLCALL>", "</TOOLCALL>"),  # Nemotron
    _each("<function_call>{call}</function_call>"),
    _each("<functioncall> {call} <|endoftext|>"),  # Glaive
    _each("<function={name}>{arguments}</function>"),  # Llama 3.1
    _each("<|python_tag|>{call}", "; "),
    _list("[TOOL_CALLS]"),  # Mistral
    _each("[TOOL_CALLS]{name}[ARGS]{arguments}", ""),
    _each(
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>{name}\n```json\n{arguments}\n```"
        "<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
    ),  # DeepSeek
    _each('<function_calls>\n<invoke name="{name}">\n{attributes}</invoke>\n</function_calls>'),  # MiniMax
    _each(
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.{name}:0<|tool_call_argument_begin|>{arguments}"
        "<|tool_call_end|><|tool_calls_section_end|>"
    ),  # Kimi K2
    _each("<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>{arguments}<|call|>"),
    _each(">>>{name}\n{arguments}"),  # Functionary
    _list("functools"),  # Firefunction
    _list("Action: ```json\n", "\n```", "tool_name", "parameters"),  # Command R
    _list("<|START_ACTION|>", "<|END_ACTION|>", "tool_name", "parameters"),
    _each("Action: {name}\nAction Input: {arguments}"),  # ReAct
    _each("```json\n{call}\n```"),
    _list("```json\n", "\n```"),
    _python("<tool_call>", "</tool_call>"),
    _python("<function_calls>", "</function_calls>"),  # Olmo
    _python("```tool_code\n", "\n```"),  # Gemma
    _python("<<function>>", ""),  # Gorilla
    _python("Call: ", "<bot_end>"),  # NexusRaven
    _python("[", "]"),  # ToolACE, Llama 4
    _python("", ""),
    _list(),
    _each("{call}"),
    *map(
        _object,
        ("tool", "tool", "tool_name", "action", "function"),
        ("args", "arguments", "arguments", "action_input", "parameters"),
    ),
)
# What begins a call in forms that are not read, or in a broken one: words, and a tool's name in its place.
_MARKS = (
    r"<\|?/?(?:tool|function)_?call|<functioncall>|<function=|<TOOLCALL>|<invoke "
    r"|<\|python_tag\|>|\[TOOL_CALLS\]|<｜tool▁call|to=functions\.|^Action:.*^Action Input:"
)
_NAMED = r"\b(?:{names})\s*\{{|\b(?:{names})\([^)\s]|:\s*[\"'](?:{names})[\"']|>\s*(?:{names})\s*<"
_FLAGS = re.IGNORECASE | re.MULTILINE | re.DOTALL
_LONG = 100_000  # characters; beyond, Python's quotes are not looked for, as the time grows with the square
_PYTHON = re.compile(r"\{.*?\}(?=\s*(?:[<\]]|$|```))", re.DOTALL)
# Around the calls: a template's tag, which it writes itself, and what holds them in an object.
_TAG = re.compile(r"(?:<[^<>\s]{1,40}>|<\|start\|>assistant)$")
_HOLDERS = ("tool_calls", "tool_call", "function_call", "function_calls", "calls")


@cache
def _formats() -> list[CallFormat]:
    return [CallFormat(write, "an answer") for write in _FORMS]


def read(text: str, schemas: Mapping[str, Mapping[str, Any]]) -> Reading | None:
    """Return the calls in a text; None where it holds none.

    Args:
        text: an assistant's.
        schemas: the parameters' JSON Schema of each tool on offer, by name; no other is called.

    Raises Fault where it calls a tool in a form that is not known, or a tool that is not on offer.
    """
    if any(name in text for name in schemas):  # most answers name no tool
        for variant in dict.fromkeys(_variants(text, schemas)):
            for form in _formats():
                reading = form.read(variant, schemas)
                known = all(call.name in schemas for call in reading.calls)
                is_part = re.search(r"[{\[(]$|[\"']\s*:$", reading.content)
                if reading.calls and known and not reading.broken and not is_part:
                    content = reading.content
                    while tag := _TAG.search(content):
                        content = content[: tag.start()].rstrip()
                    return replace(reading, content=content)
        names = "|".join(map(re.escape, schemas))
        if re.search(_NAMED.format(names=names), text):
            raise _unread(text)
    if re.search(_MARKS, text, _FLAGS):
        raise _unread(text)
    return None


def _variants(text: str, schemas: Mapping[str, Any]) -> Iterator[str]:
    """Yield a text, and as it would be in a form that is read."""
    yield text
    if "'" in text and len(text) < _LONG:
        yield _PYTHON.sub(as_json, text)
    if text.lstrip().startswith(tuple(schemas)):  # GLM-4 begins with the name
        yield f"[TOOL_CALLS]{text.strip()}"
    bare = text.strip().removeprefix("```json").removeprefix("```").removesuffix("```").strip()
    if bare.startswith("{") and bare.endswith("}"):
        yield bare
        with suppress(ValueError, TypeError):  # Python has values that JSON has not
            if isinstance(value := literal(bare), dict):
                yield from (json.dumps(value[holder]) for holder in _HOLDERS if holder in value)


def _unread(text: str) -> Fault:
    return Fault("call-as-text", f"a call is written as text that cannot be read: {text.strip()[:80]}")


def as_json(found: re.Match[str]) -> str:
    """Return an object in Python's syntax as JSON, anything else as it is."""
    try:
        value = literal(found.group())
        return json.dumps(value) if isinstance(value, dict | list) else found.group()
    except (ValueError, TypeError):  # Python has values that JSON has not
        return found.group()
