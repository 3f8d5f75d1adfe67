r"""Calls in the text of an answer, in the formats that models and datasets use, parsed by example.

Each format renders a call with marker names and values, from which mcp_lora.data.calls learns to parse it.
The first format that parses a text wins; the text around the calls is kept beside them.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import cache
from typing import Any

from mcp_lora.data.calls import CallFormat, Reading
from mcp_lora.data.records import RowError, ToolCall, literal

_Writer = Callable[[list[ToolCall]], str]


def _each(form: str, between: str = "\n", opening: str = "", closing: str = "") -> _Writer:
    """Write each call by a format string with fields for its name, arguments, or both as JSON."""

    def written(call: ToolCall) -> str:
        def pairs(form: str) -> str:
            return "".join(form.format(key, value) for key, value in call.arguments.items())

        return form.format(
            name=call.name,
            arguments=json.dumps(call.arguments),
            call=json.dumps(call._asdict()),
            parameters=pairs("<parameter={}>\n{}\n</parameter>\n"),
            attributes=pairs('<parameter name="{}">{}</parameter>\n'),
            keys=pairs("<arg_key>{}</arg_key>\n<arg_value>{}</arg_value>\n"),
            python=", ".join(f"{key}={value!r}" for key, value in call.arguments.items()),
        )

    return lambda calls: opening + between.join(map(written, calls)) + closing


_FORMS = (
    _each("<tool_call>\n<function={name}>\n{parameters}</function>\n</tool_call>"),  # Qwen3-Coder
    _each("<tool_call>{name}\n{keys}</tool_call>"),  # GLM-4.5
    _each("<tool_call>{name}\n```json\n{arguments}\n```</tool_call>"),  # Hunyuan
    _each("<tool_call>\n{call}\n</tool_call>"),  # Hermes, Qwen
    _each("<function_call>{call}</function_call>"),
    _each("<functioncall> {call} <|endoftext|>"),  # Glaive
    _each("<function={name}>{arguments}</function>"),  # Llama 3.1
    _each("<|python_tag|>{call}", "; "),
    _each("{call}", ", ", "[TOOL_CALLS][", "]"),  # Mistral
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
    _each("{call}", ", ", "functools[", "]"),  # Firefunction
    _each("{call}", ", ", "Action: ```json\n[", "]\n```"),  # Command R
    _each("Action: {name}\nAction Input: {arguments}"),  # ReAct
    _each("```json\n{call}\n```"),
    _each("{name}({python})", ", ", "<tool_call>", "</tool_call>"),
    _each("{name}({python})", ", ", "<function_calls>", "</function_calls>"),  # Olmo
    _each("{name}({python})", ", ", "```tool_code\n", "\n```"),  # Gemma
    _each("{name}({python})", ", ", "<<function>>"),  # Gorilla
    _each("{name}({python})", ", ", "Call: ", "<bot_end>"),  # NexusRaven
    _each("{name}({python})", ", ", "[", "]"),  # ToolACE, Llama 4
    _each("{call}", ", ", "[", "]"),  # also between tags, as Nemotron's <TOOLCALL>
    _each("{call}"),
)
# Signs of a call that cannot be parsed: literals, and a tool's name where a call would have it.
_MARKS = (
    r"<\|?/?(?:tool|function)_?call|<functioncall>|<function=|<TOOLCALL>|<invoke "
    r"|<\|python_tag\|>|\[TOOL_CALLS\]|<｜tool▁call|to=functions\.|^Action:.*^Action Input:"
)
_NAMED = (
    r"\b(?:{names})\s*\{{|\b(?:{names})\([^)\s]|:\s*[\"'](?:{names})[\"']|>\s*(?:{names})\s*<"
    r"|(?m:^|[:>])\W{{0,9}}(?:{names})\(\)\W{{0,9}}(?m:$)"  # alone on its line: prose writes ping(), too
)
_FLAGS = re.IGNORECASE | re.MULTILINE | re.DOTALL
_LONG = 100_000  # characters; longer texts are not searched for Python literals, which takes quadratic time
_PYTHON = re.compile(r"\{.*?\}(?=\s*(?:[<\]]|$|```))", re.DOTALL)
# What surrounds calls: a tag, which the template writes itself, and the key of an object around them.
_TAG = re.compile(r"(?:<[^<>\s]{1,40}>|<\|start\|>assistant)$")
_HOLDERS = ("tool_calls", "tool_call", "function_call", "function_calls", "calls")


@cache
def _formats() -> list[CallFormat]:
    return [CallFormat(write, "an answer", lenient=True) for write in _FORMS]


def read(text: str, schemas: Mapping[str, Mapping[str, Any]]) -> Reading | None:
    """Return the calls in a text, or None if it contains none.

    Args:
        text: the text of an assistant's message.
        schemas: the parameters' JSON Schema of each tool of the row, by name; only these are called.

    Raises RowError if it contains a call in an unknown format, or of a tool that is not in the row.
    """
    names_a_tool = any(name in text for name in schemas)
    if names_a_tool:  # most answers do not
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
    named = _NAMED.format(names="|".join(map(re.escape, schemas)))
    if (names_a_tool and re.search(named, text)) or re.search(_MARKS, text, _FLAGS):
        raise RowError("call-as-text", f"a call in the text cannot be parsed: {text.strip()[:80]}")
    return None


def _variants(text: str, schemas: Mapping[str, Any]) -> Iterator[str]:
    """Yield a text, and rewritten versions of it that may be parsed."""
    yield text
    if "'" in text and len(text) < _LONG:
        yield _PYTHON.sub(as_json, text)
    if text.lstrip().startswith(tuple(schemas)):  # GLM-4 begins with the name
        yield f"[TOOL_CALLS]{text.strip()}"
    bare = text.strip().removeprefix("```json").removeprefix("```").removesuffix("```").strip()
    if bare.startswith("{") and bare.endswith("}"):
        yield bare
        with suppress(ValueError, TypeError):  # a Python value without a JSON equivalent
            if isinstance(value := literal(bare), dict):
                yield from (json.dumps(value[holder]) for holder in _HOLDERS if holder in value)


def as_json(found: re.Match[str]) -> str:
    """Return a Python literal of an object or list as JSON, anything else unchanged."""
    with suppress(ValueError, TypeError):  # a Python value without a JSON equivalent
        if isinstance(value := literal(found.group()), dict | list):
            return json.dumps(value)
    return found.group()
