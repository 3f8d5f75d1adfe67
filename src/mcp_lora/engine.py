"""What we ask LLaMA-Factory in this process. Its import takes seconds, so it waits for a use."""

import difflib
import importlib.util
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

from mcp_lora.errors import McpLoraError

_OF_A_STEP = ("adapter_name_or_path", "disable_gradient_checkpointing", "use_unsloth", "enable_liger_kernel")


def require() -> None:
    """Raise McpLoraError where LLaMA-Factory is not installed."""
    if importlib.util.find_spec("llamafactory") is None:
        raise McpLoraError("LLaMA-Factory is not installed in this environment: pip install -e .")


def problems(config: dict[str, Any]) -> list[str]:
    """Return what LLaMA-Factory would refuse: the keys that it does not know."""
    from llamafactory import hparams

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
    return found


def shaping(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that shape the model, which training, prediction, chat and export must agree on.

    They are LLaMA-Factory's model arguments (the base, its vocabulary, quantization, attention, code of its
    own), but for those of one step alone.
    """
    from llamafactory.hparams import ModelArguments

    shape = {field.name for field in fields(ModelArguments) if field.init} | {"additional_target"}
    return {key: value for key, value in config.items() if key in shape and key not in _OF_A_STEP}


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


def _did_you_mean(word: str, known: Any) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {close[0]}?)" if close else ""
