"""What we ask LLaMA-Factory in this process. Its import takes seconds, so it waits for a use."""

import difflib
import importlib.util
import json
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from functools import cache
from typing import Any

from mcp_lora.errors import McpLoraError
from mcp_lora.records import Fault, ToolCall, as_json


def require() -> None:
    """Raise McpLoraError where LLaMA-Factory is not installed."""
    if importlib.util.find_spec("llamafactory") is None:
        raise McpLoraError("LLaMA-Factory is not installed in this environment: pip install -e .")


def problems(config: dict[str, Any]) -> list[str]:
    """Return what LLaMA-Factory would refuse: keys that it does not know, an unknown template."""
    from llamafactory import hparams
    from llamafactory.data.template import TEMPLATES

    groups = (
        hparams.ModelArguments,
        hparams.DataArguments,
        hparams.TrainingArguments,
        hparams.FinetuningArguments,
        hparams.GeneratingArguments,
    )
    known = {field.name for group in groups for field in fields(group) if field.init}
    found = [
        f"LLaMA-Factory knows no key {key}{_did_you_mean(key, known)}" for key in config if key not in known
    ]
    template = config.get("template")
    if template not in TEMPLATES:
        found.append(f"LLaMA-Factory knows no template {template}{_did_you_mean(str(template), TEMPLATES)}")
    return found


@contextmanager
def quiet() -> Iterator[None]:
    """Keep LLaMA-Factory from telling of every word and module that it finds."""
    logger = logging.getLogger("llamafactory")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def train(config: dict[str, Any]) -> None:
    """Train in this process: one rank of a launch by deepspeed or torchrun."""
    from llamafactory.train.tuner import run_exp

    run_exp(config)


def read_calls(text: str, template: str, tool_format: str | None) -> tuple[list[ToolCall], bool]:
    """Return the calls in a model's answer, and whether it holds one that cannot be read.

    They are read with the engine's own extractor. Where that finds none, which takes a call only if nothing
    stands after it, and in the default format no name with a hyphen, JSON objects with a name and arguments
    are looked for behind the mark with which the tool format begins a call.
    """
    tools, word = _tool_format(template, tool_format)
    try:
        found = tools.tool_extractor(text)
        calls = [] if isinstance(found, str) else [call_of(call.name, call.arguments) for call in found]
    except (TypeError, ValueError, LookupError, RecursionError):  # the extractors trust what they read
        calls = [None]
    if calls and None not in calls:
        return [call for call in calls if call], bool(word) and text.count(word) > len(calls)
    read, broken = _scan(text, word)
    return read, broken or (not read and bool(calls))


@cache
def _tool_format(template: str, tool_format: str | None) -> tuple[Any, str]:
    """Return the engine's tool format, and the word with which it begins a call.

    That is `<tool_call>`, `Action:`; nothing where a call is mere JSON.
    """
    from llamafactory.data.template import TEMPLATES
    from llamafactory.data.tool_utils import FunctionCall, get_tool_utils

    tools = get_tool_utils(tool_format) if tool_format else TEMPLATES[template].format_tools.tool_utils
    mark = tools.function_formatter([FunctionCall(_NAME, "{}")]).split(_NAME)[0]
    return tools, mark.split("{")[0].split("[")[0].strip()


def call_of(name: Any, arguments: Any) -> ToolCall | None:
    """Return a call; its arguments are an object, or one as JSON in a text. None if it is no call."""
    try:
        # Twice in quotes, as models do that have seen OpenAI's format.
        for _ in range(2):
            arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
        as_json([name, arguments])  # Python's json lets NaN and half a surrogate pair pass
    except (ValueError, RecursionError, Fault):
        return None
    return ToolCall(name, arguments) if isinstance(name, str) and isinstance(arguments, dict) else None


_NAME = "NAME"
_OF_A_CALL = {"name", "arguments", "parameters", "id", "type"}


def _scan(text: str, word: str) -> tuple[list[ToolCall], bool]:
    """Look for calls behind each occurrence of the word that begins one, or anywhere.

    Returns:
        The calls, and whether something behind the word was none.
    """
    parts = text.split(word)[1:] if word else [text]
    calls: list[ToolCall] = []
    broken = False
    for part in parts:
        found = list(_objects(part))
        named = re.match(r"\s*(\S.*?)\s*\n\s*Action Input:", part)
        if named and found:  # the default format: the name stands before the arguments
            call = call_of(named.group(1), found[0])
            calls += [call] if call else []
            broken |= not call
            continue
        read = [
            call
            for entry in found
            if "name" in entry
            and entry.keys() <= _OF_A_CALL  # a tool's definition has a description
            and (call := call_of(entry["name"], entry.get("arguments", entry.get("parameters"))))
        ]
        calls += read
        broken |= not read and (bool(word) or '"name"' in part)
    return calls, broken


def _objects(text: str) -> Iterator[dict[str, Any]]:
    """Yield the outermost JSON objects in a text."""
    decoder = json.JSONDecoder()
    place = text.find("{")
    while place >= 0:
        try:
            value, end = decoder.raw_decode(text, place)
        except (ValueError, RecursionError):
            end = place + 1
        else:
            yield value
        place = text.find("{", end)


def _did_you_mean(word: str, known: Any) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {close[0]}?)" if close else ""
