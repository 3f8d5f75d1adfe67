"""Does an exported model say the same as base + adapter?"""

import gc
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Largest difference of two logits that merging may cause, relative to the largest logit: the
# merged weights are rounded to the model's dtype, where the adapter apart is not.
TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2, "float16": 1e-2}
PROMPT = "Which tools can you call, and what time is it in Tokyo?"


@dataclass(frozen=True)
class Comparison:
    """The largest difference between logits, the largest logit, and the dtype compared in."""

    difference: float
    largest: float
    dtype: str

    @property
    def within_tolerance(self) -> bool:
        """Whether the difference is one that rounding explains."""
        return self.difference <= TOLERANCE[self.dtype] * self.largest


def compare(base: str, adapter: Path, merged: Path) -> Comparison:
    """Compare the logits of base + adapter with those of the merged model on PROMPT.

    Both are loaded in the merged model's dtype, one after the other.

    Args:
        base: the base model, a folder or a hub id.
        adapter: the adapter's folder.
        merged: the exported model's folder.
    """
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ids = AutoTokenizer.from_pretrained(merged)(PROMPT, return_tensors="pt").input_ids
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def logits(model: Any) -> Any:
        with torch.inference_mode():
            return model.eval().to(device)(ids.to(device)).logits.float().cpu()

    exported = AutoModelForCausalLM.from_pretrained(merged, dtype="auto")
    dtype = exported.dtype
    after = logits(exported)
    del exported
    gc.collect()
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    before = logits(PeftModel.from_pretrained(model, adapter))
    # A base whose embedding the engine has widened has fewer logits than what it exported.
    width = min(before.shape[-1], after.shape[-1])
    difference = (before[..., :width] - after[..., :width]).abs().max().item()
    return Comparison(difference, before.abs().max().item(), str(dtype).removeprefix("torch."))
