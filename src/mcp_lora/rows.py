"""The first pass of a conversion: rows are read, checked and put into a temporary file.

Which tools can be candidates is known when all rows have been read, not before. Of a row nothing
stays in memory, but the four bytes of its length; of the tools, one definition each.
"""

import contextlib
import hashlib
import json
import multiprocessing
import sqlite3
import struct
import sys
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice, repeat
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple, Self

import msgspec

from mcp_lora import forking, readers
from mcp_lora.accounts import Accounts
from mcp_lora.catalogue import Catalogue
from mcp_lora.checks import check
from mcp_lora.lengths import Lengths, Pieces
from mcp_lora.records import (
    CALL,
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
_TAGS = {role: tag.encode() for role, tag in TAGS.items()}
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

    def sample(self, tools: str | None = None) -> dict[str, Any]:
        """Return it as a sample with these tools."""
        turns = json.loads(b"[%b]" % self.conversation)
        return {"conversations": turns, "system": self.head.system or SYSTEM, "tools": tools}


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
        self._places = [0]  # where in the file every _BATCH-th row begins
        self._catalogue = catalogue
        self._settings = settings
        # The seed decides what the hashes decide.
        self._hash = hashlib.blake2b(str(settings.seed).encode() + b"\n", digest_size=16)

    def read(
        self, found: list[Path], accounts: Accounts, counting: "Counting | None", progress: Progress
    ) -> None:
        """Read files: a row is stored, or rejected."""
        sizes = [file.stat().st_size for file in found]
        total, before, told = sum(sizes) or 1, 0, 0

        def report(done: int) -> None:
            nonlocal told
            if before + done > told + 1_000_000:
                told = before + done
                progress("reading", told / total)

        # On disk as soon as it grows: memory would not hold a set of all rows.
        with contextlib.closing(sqlite3.connect("")) as seen, self._spool.open("wb") as spool:
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
                        row = self._row(origin, content)
                        if not cursor.execute(insert, (row.head.other - 2**63,)).rowcount:
                            raise Fault("duplicate", "the same question and call as in an earlier row")
                    except Fault as fault:
                        accounts.reject(Rejected(origin, fault.reason, fault.sentence))
                        continue
                    if content.cleaned:
                        account.cleaned.update(content.cleaned)
                    spool.write(b"%b\n%b\n" % (msgspec.json.encode(row.head), row.conversation))
                    self.count += 1
                    if self.count % _BATCH == 0:
                        self._places.append(spool.tell())
                        if counting:
                            spool.flush()
                            counting.advance()
                before += size

    def beginning(self, place: int) -> int:
        """Return the last place up to this one where `between` can begin."""
        return place // _BATCH * _BATCH

    def between(self, start: int = 0, stop: int = sys.maxsize) -> Iterator[Row]:
        """Yield the rows from `start`, a `beginning`, up to `stop`."""
        decode = msgspec.json.Decoder(Head).decode
        with self._spool.open("rb") as spool:
            spool.seek(self._places[start // _BATCH])
            for _ in range(start, stop):
                line = spool.readline()
                if not line:
                    return
                yield Row(decode(line), spool.readline()[:-1])

    def _row(self, origin: Origin, content: Content) -> Row:
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
        conversation = b", ".join(
            [b'{"from": "%b", "value": %b}' % (_TAGS[turn.role], as_json(_text(turn))) for turn in turns]
        )
        if content.system:
            as_json(content.system)
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


class Counted(NamedTuple):
    """The tokens of each conversation without its tools, and why some cannot be rendered, by their place."""

    lengths: "array[int]"
    faults: dict[int, str]


class Counting:
    """Counts the tokens of rows; where there are many in another process, beside the reading.

    That is a copy of this process, which reads what is in the rows' temporary file already: Python
    lets one thread run at a time, and rendering takes as long as reading.
    """

    def __init__(self, rows: Rows, lengths: Lengths) -> None:
        self._rows = rows
        self._lengths = lengths
        self._copy = contextlib.ExitStack()
        self._told: Connection | None = None
        self._result: Callable[[], Counted] = lambda: self._count(repeat(_BATCH))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._copy.close()

    def advance(self) -> None:
        """Say that the file has so many more rows as a batch has."""
        if forking.POSSIBLE:
            if not self._told:
                ours, self._told = multiprocessing.Pipe(duplex=False)
                told = self._told
                self._copy.callback(told.close)

                def count() -> Counted:
                    told.close()  # or this process would not see that the other one has ended
                    return self._count(iter(ours.recv, 0))

                self._result = self._copy.enter_context(forking.beside(count))
                ours.close()
            self._send(_BATCH)

    def result(self) -> Counted:
        """Count the rest and return what all rows have, when all are in the file."""
        if self._told:
            self._send(self._rows.count % _BATCH)
            self._send(0)
        return self._result()

    def _send(self, number: int) -> None:
        assert self._told
        with contextlib.suppress(BrokenPipeError):  # `result` says what has happened
            self._told.send(number)

    def _count(self, numbers: Iterable[int]) -> Counted:
        """Count rows from the first one on, so many at a time."""
        counted = Counted(array("I"), {})
        source = self._rows.between()
        for number in numbers:
            rendered: list[Pieces] = []
            for row in islice(source, number):
                try:
                    rendered.append(self._lengths.render_sample(row.sample()))
                except Fault as fault:
                    counted.faults[len(counted.lengths) + len(rendered)] = fault.sentence
                    rendered.append([])
            if not rendered:
                break
            counted.lengths.extend(self._lengths.count(rendered))
        return counted


def _text(turn: Turn) -> str:
    """Return what a turn is for LLaMA-Factory: its text, or its calls as JSON."""
    if turn.role != CALL:
        return turn.text
    calls = [{"name": call.name, "arguments": call.arguments} for call in turn.calls]
    return as_json(calls if len(calls) > 1 else calls[0]).decode()
