"""What an export carries besides weights: chat template, stop tokens, parser, Modelfile, model card."""

import json
import re
from pathlib import Path
from typing import Any

from mcp_lora.data import files
from mcp_lora.data.calls import split_thought
from mcp_lora.errors import McpLoraError, advice
from mcp_lora.evaluate import evaluation
from mcp_lora.evaluate.parity import NAME
from mcp_lora.evaluate.stats import Proportion
from mcp_lora.prompts import chat_template
from mcp_lora.prompts.chat_template import ChatTemplate
from mcp_lora.serve import llama_cpp
from mcp_lora.train import manifest, runs

# How a call starts, and what vLLM 0.32 (vllm/tool_parsers/__init__.py) and SGLang 0.5.23
# (sglang/srt/function_call/function_call_parser.py) call the parser of that format.
PARSERS = (
    (r"[^{}]*<tool_call>\s*\{", "hermes", "qwen"),
    (r"<tool_call>\s*<function=", "qwen3_xml", "qwen3_coder"),
    (r"<tool_call>[\w-]+\n\s*<arg_key>", "glm45", "glm"),
    (r"<tool_call>[\w-]+<arg_key>", "glm47", "glm47"),
    (r"<\|tool_call>call:", "gemma4", "gemma4"),
    (r"\[TOOL_CALLS\]", "mistral", "mistral"),
    (r"<\|tool_call_start\|>", "lfm2", "lfm2"),
    (r"<minimax:tool_call>", "minimax_m2", "minimax-m2"),
    (r"<｜DSML｜function_calls>", "deepseek_v32", "deepseekv32"),
    (r"<｜DSML｜tool_calls>", "deepseek_v4", "deepseekv4"),
    (r"<\|tool_calls_section_begin\|>", "kimi_k2", "kimi_k2"),
    (r"(?:<\|close\|>response<\|sep\|>)?<\|open\|>tools", "kimi_k3", "kimi_k3"),
    (r"<function name=", "minicpm5", "minicpm5"),
    (r"to=functions\.", "openai", "gpt-oss"),
    (r"(?:<\|python_tag\|>)?\s*\{", "llama3_json", "llama3"),
)
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM allows (its vllm/config/lora.py, MaxLoRARanks)
# Initial weights that leave the base as it is (its vllm/lora/peft_helper.py).
_INITIAL = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
# Model types whose chat template Ollama ignores (its server/create.go).
_RENDERED_BY_OLLAMA = ("gemma4", "laguna", "nemotron_h")


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


def parser(template: ChatTemplate) -> tuple[str, str]:
    """Return the names of vLLM's and SGLang's parser for the calls that a template writes."""
    written = split_thought(template.written)[0].strip()
    for pattern, *names in PARSERS:
        if re.match(pattern, written):
            return names[0], names[1]
    what = f"no parser is known for calls like {written[:60]!r}"
    raise McpLoraError(f"{what}: mcp-lora serve --engine llama.cpp, which learns it from the chat template")


def lora_options(run: Path) -> list[str]:
    """Return vLLM's options for a run's adapter, or raise McpLoraError if vLLM rejects it."""
    adapter = runs.adapter(run).absolute()
    settings = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    rank = max([settings["r"], *(settings.get("rank_pattern") or {}).values()])
    refused = list(settings.get("modules_to_save") or [])
    refused += [key for key in ("use_dora", "bias", "lora_bias") if (settings.get(key) or "none") != "none"]
    init = settings.get("init_lora_weights", True)
    refused += [init] if isinstance(init, str) and init.lower() not in _INITIAL else []
    if refused:
        what = f"vLLM serves no adapter with {', '.join(refused)}"
        if runs.is_quantized(run):
            raise McpLoraError(f"{what}, and a quantized base cannot be merged: {advice('chat', run)}")
        raise McpLoraError(f"{what}, only a merged model: {advice('export', run)}")
    allowed = next((one for one in RANKS if one >= rank), None)
    if allowed is None:
        what = f"vLLM allows LoRA ranks up to {RANKS[-1]}, not {rank}"
        raise McpLoraError(f"{what}: {advice('export', run)}")
    return ["--enable-lora", "--max-lora-rank", str(allowed), "--lora-modules", f"{NAME}={adapter}"]


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
    """Return how to parse answers in Hermes format, None for other formats.

    transformers (from 5.13, utils/chat_parsing), vLLM (--tool-call-parser hf) and SGLang (auto) read it from
    tokenizer_config.json.
    """
    if not template.written.startswith("<tool_call>\n{"):
        return None
    calls = {"open": "<tool_call>", "close_pattern": r"</tool_call>\s*", "content": "json", "repeats": True}
    return {
        "start_anchor": template.opening,
        "defaults": {"role": "assistant"},
        "fields": {
            "thinking": {"open": "<think>", "close_pattern": r"</think>\s*"},
            "tool_calls": calls | {"transform": {"type": "function", "function": "{content}"}},
            "content": {"close": sorted({*template.ends.values()})},
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
