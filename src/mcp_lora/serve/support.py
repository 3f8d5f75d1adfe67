"""What vLLM and SGLang support: which of their parsers reads a model's calls, which adapters vLLM loads."""

import json
import re
from pathlib import Path

from mcp_lora.data.calls import split_thought
from mcp_lora.errors import McpLoraError, advice
from mcp_lora.evaluate.parity import NAME
from mcp_lora.prompts.chat_template import ChatTemplate
from mcp_lora.train import runs

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
