"""The first pass of a conversion: rows are read, checked and put into a temporary file.

Which tools can be candidates is known when all rows have been read, not before. Of a row nothing stays in
memory; of the tools, one definition each.
"""

import contextlib
import hashlib
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from mcp_lora import readers
from mcp_lora.accounts import Accounts
from mcp_lora.catalogue import Catalogue
from mcp_lora.checks import check
from mcp_lora.records import ANSWER, RESULT, USER, Content, Fault, Origin, Rejected, Tool, Turn, as_json

# Models without a system message of their own are trained, and served, with this one.
SYSTEM = "You are a helpful assistant. Answer the user by calling the right tool."

Progress = Callable[[str, float], None]  # receives what is being done, and which share of it is done


@dataclass(frozen=True)
class Settings:
    """How to convert; kept in stats.json, so that changed data is converted in the same way.

    Attributes:
        inputs: files, folders or globs; none means the newest data/filtered/filtered_*.json.
        tools: tool catalogues, files or folders.
        format: the format of all rows, a name of readers.SHAPES; None goes by each row's keys.
        turns: "call" goes up to and with the first call, "all" keeps the whole conversation.
        max_observation: characters that a tool's result may have.
        candidates: candidate tools of a sample, the gold tool included.
        holdout_servers, holdout_tools: share of the servers and of the tools that is held out.
        test: share of the other rows that is held out, from 0 to below 1.
        no_call: share of extra samples in which the gold tool is missing.
        seed: decides what is held out, the candidate tools and their order.
    """

    inputs: list[str] = field(default_factory=list)
    tools: list[str] = field(default_factory=list)
    format: str | None = None
    turns: str = "call"
    max_observation: int = 4000
    candidates: int = 10
    holdout_servers: float = 0.0
    holdout_tools: float = 0.0
    test: float = 0.1
    no_call: float = 0.0
    seed: int = 42


class Row(msgspec.Struct):
    """A row that can be used.

    Attributes:
        file, shape: where it comes from, for its account.
        content, other: two hashes of 64 bits of what it holds.
        own: the tools that it brings, each a number of the catalogue or a definition of its own.
        called: the names of the tools that it calls.
        messages: the conversation, in OpenAI's form.
    """

    file: str
    shape: str
    content: int
    other: int
    own: list[int | Tool]
    called: list[str]
    messages: list[dict[str, Any]]


class Rows:
    """The usable rows of a conversion, in a temporary file.

    Attributes:
        count: how many there are.
        kept: by called tool, (server, name), the highest content hash of its rows.
    """

    def __init__(self, spool: Path, catalogue: Catalogue, settings: Settings) -> None:
        self.count = 0
        self.kept: dict[tuple[str, str], int] = {}
        self._spool = spool
        self._catalogue = catalogue
        self._settings = settings

    def read(self, found: Sequence[Path], accounts: Accounts, progress: Progress) -> None:
        """Read files: a row is stored, or rejected."""
        total = sum(file.stat().st_size for file in found) or 1
        before = 0
        # On disk as soon as it grows: memory would not hold a set of all rows.
        with contextlib.closing(sqlite3.connect("")) as seen, self._spool.open("wb") as spool:
            seen.execute("PRAGMA journal_mode = OFF")
            seen.execute("CREATE TABLE row (hash INTEGER PRIMARY KEY) WITHOUT ROWID")
            for file in found:
                read = readers.read(
                    file,
                    self._catalogue,
                    self._settings.format,
                    lambda done, before=before: progress("reading", (before + done) / total),  # type: ignore[misc]
                )
                for origin, content in read:
                    account = accounts.of(origin.file, origin.shape)
                    account.read += 1
                    try:
                        if isinstance(content, Rejected):
                            raise Fault(content.reason, content.sentence)
                        row = self._row(origin, content)
                        new = seen.execute(
                            "INSERT OR IGNORE INTO row VALUES (?)", (row.other - 2**63,)
                        ).rowcount
                        if not new:
                            raise Fault("duplicate", "the same question and call as in an earlier row")
                    except Fault as fault:
                        accounts.reject(Rejected(origin, fault.reason, fault.sentence))
                        continue
                    account.cleaned.update(content.cleaned)
                    spool.write(msgspec.json.encode(row) + b"\n")
                    self.count += 1
                before += file.stat().st_size

    def __iter__(self) -> Iterator[Row]:
        """Yield the rows, in the order of reading."""
        decode = msgspec.json.Decoder(Row).decode
        with self._spool.open("rb") as spool:
            yield from map(decode, spool)

    def _row(self, origin: Origin, content: Content) -> Row:
        settings, tools = self._settings, content.tools
        own: list[int | Tool] = []
        for place, tool in enumerate(tools):
            number = self._catalogue.number(tool)
            if number is None:
                as_json(tool)
                own.append(tool)
            else:
                own.append(number)
                tools[place] = self._catalogue.tools[number]
        turns = check(content, self._catalogue, settings.turns == "all", settings.max_observation)
        system = content.system or SYSTEM
        said = [(turn.role, turn.text, turn.calls, turn.reasoning) for turn in turns]  # ids say nothing
        digest = hashlib.blake2b(as_json((settings.seed, system, said)), digest_size=16).digest()
        hashed, other = int.from_bytes(digest[:8]), int.from_bytes(digest[8:])
        called = list({call.name: None for turn in turns for call in turn.calls})
        for tool in tools:
            if called and tool.name == called[0]:
                key = tool.server, tool.name
                self.kept[key] = max(hashed, self.kept.get(key, -1))
        messages = [{"role": "system", "content": system}, *messages_of(turns)]
        return Row(origin.file, origin.shape, hashed, other, own, called, messages)


def messages_of(turns: Sequence[Turn]) -> list[dict[str, Any]]:
    """Return turns as OpenAI's messages; calls without an id get call_1, call_2, results one in order."""
    messages: list[dict[str, Any]] = []
    number = 0
    waiting: list[str] = []  # ids of calls without a result
    for turn in turns:
        if turn.role == USER:
            messages.append({"role": "user", "content": turn.text})
        elif turn.role == RESULT:
            given = next((name for name in turn.ids if name in waiting), None)
            answered = given or (waiting[0] if waiting else "")
            if answered in waiting:
                waiting.remove(answered)
            messages.append({"role": "tool", "tool_call_id": answered, "content": turn.text})
        else:
            message: dict[str, Any] = {"role": "assistant", "content": turn.text}
            if turn.reasoning:
                message["reasoning_content"] = turn.reasoning
            if turn.role != ANSWER:
                message["content"] = turn.text or None
                message["tool_calls"] = calls = []
                waiting = []
                for place, call in enumerate(turn.calls):
                    number += 1
                    name = (turn.ids[place] if place < len(turn.ids) else "") or f"call_{number}"
                    waiting.append(name)
                    arguments = as_json(call.arguments).decode()
                    function = {"name": call.name, "arguments": arguments}
                    calls.append({"id": name, "type": "function", "function": function})
            messages.append(message)
    return messages
