r"""The second pass of a conversion: each row gets its split and its candidate tools, and is written twice.

In OpenAI's format, one file per split (train.jsonl, seen.jsonl, …), which is what mcp-lora trains on; test
samples also name the server of the gold tool:

    {"messages": [{"role": "system", "content": "You are a helpful assistant. …"},
                  {"role": "user", "content": "What is 128 * 46?"},
                  {"role": "assistant", "content": null, "tool_calls": [{"id": "call_1", "type": "function",
                   "function": {"name": "calculate", "arguments": "{\"expression\":\"128 * 46\"}"}}]}],
     "tools": [{"type": "function", "function": {"name": "calculate", "description": …, "parameters": {…}}}],
     "server": "calculator"}

And in LLaMA-Factory's sharegpt format (its data/README.md), for those who train without mcp-lora:

    {"conversations": [{"from": "human", "value": "What is 128 * 46?"},
                       {"from": "function_call",
                        "value": "{\"name\": \"calculate\", \"arguments\": {\"expression\": …}}"}],
     "system": "You are a helpful assistant …",
     "tools": "[{\"name\": \"calculate\", \"description\": …, \"parameters\": …}]"}
"""

import contextlib
import itertools
import random
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import msgspec

from mcp_lora.data.catalogue import Catalogue
from mcp_lora.data.conversations import Exchange, conversations
from mcp_lora.data.files import BUFFER
from mcp_lora.data.formats import refusal
from mcp_lora.data.records import Settings, Tool
from mcp_lora.data.rows import Progress, Row, Rows
from mcp_lora.data.sampling import Pool, Split, are_alike

# The splits, and the name of each as a LLaMA-Factory dataset.
SPLITS = {
    "train": "mcp_train",
    "seen": "mcp_test_seen",
    "unseen_tool": "mcp_test_unseen_tool",
    "unseen_server": "mcp_test_unseen_server",
    "no_call": "mcp_test_no_call",
}
# Separates the results of parallel calls, which LLaMA-Factory expects in one turn and joins in this way
# (its data/converter.py, OpenAIDatasetConverter).
_BETWEEN_RESULTS = "\n</tool_response>\n<tool_response>\n"


def engine_file(split: str) -> str:
    """Return the name of a split's file in LLaMA-Factory's format."""
    return "mcp_train_data.json" if split == "train" else f"{SPLITS[split]}.json"


