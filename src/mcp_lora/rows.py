"""The first pass of a conversion: rows are read, checked and put into a temporary file.

Which tools can be candidates is known when all rows have been read, not before. Of a row nothing
stays in memory but four bytes; of the tools, one definition each.
"""

import contextlib
import hashlib
import sqlite3
import struct
from array import array
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import msgspec

from mcp_lora import readers
from mcp_lora.accounts import Accounts
from mcp_lora.catalogue import Catalogue
from mcp_lora.checks import check
from mcp_lora.lengths import Lengths, Pieces
from mcp_lora.records import (
    CALL,
    ENGINE_ROLES,
    TAGS,
    Content,
    Fault,
    Origin,
    Rejected,
    Turn,
    as_json,
)

# Without a system message some templates render another prompt than the model's own chat
# template does, so that the adapter would be served another prompt than it was trained on.
SYSTEM = "You are a helpful assistant. Answer the user by calling the right tool."

Progress = Callable[[str, float], None]  # told what is being done, and which share of it is done

_BATCH = 1000
_TAGS = {tag: tag.encode() for tag in TAGS.values()}
_two_numbers = struct.Struct(">QQ").unpack


@dataclass(frozen=True)
class Settings:
    """How to convert; kept in stats.json, so that newer data is converted in the same way.

    Attributes:
        inputs: files, folders or globs; none means the newest data/filtered/filtered_*.json.
        tools: tool catalogues, files or folders.
        format: the shape of all rows, a name of readers.SHAPES; None goes by each row's keys.
        turns: "call" goes up to and with the first call, "all" keeps the whole conversation.
        max_observation: characters that a tool's result may have.
        candidates: tools offered per sample, the right one included.
        holdout_servers, holdout_tools: share of the servers and of the tools that is held out.
        test: share of the other rows that is held out, from 0 to below 1.
        no_call: share of extra samples in which the right tool is missing.
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


class Head(NamedTuple):
    """What is known of a row that can be used, but for what is said in it."""

    file: str
    number: int
    shape: str
    content: int  # two hashes of what it holds, of 64 bits
    other: int
    own: list[int | str]  # the tools that it brings: a number of the catalogue, or its JSON
    called: list[str]
    system: str
    turns: int


class Row(NamedTuple):
    """A row that can be used; the temporary file has a line for each part.

    `conversation` is its turns, each as JSON in LLaMA-Factory's sharegpt format, comma between.
    """

    head: Head
    conversation: bytes


class Rows:
    """The usable rows of a conversion, in a temporary file.

    Attributes:
        count: how many there are.
        lengths: tokens of each conversation without its tools, in order, if they are counted.
        kept: by called tool, (server, name), the highest content hash of its rows.
    """

    def __init__(self, spool: Path, catalogue: Catalogue, settings: Settings) -> None:
        self.count = 0
        self.lengths = array("I")
        self.kept: dict[tuple[str, str], int] = {}
        self._spool = spool
        self._catalogue = catalogue
        self._settings = settings
        # The seed decides what the hashes decide.
        self._hash = hashlib.blake2b(str(settings.seed).encode() + b"\n", digest_size=16)

    def read(
        self, found: list[Path], accounts: Accounts, lengths: Lengths | None, progress: Progress
    ) -> None:
        """Read files: a row is stored and counted, or rejected."""
        sizes = [file.stat().st_size for file in found]
        total, before, told = sum(sizes) or 1, 0, 0

        def report(done: int) -> None:
            nonlocal told
            if before + done > told + 1_000_000:
                told = before + done
                progress("reading", told / total)

        counting = _Counting(lengths, self.lengths)
        # On disk as soon as it grows: memory would not hold a set of all rows.
        with contextlib.closing(sqlite3.connect("")) as seen, self._spool.open("wb") as spool, counting:
            cursor = seen.execute("PRAGMA journal_mode = OFF")
            cursor.execute("CREATE TABLE row (hash INTEGER PRIMARY KEY) WITHOUT ROWID")
            insert = "INSERT OR IGNORE INTO row VALUES (?)"
            for file, size in zip(found, sizes, strict=True):
                for origin, content in readers.read(file, self._catalogue, self._settings.format, report):
                    account = accounts.of(origin.file, origin.shape)
                    account.read += 1
                    if isinstance(content, Rejected):
                        accounts.reject(content)
                        continue
                    try:
                        row = self._row(origin, content, counting)
                        if not cursor.execute(insert, (row.head.other - 2**63,)).rowcount:
                            raise Fault("duplicate", "the same question and call as in an earlier row")
                    except Fault as fault:
                        accounts.reject(Rejected(origin, fault.reason, fault.sentence))
                        continue
                    if content.cleaned:
                        account.cleaned.update(content.cleaned)
                    spool.write(b"%b\n%b\n" % (msgspec.json.encode(row.head), row.conversation))
                    self.count += 1
                    counting.keep()
                before += size

    def __iter__(self) -> Iterator[Row]:
        decode = msgspec.json.Decoder(Head).decode
        with self._spool.open("rb") as spool:
            for line in spool:
                yield Row(decode(line), next(spool)[:-1])

    def _row(self, origin: Origin, content: Content, counting: "_Counting") -> Row:
        settings = self._settings
        own: list[int | str] = []
        tools = content.tools
        for place, tool in enumerate(tools):
            number = self._catalogue.number(tool)
            if number is None:
                own.append(as_json(tool).decode())
            else:
                own.append(number)
                tools[place] = self._catalogue.tools[number]
        turns = check(content, self._catalogue, settings.turns == "all", settings.max_observation)
        messages = [(TAGS[turn.role], _text(turn)) for turn in turns]
        conversation = b", ".join(
            [b'{"from": "%b", "value": %b}' % (_TAGS[tag], as_json(text)) for tag, text in messages]
        )
        if content.system:
            as_json(content.system)
        counting.render(messages, content.system or SYSTEM)
        digest = self._hash.copy()
        digest.update(conversation)
        hashed, other = _two_numbers(digest.digest())
        called = list({call.name: None for turn in turns for call in turn.calls})
        for tool in tools:
            if called and tool.name == called[0]:
                key = tool.server, tool.name
                if hashed > self.kept.get(key, -1):
                    self.kept[key] = hashed
        head = Head(
            origin.file, origin.row, origin.shape, hashed, other, own, called, content.system, len(turns)
        )
        return Row(head, conversation)


class _Counting:
    """Counts tokens beside the reading: the tokenizer has threads of its own.

    `render` takes a conversation, `keep` says that its row is used.
    """

    def __init__(self, lengths: Lengths | None, into: "array[int]") -> None:
        self._lengths = lengths
        self._into = into
        self._last: Pieces = []
        self._batch: list[Pieces] = []
        self._running: deque[Future[list[int]]] = deque()
        self._executor = ThreadPoolExecutor(1)

    def __enter__(self) -> "_Counting":
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        try:
            if error is None:
                self._submit(0)
        finally:
            self._executor.shutdown(cancel_futures=True)

    def render(self, messages: list[tuple[str, str]], system: str) -> None:
        if self._lengths:
            in_engine = [{"role": ENGINE_ROLES[tag], "content": text} for tag, text in messages]
            self._last = self._lengths.render(in_engine, system, None)

    def keep(self) -> None:
        if self._lengths:
            self._batch.append(self._last)
            if len(self._batch) == _BATCH:
                self._submit(2)

    def _submit(self, may_run: int) -> None:
        if self._lengths and self._batch:
            self._running.append(self._executor.submit(self._lengths.count, self._batch))
            self._batch = []
        while len(self._running) > may_run:
            self._into.extend(self._running.popleft().result())


def _text(turn: Turn) -> str:
    """Return what a turn is for LLaMA-Factory: its text, or its calls as JSON."""
    if turn.role != CALL:
        return turn.text
    calls = [{"name": call.name, "arguments": call.arguments} for call in turn.calls]
    return as_json(calls if len(calls) > 1 else calls[0]).decode()
