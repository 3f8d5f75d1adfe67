"""Use a run's adapter: chat with it, or export a merged model equivalent to base + adapter."""

import gc
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mcp_lora.engine import api, launch
from mcp_lora.engine.topology import Topology
from mcp_lora.errors import McpLoraError
from mcp_lora.prompts import chat_template, render
from mcp_lora.prompts.chat_template import hub_arguments
from mcp_lora.train import runs
from mcp_lora.train.machine import detect_machine

# The largest difference of a logit that merging may cause, relative to the largest logit: merged weights are
# rounded to the model's dtype, while a separate adapter is not.
TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2, "float16": 1e-2}
PROMPT = "Which tools can you call, and what time is it in Tokyo?"


@dataclass(frozen=True)
class Comparison:
    """The largest difference between logits, the tolerance for rounding, and the dtype."""

    difference: float
    tolerance: float
    dtype: str

    def __str__(self) -> str:
        what = f"in {self.dtype}: the largest difference of a logit is {self.difference:.2g}"
        return f"{what} (tolerance {self.tolerance:.2g})"


def chat(run: Path, checkpoint: str | None = None) -> None:
    """Chat with a run's adapter in the terminal; raise a McpLoraError if it has none or the engine fails."""
    api.require()
    outcome = _engine("chat", runs.serving_config(run, runs.adapter(run, checkpoint)), hold_traceback=True)
    # LLaMA-Factory's chat raises at the end of its input
    raised = launch.real_error(outcome.stderr).startswith("EOFError")
    if outcome.code and not raised and not outcome.aborted_at_exit:
        raise outcome.error(f"mcp-lora chat {run}")


def export(run: Path, output: Path, checkpoint: str | None = None) -> Comparison:
    """Merge a run's adapter into its base model, and compare the two.

    `output` is created atomically. The model keeps the chat template that it was trained with; the engine's
    Modelfile for Ollama is removed: it does not support tools, and uses the engine's template.

    Raises McpLoraError if the run has no adapter, its base was quantized, `output` exists, or the engine
    fails; with exit code 1 if the merged model is not equivalent.
    """
    api.require()
    adapter = runs.adapter(run, checkpoint)
    again = f"mcp-lora export {run} --output OTHER_FOLDER"
    if runs.is_quantized(run):
        why = "was trained on a quantized base, and merging into it loses precision"
        raise McpLoraError(f"{run} {why}: use the adapter without merging: mcp-lora chat {run}")
    if output.exists():
        raise McpLoraError(f"{output} exists: {again}")
    new = output.with_name(f".{output.name}.new")
    settings = runs.serving_config(run, adapter) | {"export_dir": str(new), "export_size": 1}
    settings |= {"template": render.TEMPLATE}  # which keeps the tokenizer's chat template
    shutil.rmtree(new, ignore_errors=True)  # left by an export that was killed
    try:
        outcome = _engine("export", settings)
        if outcome.code:
            raise outcome.error(f"mcp-lora export {run}")
        template = chat_template.load(runs.read_run(run))
        if not template.is_own:
            text = str(template.tokenizer.chat_template)
            (new / runs.CHAT_TEMPLATE).write_text(text, encoding="utf-8")
        (new / "Modelfile").unlink(missing_ok=True)
        new.rename(output)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    found = compare(settings, adapter, output)
    if found.difference > found.tolerance:
        what = f"{output} is not equivalent to base + adapter, do not use it ({found})"
        raise McpLoraError(f"{what}: {again}", code=1)
    return found


def _engine(verb: str, settings: Mapping[str, Any], hold_traceback: bool = False) -> launch.Outcome:
    gpus = detect_machine().gpus
    environment = launch.engine_environment(settings, Topology(gpus or 1), gpus, os.environ)
    return launch.run_engine(verb, settings, environment, hold_traceback)


def compare(config: Mapping[str, Any], adapter: Path, merged: Path) -> Comparison:
    """Compare the logits of base (named by `config`) + adapter with those of the merged model on PROMPT.

    Both are loaded in the merged model's dtype, one after the other, on the CPU, which needs no more memory
    than the export and takes seconds for one prompt.
    """
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    trusted = bool(config.get("trust_remote_code"))
    tokenizer = AutoTokenizer.from_pretrained(merged, trust_remote_code=trusted)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids

    def logits(model: Any) -> Any:
        with torch.inference_mode():
            return model.eval()(ids).logits.float()

    exported = AutoModelForCausalLM.from_pretrained(merged, dtype="auto", trust_remote_code=trusted)
    dtype, vocabulary = exported.dtype, exported.get_input_embeddings().weight.shape[0]
    after = logits(exported)
    del exported
    gc.collect()
    model = AutoModelForCausalLM.from_pretrained(
        str(config["model_name_or_path"]), dtype=dtype, **hub_arguments(config)
    )
    if vocabulary != model.get_input_embeddings().weight.shape[0]:  # resize_vocab
        model.resize_token_embeddings(vocabulary, mean_resizing=False)
    before = logits(PeftModel.from_pretrained(model, adapter))
    name = str(dtype).removeprefix("torch.")
    tolerance = TOLERANCE[name] * before.abs().max().item()
    return Comparison((before - after).abs().max().item(), tolerance, name)