class Samples:
    """Writes the samples of a conversion into `folder`.

    Attributes:
        extra: number of extra no-call samples, by split.
        count: number of samples, by split.
    """

    def __init__(self, folder: Path, catalogue: Catalogue, rows: Rows, settings: Settings) -> None:
        self.extra: Counter[str] = Counter()
        self.count: Counter[str] = Counter()
        self._folder = folder
        self._tools = catalogue.tools
        self._rows = rows
        self._settings = settings
        split = Split(settings.holdout_servers, settings.holdout_tools, settings.test, settings.seed)
        self._split = split.within(rows.kept)
        self._pool = Pool(catalogue, self._split)
        self._kept = {*rows.kept.values()}
        low, _, high = str(settings.candidates).partition("-")
        self._candidates = int(low), int(high or low)
        self._exchanges: list[Exchange] = []  # for conversations
        self._open = contextlib.ExitStack()
        self._files: dict[str, list[IO[bytes]]] = {}

    def write(self, progress: Progress) -> None:
        """Write the samples of every row, and extra no-call samples of some."""
        rows = self._rows
        some = self._split.servers or self._split.tools
        held_out = {row.split_hash for row in rows if self._held_out(self._tools_of(row)[1])} if some else ()
        size = self._settings.questions_per_sample
        with self._open:
            for place, row in enumerate(rows):
                if place % 1000 == 0:
                    progress("writing", place / rows.count)
                own, gold = self._tools_of(row)
                split = self._split_of(row, gold, row.split_hash in held_out)
                if split != "train" and not _calls(row.messages):
                    split = "no_call"  # its calls are context, the gold answer is not to call
                rows.sources[row.file, row.format].written[split] += 1
                count, unseen = self._count(row.split_hash, split), split == "unseen_server"
                if gold and split == "train" and size > 1 and _is_single(row.messages):
                    self._collect(row, own, gold)
                    continue
                sampled = self._pool.sample(own, row.called, count, row.split_hash, unseen)
                server = gold[0].server if gold else ""
                # A test sample ends with the gold call.
                if split != "train":
                    self._write(split, _up_to_the_call(row.messages), sampled, server)
                elif self._settings.turns == "each" and _calls(row.messages):
                    for messages in _each_call(row.messages):
                        self._write(split, messages, sampled, server)
                else:
                    self._write(split, row.messages, sampled, server)
                if gold and row.no_call_hash < self._settings.no_call * 2**64:
                    # As many candidates as with the gold tool, or their number would give it away.
                    count = len(sampled) + len(gold)
                    more = self._pool.sample(own, row.called, count, row.split_hash, unseen)
                    distractors = [tool for tool in more if tool.name not in row.called][: len(sampled)]
                    self._write_no_call(split, row, distractors)
            for one in conversations(self._exchanges, size, lambda key: self._count(key, "train")):
                if tools := self._shared(one):  # none, if these are refusals without any distractor
                    self._write("train", _one_conversation(one), tools, "")
                    self.extra += Counter(train=sum(exchange.refuses for exchange in one))
            for _, array in self._files.values():
                array.write(b"\n]\n")

    def _count(self, content: int, split: str) -> int:
        """Return the number of candidates; a held-out question has the most."""
        low, high = self._candidates
        return low + content % (high - low + 1) if split == "train" else high

    def _collect(self, row: Row, own: list[Tool], gold: list[Tool]) -> None:
        """Keep a row's exchange for a conversation, and once more with a refusal if it gets one."""
        self._exchanges.append(Exchange(row.split_hash, row.messages, own, gold))
        if row.no_call_hash < self._settings.no_call * 2**64:
            refused = [*row.messages[:-1], _refusal(row.messages)]
            self._exchanges.append(Exchange(row.split_hash, refused, own, gold, refuses=True))

    def _shared(self, exchanges: list[Exchange]) -> list[Tool]:
        """Sample the candidates of a conversation, without what its refusals lack."""
        gold = {tool.name: tool for exchange in exchanges for tool in exchange.gold}
        lacking = {tool.name for exchange in exchanges if exchange.refuses for tool in exchange.gold}
        # of several definitions of a tool that is not gold, one beside a call counts
        refusals_first = sorted(exchanges, key=lambda exchange: exchange.refuses)[::-1]
        own = {tool.name: tool for exchange in refusals_first for tool in exchange.own} | gold
        for name, tool in [*own.items()]:  # what one row brings may do the same as another's gold tool
            if name not in gold and any(are_alike(tool, other) for other in gold.values()):
                del own[name]
        count = self._count(exchanges[0].key, "train") + len(lacking)
        sampled = self._pool.sample([*own.values()], gold, count, exchanges[0].key)
        return [tool for tool in sampled if tool.name not in lacking]

    def _tools_of(self, row: Row) -> tuple[list[Tool], list[Tool]]:
        """Return the tools of a row, and the gold tools among them."""
        own = [self._tools[tool] if isinstance(tool, int) else tool for tool in row.own]
        return own, [tool for tool in own if tool.name in row.called]

    def _held_out(self, gold: list[Tool]) -> str | None:
        """Return the split of held-out servers or tools that a question belongs to, if any."""
        if any(self._split.server(tool.server) for tool in gold):
            return "unseen_server"
        if any(self._split.tool(tool.server, tool.name) for tool in gold):
            return "unseen_tool"
        return None

    def _split_of(self, row: Row, gold: list[Tool], asked_in_a_test: bool) -> str:
        """Return a row's split: no question about tools is in both training and test."""
        if not row.own:  # plain chat
            return "train"
        if test := self._held_out(gold):
            return test
        # One question of each tool is always trained on, or the tool would not be seen. It is the one with
        # the highest hash, so that questions may move from training into the test, never back.
        if not asked_in_a_test and (not self._split.row(row.split_hash) or row.split_hash in self._kept):
            return "train"
        return "seen" if gold else "no_call"

    def _write(self, split: str, messages: list[Any], tools: list[Tool], server: str) -> None:
        sample: dict[str, Any] = {"messages": messages, "tools": [tool.described for tool in tools]}
        if split != "train":
            sample["server"] = server
        if split not in self._files:
            names = (f"{split}.jsonl", engine_file(split))
            self._files[split] = [
                self._open.enter_context((self._folder / name).open("wb", BUFFER)) for name in names
            ]
        lines, array = self._files[split]
        lines.write(msgspec.json.encode(sample) + b"\n")
        array.write((b",\n" if self.count[split] else b"[\n") + msgspec.json.encode(llama_factory(sample)))
        self.count[split] += 1

    def _write_no_call(self, split: str, row: Row, distractors: list[Tool]) -> None:
        """Write the row's question once more, without the gold tool and with a refusal as its answer."""
        if not distractors:
            return
        asked = _up_to_the_call(row.messages)[:-1]
        answer = _refusal(asked)
        split = "train" if split == "train" else "no_call"
        self._write(split, [*asked, answer], distractors, "")
        self.extra[split] += 1


