r"""The held-out questions of a converted dataset, with their right answers.

A test file holds samples in LLaMA-Factory's sharegpt format; the last turn is the right answer, a call,
parallel calls, or a text where no tool on offer fits:

    {"conversations": [{"from": "human", "value": "What is 3 plus 4?"},
                       {"from": "function_call",
                        "value": "{\"name\":\"get-sum\",\"arguments\":{\"a\":3,\"b\":4}}"}],
     "system": "You are a helpful assistant. …", "server": "everything",
     "tools": "[{\"name\":\"get-sum\",\"description\":\"…\",\"parameters\":{\"type\":\"object\", …}}]"}
"""

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mcp_lora import dataset
from mcp_lora.errors import McpLoraError
from mcp_lora.records import Tool, ToolCall
from mcp_lora.samples import NO_CALL, TEST, UNSEEN_SERVER, UNSEEN_TOOL

SPLITS = {"seen": TEST, "unseen_tool": UNSEEN_TOOL, "unseen_server": UNSEEN_SERVER, "no_call": NO_CALL}


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
    def instruction(self) -> str:
        """What is asked last."""
        return str(self.sample["conversations"][-2]["value"])

    @property
    def server(self) -> str:
        """Whose tool is the right one; empty where the data does not say, or none is."""
        return str(self.sample.get("server", ""))

    @cached_property
    def expected(self) -> list[ToolCall]:
        """The right calls; none where no tool fits."""
        answer = self.sample["conversations"][-1]
        if answer["from"] != "function_call":
            return []
        calls = json.loads(answer["value"])
        return [ToolCall(**call) for call in (calls if isinstance(calls, list) else [calls])]

    @cached_property
    def tools(self) -> dict[str, Tool]:
        """The tools on offer, by name."""
        offered = json.loads(self.sample["tools"] or "[]")
        return {tool["name"]: Tool("", **tool) for tool in offered}


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
    wanted = splits or [split for split, name in SPLITS.items() if name in there]
    if missing := [split for split in wanted if SPLITS[split] not in there]:
        raise McpLoraError(
            f"{folder} holds no questions of split {', '.join(missing)}: mcp-lora convert --test 0.1 "
            f"--holdout-tools 0.1 --holdout-servers 0.1 --no-call 0.05 --out {folder}"
        )
    found = []
    for split in wanted:
        samples = dataset.samples(folder, SPLITS[split])
        found += [Question(split, sample) for _, sample in zip(range(limit or 2**62), samples, strict=False)]
    if not found:
        raise McpLoraError(
            f"{folder} holds no held-out questions: mcp-lora convert --test 0.1 --out {folder}"
        )
    for question in found:
        try:
            _ = question.instruction, question.expected, question.tools
        except (ValueError, TypeError, LookupError):
            name = SPLITS[question.split]
            raise McpLoraError(
                f"a question of {name} in {folder} is damaged: mcp-lora convert --out {folder}"
            ) from None
    return found
