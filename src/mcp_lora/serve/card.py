"""What an export carries besides weights: chat template, stop tokens, Modelfile, model card."""

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

from mcp_lora.data import files
from mcp_lora.data.calls import split_thought
from mcp_lora.errors import McpLoraError
from mcp_lora.evaluate import evaluation
from mcp_lora.evaluate.stats import Proportion
from mcp_lora.prompts import chat_template
from mcp_lora.prompts.chat_template import ChatTemplate
from mcp_lora.serve import llama_cpp
from mcp_lora.train import manifest, runs

# Model types whose chat template Ollama ignores (its server/create.go).
_RENDERED_BY_OLLAMA = ("gemma4", "laguna", "nemotron_h")


class _Answers(NamedTuple):
    """How answers in a format are parsed.

    Attributes:
        start: what a call starts with, a pattern.
        thought: the marks around a thought.
        anchors: what stands before an answer besides what opens it.
        calls: where a call with its name begins and ends, and how its arguments are read.
    """

    start: str
    thought: tuple[str, str]
    anchors: tuple[str, ...]
    calls: dict[str, Any]


# vLLM's frontend in Rust allows no look-around, and a pattern has to begin with plain text.
_ANSWERS = (
    _Answers(
        r"\s*<tool_call>\s*\{",  # Hermes
        ("<think>", "</think>"),
        (),
        {
            "open_pattern": r'<tool_call>\s*\{\s*"name":\s*"(?P<name>[^"]+)",\s*"arguments":\s*',
            "close_pattern": r"\}\s*</tool_call>\s*",
            "content": "json",
        },
    ),
    _Answers(
        r"\s*<tool_call>\s*<function=",  # Qwen3-Coder, Qwen3.5
        ("<think>", "</think>"),
        (),
        {
            "open_pattern": r"<tool_call>\s*<function=(?P<name>[^>\n]+)>",
            "close_pattern": r"</function>\s*</tool_call>\s*",
            "content": "xml-inline",
            "content_args": {"tag_pattern": r"<parameter=(?P<key>[^>\n]+)>\n?(?P<value>.*?)\n?</parameter>"},
        },
    ),
    _Answers(
        r"<\|tool_call>call:",  # Gemma 4, whose answer to a result is in the same turn
        ("<|channel>thought\n", "<channel|>"),
        ("<tool_response|>",),
        {
            "open_pattern": r"<\|tool_call>call:(?P<name>[^{]+)",
            "close": "<tool_call|>",
            "content": "json",
            "content_args": {"unquoted_keys": True, "string_delims": [['<|"|>', '<|"|>']]},
        },
    ),
)


