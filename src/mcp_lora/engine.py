"""What we ask LLaMA-Factory in this process. Its import takes seconds, so it waits for a use."""

import difflib
import importlib.util
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

from mcp_lora.errors import McpLoraError
from mcp_lora.records import ToolCall


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


def extract_calls(text: str, template: str, tool_format: str | None) -> list[ToolCall]:
    """Return the calls in a model's answer, read with the engine's own extractor.

    An answer without a call that can be read gives an empty list.
    """
    from llamafactory.data.template import TEMPLATES
    from llamafactory.data.tool_utils import get_tool_utils

    tools = get_tool_utils(tool_format) if tool_format else TEMPLATES[template].format_tools.tool_utils
    try:
        found = tools.tool_extractor(text)
        calls = [] if isinstance(found, str) else [(call.name, json.loads(call.arguments)) for call in found]
    except (TypeError, ValueError, LookupError):  # the extractors trust the shape of what they read
        return []
    return [ToolCall(name, args) for name, args in calls if isinstance(args, dict)]


def _did_you_mean(word: str, known: Any) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {close[0]}?)" if close else ""
