r"""The second pass of a conversion: each row gets its split and its candidate tools, and is written twice.

In OpenAI's form, a file a split (train.jsonl, seen.jsonl, …), which is what is trained; tests also say whose
tool is the gold one:

    {"messages": [{"role": "system", "content": "You are a helpful assistant. …"},
                  {"role": "user", "content": "What is 128 * 46?"},
                  {"role": "assistant", "content": null, "tool_calls": [{"id": "call_1", "type": "function",
                   "function": {"name": "calculate", "arguments": "{\"expression\":\"128 * 46\"}"}}]}],
     "tools": [{"type": "function", "function": {"name": "calculate", "description": …, "parameters": {…}}}],
     "server": "calculator"}

And in LLaMA-Factory's sharegpt form (its data/README.md), for those who train without mcp-lora:

    {"conversations": [{"from": "human", "value": "What is 128 * 46?"},
                       {"from": "function_call",
                        "value": "{\"name\": \"calculate\", \"arguments\": {\"expression\": …}}"}],
     "system": "You are a helpful assistant …",
     "tools": "[{\"name\": \"calculate\", \"description\": …, \"parameters\": …}]"}
"""

import contextlib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import msgspec

from mcp_lora import languages
from mcp_lora.accounts import Accounts
from mcp_lora.candidates import Offer, Pool, Split
from mcp_lora.catalogue import Catalogue
from mcp_lora.records import Tool
from mcp_lora.rows import Progress, Row, Rows

# The splits, and what LLaMA-Factory's form of each is named.
SPLITS = {
    "train": "mcp_train",
    "seen": "mcp_test_seen",
    "unseen_tool": "mcp_test_unseen_tool",
    "unseen_server": "mcp_test_unseen_server",
    "no_call": "mcp_test_no_call",
}
LIMIT = 100_000_000  # bytes; a bigger file is JSON Lines, which the engine reads as a stream
_BUFFER = 1 << 20  # bytes written at once
_TOLD = 1000  # rows between two reports of progress
# Between the results of parallel calls: LLaMA-Factory allows one turn for all of them and joins them so
# itself (its data/converter.py, OpenAIDatasetConverter).
_BETWEEN_RESULTS = "\n</tool_response>\n<tool_response>\n"