def llama_factory(sample: Mapping[str, Any]) -> dict[str, Any]:
    """Return a sample in LLaMA-Factory's format.

    There a turn is either text or calls: text beside a call, reasoning, weights and later system messages
    are left out, and the results of parallel calls are joined.
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
            functions = [call["function"] for call in made]
            calls = [one | {"arguments": msgspec.Raw(one["arguments"])} for one in functions]
            value = msgspec.json.encode(calls if len(calls) > 1 else calls[0]).decode()
            turns.append({"from": "function_call", "value": value})
        elif message["role"] == "assistant":
            turns.append({"from": "gpt", "value": content})
    tools, first = [tool["function"] for tool in sample["tools"]], sample["messages"][0]
    return {
        "conversations": turns,
        "system": first["content"] if first["role"] == "system" else "",
        "tools": msgspec.json.encode(tools).decode() if tools else "",
    }


def _calls(messages: list[Any]) -> list[int]:
    """Return the positions of the messages whose calls are trained on."""
    return [
        place
        for place, message in enumerate(messages)
        if "tool_calls" in message and message.get("weight") != 0
    ]


def _is_single(messages: list[Any]) -> bool:
    return [message["role"] for message in messages] == ["system", "user", "assistant"]


def _refusal(messages: list[Any]) -> dict[str, Any]:
    """Return the answer to the last question that no candidate tool fits."""
    question = next(message["content"] for message in reversed(messages) if message["role"] == "user")
    return {"role": "assistant", "content": refusal(question)}


def _one_conversation(exchanges: list[Exchange]) -> list[dict[str, Any]]:
    """Return the messages of exchanges as one conversation, in which each call has an id of its own.

    Their order is random: a conversation was filled with refusals at its end, where no other call would fit.
    """
    messages, number = [exchanges[0].messages[0]], itertools.count(1)
    order = random.Random(exchanges[0].key).sample(exchanges, len(exchanges))
    for message in (message for one in order for message in one.messages[1:]):
        calls = [call | {"id": f"call_{next(number)}"} for call in message.get("tool_calls", ())]
        messages.append(message | {"tool_calls": calls} if calls else message)
    return messages


def _up_to_the_call(messages: list[Any]) -> list[Any]:
    calls = _calls(messages)
    return messages[: calls[0] + 1] if calls else messages


def _each_call(messages: list[Any]) -> Iterator[list[Any]]:
    """Yield the messages up to and including each call that is trained on; earlier ones are context."""
    for place in _calls(messages):
        before = [one | {"weight": 0} if one["role"] == "assistant" else one for one in messages[:place]]
        yield [*before, messages[place]]
