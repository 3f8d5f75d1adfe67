"""Which of LLaMA-Factory's templates is a model's own: the one that renders what its chat template does.

An adapter that was trained on other prompts than it is served with looks broken, and the engine takes
any template that it is given.
"""

import copy
import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mcp_lora.lengths import Recorder

# In LLaMA-Factory's terms, and for a chat template.
_TOOL = {
    "name": "add",
    "description": "Adds.",
    "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
}
_SYSTEM, _QUESTION = "Be good.", "What is 1 + 1?"
# What is rendered both ways, what matters most first: every sample of ours has a system message and tools.
_PROBES = ((_SYSTEM, False), (_SYSTEM, True), (None, False), (None, True))


def fit(config: dict[str, Any], chosen: bool) -> str:
    """Put a model's own template into a configuration.

    Args:
        config: LLaMA-Factory's keys; `template` is changed in place, and `enable_thinking` set to false
            where a template would train an empty thought.
        chosen: the user has named the template: it stays.

    Returns:
        What came out, in words.
    """
    from llamafactory.data.template import TEMPLATES, ReasoningTemplate

    model, wanted = str(config.get("model_name_or_path")), config.get("template")
    found, why = _by_rendering(config), "its chat template renders the same"
    if not found and (known := _by_name(model)):
        found, why = [known], "by LLaMA-Factory's list of models"
    if not found:
        said = f"template {wanted}: {model} shows no chat template that says otherwise"
    elif wanted in found:
        said = f"template {wanted} ({why})"
    elif chosen:
        said = f"warning: template {wanted}, as it was asked for; the model's own is {found[0]} ({why})"
    else:
        config["template"] = found[0]
        said = f"template {found[0]} is the model's own ({why}), not the recipe's {wanted}"
    if isinstance(TEMPLATES.get(config["template"]), ReasoningTemplate) and "enable_thinking" not in config:
        config["enable_thinking"] = False
        said += ", with thinking off"
    return said


def _by_name(model: str) -> str | None:
    """Return the template that LLaMA-Factory's own list gives a hub id."""
    from llamafactory.extras.constants import DEFAULT_TEMPLATE, SUPPORTED_MODELS

    names = (name for name, sources in SUPPORTED_MODELS.items() if model in sources.values())
    return next((DEFAULT_TEMPLATE[name] for name in names if DEFAULT_TEMPLATE[name]), None)


def _by_rendering(config: Mapping[str, Any]) -> list[str]:
    """Return the templates that render best what a model's chat template does, the likeliest name first.

    Nothing is fetched: a model that is neither in a folder nor in the hub's cache gives an empty list.
    """
    from llamafactory.data.mm_plugin import BasePlugin
    from llamafactory.data.template import TEMPLATES
    from transformers import AutoTokenizer

    model = str(config.get("model_name_or_path"))
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            model, trust_remote_code=bool(config.get("trust_remote_code")), local_files_only=True
        )
    except (OSError, ValueError):
        return []
    right = [_by_model(tokenizer, *probe) for probe in _PROBES]
    scores = {
        name: tuple(
            text is not None and text == _by_engine(name, config, tokenizer, *probe)
            for text, probe in zip(right, _PROBES, strict=True)
        )
        for name in TEMPLATES
    }
    best = max(scores.values())
    if not any(best[:2]):
        return []
    kind = _model_type(model)

    def unlikely(name: str) -> tuple[float, bool]:
        """Order by likeness to the model's type; mllama, for pictures, is as like to llama as llama3 is."""
        likeness = difflib.SequenceMatcher(None, kind, name).ratio()
        return -likeness, type(TEMPLATES[name].mm_plugin) is not BasePlugin

    return sorted((name for name, score in scores.items() if score == best), key=unlikely)


def _model_type(model: str) -> str:
    file = Path(model) / "config.json"
    try:
        return str(json.loads(file.read_text(encoding="utf-8"))["model_type"])
    except (OSError, ValueError, LookupError):
        return model.rsplit("/", 1)[-1].lower()


def _by_model(tokenizer: Any, system: str | None, tools: bool) -> str | None:
    """Return the prompt by the model's chat template, None where it has none or refuses."""
    messages = [{"role": "system", "content": system}] if system else []
    try:
        text = tokenizer.apply_chat_template(
            [*messages, {"role": "user", "content": _QUESTION}],
            tools=[{"type": "function", "function": _TOOL}] if tools else None,
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=False,
        )
    except Exception:  # templates refuse by raising what they like
        return None
    return str(text)


def _by_engine(
    name: str, config: Mapping[str, Any], tokenizer: Any, system: str | None, tools: bool
) -> str | None:
    """Return the prompt by one of the engine's templates, None where it fails."""
    from llamafactory.data.formatter import FunctionFormatter, ToolFormatter
    from llamafactory.data.template import TEMPLATES

    template = copy.copy(TEMPLATES[name])
    template.enable_thinking = False
    if tool_format := config.get("tool_format"):
        template.format_tools = ToolFormatter(tool_format=tool_format)
        template.format_function = FunctionFormatter(slots=["{{content}}"], tool_format=tool_format)
    messages = [{"role": "user", "content": _QUESTION}, {"role": "assistant", "content": "2"}]
    try:
        prompt, _ = template.encode_oneturn(
            _Writer(tokenizer), messages, system, json.dumps([_TOOL]) if tools else None
        )
    except Exception:  # as above, and templates of models that look at pictures
        return None
    return "".join(piece if isinstance(piece, str) else tokenizer.decode([piece]) for piece in prompt)


class _Writer(Recorder):
    """Keeps the words of special tokens, too."""

    def convert_tokens_to_ids(self, token: str) -> Any:
        return token