class Samples:
    """Writes the samples of a conversion into `folder`.

    Attributes:
        extra: no-call samples that were made, by split.
    """

    def __init__(
        self, folder: Path, catalogue: Catalogue, split: Split, candidates: int, no_call: float
    ) -> None:
        self.extra: Counter[str] = Counter()
        self._folder = folder
        self._catalogue = catalogue
        self._split = split
        self._candidates = candidates
        self._no_call = no_call
        self._pool = Pool(catalogue, split)
        self._open = contextlib.ExitStack()
        self._files: dict[str, list[IO[bytes]]] = {}
        self._encoded: dict[int, dict[str, Any]] = {}

    def write(self, rows: Rows, accounts: Accounts, progress: Progress) -> None:
        """Write a sample for every row, and no-call samples of some."""
        with self._open:
            for place, row in enumerate(rows):
                gold = [tool for offer in row.own if (tool := self._tool(offer)).name in row.called]
                split = self._split_of(row, gold, rows)
                sampled = self._pool.sample(
                    row.own, set(row.called), self._candidates, row.content, split == "unseen_server"
                )
                server = next((tool.server for tool in gold), "")
                # A test asks for the call, and for nothing after it.
                messages = row.messages if split == "train" else _up_to_the_call(row.messages)
                self._write(split, messages, sampled, server)
                accounts.of(row.file, row.shape).written[split] += 1
                if row.called and row.other < self._no_call * 2**64:
                    distractors = [offer for offer in sampled if self._tool(offer).name not in row.called]
                    if distractors:
                        self._write_no_call(split, row, distractors)
                if place % _TOLD == 0:
                    progress("writing", place / rows.count)

    def finish(self) -> dict[str, Path]:
        """Return LLaMA-Factory's file of each split that has samples, in its final form."""
        final = {}
        for split, name in SPLITS.items():
            lines = self._folder / f"{name}.lines"
            if lines.is_file():
                stem = f"{name}_data" if split == "train" else name
                if lines.stat().st_size > LIMIT:
                    final[split] = lines.rename(self._folder / f"{stem}.jsonl")
                else:
                    final[split] = self._folder / f"{stem}.json"
                    _as_array(lines, final[split])
                    lines.unlink()
        return final

    def _split_of(self, row: Row, gold: list[Tool], rows: Rows) -> str:
        if any(self._split.server(tool.server) for tool in gold):
            return "unseen_server"
        if any(self._split.tool(tool.server, tool.name) for tool in gold):
            return "unseen_tool"
        if not self._split.row(row.content):
            return "train"
        if not gold:
            return "no_call"
        # One row of a tool is always trained on, or it would not be a seen tool. That it is the
        # one with the highest hash lets rows move from training into the test, never back.
        first = [tool for tool in gold if tool.name == row.called[0]]
        last = any(rows.kept.get((tool.server, tool.name)) == row.content for tool in first)
        return "train" if last else "seen"

    def _write(self, split: str, messages: list[Any], offers: list[Offer], server: str) -> None:
        sample: dict[str, Any] = {"messages": messages, "tools": list(map(self._described, offers))}
        if split != "train":
            sample["server"] = server
        if split not in self._files:
            paths = (self._folder / f"{split}.jsonl", self._folder / f"{SPLITS[split]}.lines")
            self._files[split] = [self._open.enter_context(path.open("wb", _BUFFER)) for path in paths]
        for file, form in zip(self._files[split], (sample, llama_factory(sample)), strict=True):
            file.write(msgspec.json.encode(form) + b"\n")

    def _write_no_call(self, split: str, row: Row, distractors: list[Offer]) -> None:
        """Write the row's question once more, without the gold tool and with the answer that says so."""
        asked = _up_to_the_call(row.messages)[:-1]
        question = next(message["content"] for message in reversed(asked) if message["role"] == "user")
        answer = {"role": "assistant", "content": languages.refusal(question)}
        split = "train" if split == "train" else "no_call"
        self._write(split, [*asked, answer], distractors, "")
        self.extra[split] += 1

    def _tool(self, offer: Offer) -> Tool:
        return self._catalogue.tools[offer] if isinstance(offer, int) else offer

    def _described(self, offer: Offer) -> dict[str, Any]:
        """Return a tool in OpenAI's form; the catalogue's, which recur, are encoded once."""
        if isinstance(offer, int) and offer in self._encoded:
            return self._encoded[offer]
        tool = self._tool(offer)
        # The schema's own dialect tells a model nothing; hosts leave it out too.
        parameters = {key: value for key, value in tool.parameters.items() if key != "$schema"}
        function = {"name": tool.name, "description": tool.description, "parameters": parameters}
        described = {"type": "function", "function": msgspec.Raw(msgspec.json.encode(function))}
        if isinstance(offer, int):
            self._encoded[offer] = described
        return described


def llama_factory(sample: Mapping[str, Any]) -> dict[str, Any]:
    """Return a sample in LLaMA-Factory's form.

    That form holds one text or one call, or parallel ones, a turn: text beside a call and reasoning are left
    out, and the results of parallel calls joined.
    """
    turns: list[dict[str, str]] = []
    for message in sample["messages"]:
        content = message["content"] or ""
        if message["role"] == "user":
            turns.append({"from": "human", "value": content})
        elif message["role"] == "tool":
            if turns[-1]["from"] == "observation":
                turns[-1]["value"] += _BETWEEN_RESULTS + content
            else:
                turns.append({"from": "observation", "value": content})
        elif made := message.get("tool_calls"):
            calls = [
                {"name": call["function"]["name"], "arguments": msgspec.Raw(call["function"]["arguments"])}
                for call in made
            ]
            value = msgspec.json.encode(calls if len(calls) > 1 else calls[0]).decode()
            turns.append({"from": "function_call", "value": value})
        elif message["role"] == "assistant":
            turns.append({"from": "gpt", "value": content})
    tools = [tool["function"] for tool in sample["tools"]]
    return {
        "conversations": turns,
        "system": sample["messages"][0]["content"],
        "tools": msgspec.json.encode(tools).decode() if tools else "",
    }


def _up_to_the_call(messages: list[Any]) -> list[Any]:
    """Return the messages up to and with the first call; all of them where none calls."""
    calls = [place for place, message in enumerate(messages) if message.get("tool_calls")]
    return messages[: calls[0] + 1] if calls else messages


def _as_array(lines: Path, file: Path) -> None:
    """Write JSON Lines as an array, a line each."""
    with lines.open("rb") as source, file.open("wb") as target:
        before = b"[\n"
        for line in source:
            target.write(before + line.rstrip(b"\n"))
            before = b",\n"
        target.write(b"\n]\n")
