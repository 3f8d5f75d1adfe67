"""Does an exported model say the same as base + adapter?"""

import gc
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mcp_lora.prompts.chat_template import ChatTemplate, hub_arguments
from mcp_lora.train.runs import CHAT_TEMPLATE

# Largest difference of two logits that merging may cause, relative to the largest logit: the
# merged weights are rounded to the model's dtype, where the adapter apart is not.
TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2, "float16": 1e-2}
PROMPT = "Which tools can you call, and what time is it in Tokyo?"


@dataclass(frozen=True)
class Comparison:
    """The largest difference between logits, the difference that rounding explains, and the dtype."""

    difference: float
    tolerance: float
    dtype: str


def serve_as_trained(merged: Path, template: ChatTemplate) -> None:
    """Give an exported model the chat template that it was trained with.

    The engine's Modelfile for Ollama is removed: it supports no tools, and has the engine's template.
    """
    if not template.is_own:
        text = str(template.tokenizer.chat_template)
        (merged / CHAT_TEMPLATE).write_text(text, encoding="utf-8")
    (merged / "Modelfile").unlink(missing_ok=True)


def compare(config: Mapping[str, Any], adapter: Path, merged: Path) -> Comparison:
    """Compare the logits of base (named by `config`) + adapter with those of the merged model on PROMPT.

    Both are loaded in the merged model's dtype, one after the other, on the CPU: that takes no more memory
    than the export has taken, and a pass over one prompt takes seconds there.
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
    dtype, words = exported.dtype, exported.get_input_embeddings().weight.shape[0]
    after = logits(exported)
    del exported
    gc.collect()
    model = AutoModelForCausalLM.from_pretrained(
        str(config["model_name_or_path"]), dtype=dtype, **hub_arguments(config)
    )
    if words != model.get_input_embeddings().weight.shape[0]:  # resize_vocab
        model.resize_token_embeddings(words, mean_resizing=False)
    before = logits(PeftModel.from_pretrained(model, adapter))
    name = str(dtype).removeprefix("torch.")
    tolerance = TOLERANCE[name] * before.abs().max().item()
    return Comparison((before - after).abs().max().item(), tolerance, name)
