"""What training has changed in plain chat: how far the adapter's predictions are from the base model's.

RUN/eval/plain_chat.json has the values by the hash of the adapter that they are of:

    {"5e8d…": {"divergence": 0.21, "first": 0.64, "questions": 100, "tokens": 4120}}
"""

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from mcp_lora.data import files
from mcp_lora.errors import advice, one_line
from mcp_lora.prompts.chat_template import ChatTemplate
from mcp_lora.train import runs

_FILE = Path("eval", "plain_chat.json")


@dataclass(frozen=True)
class PlainChat:
    """The Kullback-Leibler divergence of the adapter from the base on plain questions, in nats per token.

    0 means that the adapter predicts as the base does. `first` is that of the first token of an answer, where
    an adapter that calls a tool whatever is asked differs most.
    """

    divergence: float
    first: float
    questions: int
    tokens: int

    @property
    def is_high(self) -> bool:
        """Whether plain chat needs rows of its own: half a nat everywhere, or one where answers start."""
        return self.divergence > 0.5 or self.first > 1


def questions() -> list[str]:
    """Return a hundred questions that need no tool."""
    return resources.files("mcp_lora.evaluate").joinpath("plain_chat.txt").read_text("utf-8").splitlines()


def of_run(run: Path, adapter: Path, template: ChatTemplate, say: Callable[[str], None]) -> PlainChat | None:
    """Return what an adapter of a run has changed, and keep it; measured only once.

    It is None if the base is quantized, has added tokens, or was changed by PiSSA; `say` logs a warning if it
    cannot be measured.
    """
    try:
        config = runs.read_run(run)
        changing = ("resize_vocab", "add_tokens", "add_special_tokens", "pissa_init")
        is_other = any(config.get(key) for key in changing)
        if (kept := kept_of(run, adapter)) or runs.is_quantized(run) or is_other:
            return kept
        found = measure(config, adapter, template, questions())
        every = files.load(run / _FILE, advice("eval", run)) | {runs.adapter_hash(adapter): asdict(found)}
        (run / _FILE).write_text(json.dumps(every) + "\n", encoding="utf-8")
        return found
    except Exception as error:  # a template may raise any, and PyTorch several if memory runs out
        say(f"warning: plain chat is not compared: {one_line(error)}")
        return None


def kept_of(run: Path, adapter: Path) -> PlainChat | None:
    """Return what was measured of this adapter of a run, None if nothing was."""
    every = files.load(run / _FILE, f"remove it, and {advice('eval', run)}")
    with suppress(LookupError, TypeError):  # not measured, or by another version
        return PlainChat(**every[runs.adapter_hash(adapter)])
    return None


def measure(
    config: Mapping[str, Any], adapter: Path, template: ChatTemplate, asked: Sequence[str]
) -> PlainChat:
    """Compare an adapter with its base on questions without tools, as rendered by the chat template.

    The mean over all tokens of these prompts of KL(base ‖ adapter) = Σ p_base · (log p_base − log p_adapter).
    """
    import torch
    from torch.nn.functional import kl_div, log_softmax

    place = "auto" if torch.cuda.is_available() else "cpu"
    model = runs.loaded(config, adapter, dtype="auto", device_map=place)
    total, first, tokens = 0.0, 0.0, 0
    for question in asked:
        text = template.prompt([{"role": "user", "content": question}], [])
        ids = torch.tensor([template.ids(text)], device=model.device)
        with torch.inference_mode():
            tuned = log_softmax(model(ids).logits[0].float(), -1)
            with model.disable_adapter():
                base = log_softmax(model(ids).logits[0].float(), -1)
        each = kl_div(tuned, base, reduction="none", log_target=True).sum(-1)
        total, first, tokens = total + each.sum().item(), first + each[-1].item(), tokens + len(each)
    return PlainChat(total / tokens, first / len(asked), len(asked), tokens)
