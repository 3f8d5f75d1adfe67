r"""The held-out questions of a converted dataset, with their gold answers.

A test sample (see mcp_lora.data.samples) is a conversation that ends with the gold answer: a call, parallel
calls, or text if no candidate tool fits.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from mcp_lora.data import conversion, dataset
from mcp_lora.data.records import Tool, ToolCall
from mcp_lora.errors import McpLoraError, advice
from mcp_lora.prompts.chat_template import called

SPLITS = tuple(split for split in dataset.SPLITS if split != "train")


@dataclass(frozen=True)
class Question:
    """One held-out sample of one of SPLITS, or of a category of the benchmark.

    `prompt` and `target` are its text as rendered by the chat template; empty until it has been fitted.
    """

    split: str
    sample: dict[str, Any]
    prompt: str = ""
    target: str = ""

    @cached_property
    def key(self) -> str:
        """A hash of the split and the sample."""
        sample = json.dumps(self.sample, sort_keys=True)
        return hashlib.sha256(f"{self.split}\n{sample}".encode()).hexdigest()[:16]

    @property
    def instruction(self) -> str:
        """The last user message."""
        asked = [message["content"] for message in self.sample["messages"] if message["role"] == "user"]
        return str(asked[-1])

    @property
    def server(self) -> str:
        """The gold tool's server; empty if the data does not name it, or there is no gold tool."""
        return str(self.sample.get("server", ""))

    @cached_property
    def expected(self) -> list[ToolCall]:
        """The gold calls; empty if no tool fits."""
        return called(self.sample["messages"][-1])

    @cached_property
    def tools(self) -> dict[str, Tool]:
        """The candidate tools, by name."""
        return {tool["function"]["name"]: Tool("", **tool["function"]) for tool in self.sample["tools"]}


def _command(folder: Path, missing: Sequence[str]) -> str:
    """Return the command that converts again with larger held-out fractions for these splits."""
    settings = dataset.recorded(folder).settings
    keys = {"seen": "test", "unseen_tool": "holdout_tools", "unseen_server": "holdout_servers"}
    fractions = [keys.get(split, split) for split in missing]
    more: dict[str, Any] = {key: 0.5 if getattr(settings, key) < 0.5 else 0.9 for key in fractions}
    return conversion.command(replace(settings, **more), folder)


def chosen(folder: Path, wanted: Sequence[str]) -> list[str]:
    """Return the requested splits of a converted dataset; if none are requested, all that exist.

    Raises McpLoraError if one is unknown or missing.
    """
    if unknown := ", ".join(split for split in wanted if split not in SPLITS):
        raise McpLoraError(f"there is no split {unknown}: mcp-lora eval --split {' or '.join(SPLITS)}")
    there = dataset.names(folder)
    if missing := [split for split in wanted if split not in there]:
        what = f"{folder} contains no questions of split {', '.join(missing)}"
        raise McpLoraError(f"{what}: {_command(folder, missing)}, and train again")
    return list(wanted) or [split for split in SPLITS if split in there]


def read(folder: Path, splits: Sequence[str]) -> list[Question]:
    """Return the questions of a converted dataset, by default of all its splits.

    Raises McpLoraError if there are none, or a split is unknown, missing or damaged.
    """
    wanted = chosen(folder, splits)
    found = [Question(split, sample) for split in wanted for sample in dataset.samples(folder, split)]
    if not found:
        what = f"{folder} contains no held-out questions, as there are too few rows"
        raise McpLoraError(f"{what}: {_command(folder, ['seen'])}, and train again")
    for question in found:
        try:
            _ = question.instruction, question.expected, question.tools
        except (ValueError, TypeError, LookupError):
            what = f"a question of {question.split} in {folder} is damaged"
            again = f"after removing {dataset.file_of(folder, question.split).name}"
            raise McpLoraError(f"{what}: {advice('convert', '--output', folder)}, {again}") from None
    return found
