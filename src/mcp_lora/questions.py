r"""The held-out questions of a converted dataset, with their right answers.

A row of a test (see mcp_lora.samples) is a conversation that ends with the right answer: a call, parallel
calls, or a text where no candidate tool fits.
"""

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mcp_lora import dataset
from mcp_lora.errors import McpLoraError
from mcp_lora.prompts.render import called
from mcp_lora.records import Tool, ToolCall

SPLITS = tuple(split for split in dataset.SPLITS if split != "train")


@dataclass(frozen=True)
class Question:
    """One held-out sample; `split` is a key of SPLITS."""

    split: str
    sample: dict[str, Any]

    @cached_property
    def key(self) -> str:
        """The same for the same question of the same split, wherever it is asked."""
        sample = json.dumps(self.sample, sort_keys=True)
        return hashlib.sha256(f"{self.split}\n{sample}".encode()).hexdigest()[:16]

    @property
    def turn(self) -> tuple[list[Any], Any, list[Any]]:
        """What stands before the answer, the right answer and the candidate tools, in OpenAI's form."""
        messages = self.sample["messages"]
        return messages[:-1], messages[-1], self.sample["tools"]

    @property
    def instruction(self) -> str:
        """What is asked last."""
        asked = [message["content"] for message in self.turn[0] if message["role"] == "user"]
        return str(asked[-1])

    @property
    def server(self) -> str:
        """Whose tool is the right one; empty where the data does not say, or none is."""
        return str(self.sample.get("server", ""))

    @cached_property
    def expected(self) -> list[ToolCall]:
        """The right calls; none where no tool fits."""
        return called(self.turn[1])

    @cached_property
    def tools(self) -> dict[str, Tool]:
        """The candidate tools, by name."""
        return {tool["function"]["name"]: Tool("", **tool["function"]) for tool in self.turn[2]}


def read(folder: Path, splits: list[str], limit: int | None = None) -> list[Question]:
    """Return the questions of a converted dataset.

    Args:
        folder: the dataset's.
        splits: keys of SPLITS; none means all that there are.
        limit: at most so many of each, the first.

    Raises:
        McpLoraError: there are none, or a split is unknown, not there, or damaged.
    """
    if unknown := [split for split in splits if split not in SPLITS]:
        raise McpLoraError(
            f"there is no split {', '.join(unknown)}: mcp-lora eval --split {' or '.join(SPLITS)}"
        )
    there = dataset.names(folder)
    wanted = splits or [split for split in SPLITS if split in there]
    if missing := [split for split in wanted if split not in there]:
        raise McpLoraError(
            f"{folder} holds no questions of split {', '.join(missing)}: mcp-lora convert --test 0.1 "
            f"--holdout-tools 0.1 --holdout-servers 0.1 --no-call 0.05 --out {folder}"
        )
    found = []
    for split in wanted:
        samples = dataset.samples(folder, split)
        found += [Question(split, sample) for _, sample in zip(range(limit or 2**62), samples, strict=False)]
    if not found:
        raise McpLoraError(
            f"{folder} holds no held-out questions: mcp-lora convert --test 0.1 --out {folder}"
        )
    for question in found:
        try:
            _ = question.instruction, question.expected, question.tools
        except (ValueError, TypeError, LookupError):
            raise McpLoraError(
                f"a question of {question.split} in {folder} is damaged: mcp-lora convert --out {folder}"
            ) from None
    return found
