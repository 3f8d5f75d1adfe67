r"""Calls that stand in an answer's text: forms in which models and data sets write them, read by example.

Each form writes a call with marked names and values, and mcp_lora.prompts.calls learns from that how it is
read. The first that reads a text wins; what is written around a call stays the text beside it.
"""

import json
import re
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from mcp_lora.prompts.calls import CallFormat, Reading, literal
from mcp_lora.records import Fault, ToolCall

_Writer = Callable[[list[ToolCall]], str]


def _each(form: str, between: str = "\n") -> _Writer:
    """Write each call by a form with places for its name, arguments, or both as JSON."""

    def write(calls: list[ToolCall]) -> str:
        return between.join(
            form.format(
                name=name,
                arguments=json.dumps(arguments),
                call=json.dumps({"name": name, "arguments": arguments}),
                keywords=", ".join(f"{key}={value!r}" for key, value in arguments.items()),
                parameters="".join(
                    f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in arguments.items()
                ),
                attributes="".join(
                    f'<parameter name="{key}">{value}</parameter>\n' for key, value in arguments.items()
                ),
            )
            for name, arguments in calls
        )

    return write


def _list(opening: str = "", closing: str = "") -> _Writer:
    """Write all calls as one JSON array."""
    return lambda calls: opening + json.dumps([call._asdict() for call in calls]) + closing


def _object(name: str, arguments: str) -> _Writer:
    """Write each call as an object under other keys than OpenAI's."""
    return lambda calls: "\n".join(json.dumps({name: call.name, arguments: call.arguments}) for call in calls)


_FORMS = (
    _each("<tool_call>\n<function={name}>\n{parameters}</function>\n</tool_call>"),  # Qwen3-Coder
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
    _each(
        '<function_calls>\n<invoke name="{name}">\n{attributes}</invoke>\n</function_calls>'
    ),  # Anthropic, MiniMax
    _each("<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>{arguments}<|call|>"),
    _each("Action: {name}\nAction Input: {arguments}"),  # ReAct
    _each("```json\n{call}\n```"),
    _list("```json\n", "\n```"),
    lambda calls: f"[{_each('{name}({keywords})', ', ')(calls)}]",  # ToolACE, Llama 4
    _each("{name}({keywords})"),
    _list(),
    _each("{call}"),
    *map(
        _object,
        ("tool", "tool", "tool_name", "action", "function"),
        ("args", "arguments", "arguments", "action_input", "parameters"),
    ),
)
# What begins a call in forms that are not read, or in a broken one.
_MARKS = re.compile(
    r"<\|?/?(?:tool|function)_?calls?\b|<functioncall>|<function=|<TOOLCALL>|<invoke "
    r"|<\|python_tag\|>|\[TOOL_CALLS\]|<｜tool▁call|to=functions\.|^Action:.*^Action Input:",
    re.IGNORECASE | re.MULTILINE | re.DOTALL,
)
_PYTHON = re.compile(r"\{.*?\}(?=\s*(?:[<\]]|$|```))", re.DOTALL)


@cache
def _formats() -> list[CallFormat]:
    return [CallFormat(write, "an answer") for write in _FORMS]


def read(text: str, schemas: Mapping[str, Mapping[str, Any]]) -> Reading | None:
    """Return the calls in a text; None where it holds none.

    Args:
        text: an assistant's.
        schemas: the parameters' JSON Schema of each tool on offer, by name; no other is called.

    Raises:
        Fault: it calls a tool in a form that is not known, or a tool that is not on offer.
    """
    forms = _formats() if any(name in text for name in schemas) else []  # most answers name no tool
    for variant in dict.fromkeys((text, _PYTHON.sub(_as_json, text))):
        for form in forms:
            reading = form.read(variant, schemas)
            if reading.calls and not reading.broken and all(call.name in schemas for call in reading.calls):
                if not reading.content.endswith(("{", "[", ":", "(")):
                    return reading
                raise _unread(text)
    if _MARKS.search(text):
        raise _unread(text)
    return None


def _unread(text: str) -> Fault:
    return Fault("call-as-text", f"a call is written as text that cannot be read: {text.strip()[:80]}")


def _as_json(found: re.Match[str]) -> str:
    """Return an object in Python's syntax as JSON, anything else as it is."""
    try:
        value = literal(found.group())
        return json.dumps(value) if isinstance(value, dict) else found.group()
    except ValueError:
        return found.group()