def complete(folder: Path, template: ChatTemplate, firmly: bool = False) -> None:
    """Add what a server requires: the chat template, the tokens that end an answer, how calls are parsed.

    With `firmly` no request can change the arguments that the chat template was trained with.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / runs.CHAT_TEMPLATE).write_text(template.frozen(firmly), encoding="utf-8")
    ends = {*template.ends.values(), template.tokenizer.eos_token}
    ids = sorted(map(template.tokenizer.convert_tokens_to_ids, ends))
    _update(folder / "generation_config.json", {"eos_token_id": ids})
    if parsed := response_template(template):
        _update(folder / "tokenizer_config.json", {"response_template": parsed})


def _update(file: Path, changes: dict[str, Any]) -> None:
    content = files.load(file, "mcp-lora export") | changes
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def check_ollama(run: Path, command: str) -> None:
    """Raise McpLoraError if Ollama would not serve a run's model as it was trained.

    `command` is the one that exports it for another server.
    """
    source = chat_template.model_folder(runs.read_run(run))
    kind = str(files.load(source / "config.json", "copy the model again").get("model_type"))
    if kind.startswith(_RENDERED_BY_OLLAMA):
        what = f"Ollama renders {kind} with its own prompts, not those used in training"
        raise McpLoraError(f"{what}: {command}, and mcp-lora serve FILE.gguf")


def modelfile(template: ChatTemplate) -> str:
    """Return the Modelfile for `model.gguf` in the same folder.

    It has no TEMPLATE, which is written in Go: without one Ollama, from 0.30, renders prompts by the file's
    own chat template (its llm/llama_server.go).
    """
    values = ["temperature 0", "repeat_penalty 1", f"num_ctx {llama_cpp.CONTEXT}"]
    values += [f'stop "{end}"' for end in sorted({*template.ends.values()})]
    lines = ["FROM ./model.gguf", "REQUIRES 0.30.0", *(f"PARAMETER {value}" for value in values)]
    return "\n".join(lines) + "\n"


def response_template(template: ChatTemplate) -> dict[str, Any] | None:
    """Return how to parse answers in one of _ANSWERS, None for other formats.

    transformers (from 5.13, utils/chat_parsing), vLLM (--tool-call-parser hf) and SGLang (--tool-call-parser
    response_template) read it from tokenizer_config.json.
    """
    call = split_thought(template.written)[0]
    found = next((one for one in _ANSWERS if re.match(one.start, call)), None)
    if not found or not template.opening:
        return None
    ends = "|".join(map(re.escape, sorted({*template.ends.values()})))
    function = {"name": "{name}", "arguments": "{content}"}
    return {
        "start_anchor": [template.opening, *found.anchors],
        "defaults": {"role": "assistant"},
        "fields": {
            "thinking": dict(zip(("open", "close"), found.thought, strict=True)),
            "tool_calls": found.calls
            | {"repeats": True, "transform": {"type": "function", "function": function}},
            "content": {"close_pattern": f"(?:{ends}).*"},
        },
    }


def model_card(run: Path, adapter: Path, serving: str) -> str:
    """Return a model card: base, command for serving, data, recipe, evaluation of this adapter of a run."""
    config, record = runs.read_run(run), manifest.read(run)
    base = str(config["model_name_or_path"])
    name = Path(base).name if Path(base).is_absolute() else base
    data = record.conversion if record else None
    evaluated = evaluation.kept(run, adapter)
    keys = ("lora_rank", "lora_alpha", "lora_dropout", "learning_rate", "num_train_epochs", "cutoff_len")
    lines = ["---", "tags: [lora, tool-calling, mcp]", "pipeline_tag: text-generation"]
    lines += [] if Path(base).is_absolute() else [f"base_model: {base}"]
    if its_card := manifest.cached(config, "README.md"):
        head = its_card.read_text(encoding="utf-8", errors="replace").split("\n---", 1)[0]
        head = head if head.startswith("---\n") else ""  # a card may have no front matter
        lines += re.findall(r"^license\w*:.*\w.*$", head, re.MULTILINE)
    lines += ["---", "", f"# {name}, tuned to call MCP tools", ""]
    lines += ["The licence is that of the base model, and of the data.", ""]
    lines += ["## Serving", "", f"In this folder: `{serving}`", "", "## Training", ""]
    if data:
        rejected = sum(data.rejected.values())
        tools = f"{data.tools} tools of {data.servers} servers"
        lines.append(f"- {data.read} rows, {rejected} of them rejected; {tools}; written: {data.written}")
    lines.append("- " + ", ".join(f"{key} {config[key]}" for key in keys if key in config))
    lines += ["", "## Evaluation", ""]
    for split, found in evaluated.splits.items() if evaluated else ():
        for model, each in found.metrics.items():
            values = (f"{key} {_percent(one)}" for key, one in each.items())
            lines.append(f"- {split}, {found.count} questions, {model}: {', '.join(values)}")
    lines += ["", "In % with 95 % intervals."] if evaluated else ["None."]
    lines += ["", "## Use", ""]
    lines.append("The prompt must contain the candidate tools, rendered by the chat template.")
    return "\n".join(lines) + "\n"


def _percent(found: Proportion) -> str:
    return f"{100 * found.rate:.1f} ({100 * found.low:.0f}…{100 * found.high:.0f})"
