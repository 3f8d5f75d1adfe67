"""What training has changed in plain chat: how far the adapter's predictions are from the base model's."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from mcp_lora.prompts.chat_template import ChatTemplate, hub_arguments

HIGH = 0.5  # nats per token


@dataclass(frozen=True)
class PlainChat:
    """The Kullback-Leibler divergence of the adapter from the base, in nats per token of plain questions.

    0 means that the adapter predicts as the base does.
    """

    divergence: float
    questions: int
    tokens: int


def questions() -> list[str]:
    """Return a hundred questions that need no tool."""
    return files("mcp_lora.evaluate").joinpath("plain_chat.txt").read_text("utf-8").splitlines()


def with_adapter(config: Mapping[str, Any], adapter: Path, vocabulary: int | None = None, **how: Any) -> Any:
    """Load the model that a configuration names, with an adapter, in evaluation mode.

    Args:
        config: in LLaMA-Factory's keys.
        adapter: its folder.
        vocabulary: number of embeddings, if the run has changed it (resize_vocab).
        how: arguments of transformers' from_pretrained, such as dtype.
    """
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        str(config["model_name_or_path"]), **how, **hub_arguments(config)
    )
    if vocabulary and vocabulary != model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(vocabulary, mean_resizing=False)
    return PeftModel.from_pretrained(model, adapter).eval()


def measure(
    config: Mapping[str, Any], adapter: Path, template: ChatTemplate, asked: Sequence[str]
) -> PlainChat:
    """Compare an adapter with its base on questions without tools, as rendered by the chat template.

    The mean over all tokens of KL(base ‖ adapter) = Σ p_base · (log p_base − log p_adapter).
    """
    import torch
    from torch.nn.functional import kl_div, log_softmax

    place = "auto" if torch.cuda.is_available() else "cpu"
    model = with_adapter(config, adapter, dtype="auto", device_map=place)
    total, tokens = 0.0, 0
    for question in asked:
        text = template.prompt([{"role": "user", "content": question}], [])
        ids = torch.tensor([template.ids(text)], device=model.device)
        with torch.inference_mode():
            tuned = log_softmax(model(ids).logits[0].float(), -1)
            with model.disable_adapter():
                base = log_softmax(model(ids).logits[0].float(), -1)
        total += kl_div(tuned, base, reduction="sum", log_target=True).item()
        tokens += ids.shape[1]
    return PlainChat(total / tokens, len(asked), tokens)
