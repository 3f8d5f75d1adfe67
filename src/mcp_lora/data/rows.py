r"""The first pass of a conversion: rows are read, checked and put into a temporary file.

Candidate tools can only be sampled once all rows have been read. No row stays in memory; each tool is kept
once. A row that cannot be used becomes a line of rejected.jsonl:

    {"file": "data/rows.json", "row": 3, "reason": "no-call", "message": "a call has no name, …",
     "record": {"instruction": "…", "function_call": {}}}
"""

import contextlib
import hashlib
import json
import re
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from mcp_lora.data import files, formats
from mcp_lora.data.catalogue import Catalogue
from mcp_lora.data.records import (
    RESULT,
    SYSTEM,
    USER,
    Content,
    RowError,
    Settings,
    Source,
    Tool,
    Turn,
    as_json,
)
from mcp_lora.data.redact import redact
from mcp_lora.data.validate import check

# Rows without a system message of their own get this one.
SYSTEM_MESSAGE = "You are a helpful assistant. Answer the user by calling the right tool."

Progress = Callable[[str, float], None]  # receives the current step, and which fraction of it is done


class Row(msgspec.Struct):
    """A usable row.

    Attributes:
        file, format: where it comes from, for the statistics.
        split_hash, no_call_hash: 64-bit hashes of its question, ignoring case, spaces and punctuation; they
            decide its split, and whether it gets a no-call sample.
        own: the tools in the row, each a number in the catalogue or a definition of its own.
        called: the names of the tools that it calls.
        messages: the conversation, in OpenAI's format.
    """

    file: str
    format: str
    split_hash: int
    no_call_hash: int
    own: list[int | Tool]
    called: list[str]
    messages: list[dict[str, Any]]


class Rows:
    """The usable rows of a conversion, in a temporary file.

    Attributes:
        count: number of rows.
        kept: by called tool, (server, name), the highest split_hash of its questions.
        sources: counts of all rows, by (file, format).
    """

    def __init__(self, folder: Path, catalogue: Catalogue, settings: Settings) -> None:
        self.count = 0
        self.kept: dict[tuple[str, str], int] = {}
        self.sources: dict[tuple[str, str], Source] = {}
        self._folder = folder
        self._catalogue = catalogue
        self._settings = settings

    def read(self, found: list[Path], progress: Progress) -> None:
        """Read files and store or reject each row."""
        total = sum(file.stat().st_size for file in found) or 1
        before = 0

        def advanced(done: int) -> None:
            progress("reading", (before + done) / total)

        with contextlib.ExitStack() as stack:
            spool = stack.enter_context((self._folder / "rows").open("wb", files.BUFFER))
            rejected = stack.enter_context((self._folder / "rejected.jsonl").open("wb"))
            # SQLite moves the table to disk as it grows: a set of all rows might not fit in memory.
            seen = stack.enter_context(contextlib.closing(sqlite3.connect("")))
            seen.execute("PRAGMA journal_mode = OFF")
            seen.execute("CREATE TABLE row (hash INTEGER PRIMARY KEY) WITHOUT ROWID")
            for file in found:
                name, find = str(file), partial(self._catalogue.find, server=file.stem)
                for number, record in enumerate(formats.records(files.read(file, advanced)), start=1):
                    broken = isinstance(record, files.Broken)
                    key = name, "?" if broken else formats.recognise(record)
                    source = self.sources[key] = self.sources.get(key) or Source(*key)
                    source.read += 1
                    is_log = formats.is_session(record)
                    try:
                        if broken:
                            raise RowError("not-json", record.message)
                        if self._settings.redact or (self._settings.redact is None and is_log):
                            try:
                                record, replaced = redact(record)
                            except RecursionError:
                                record = None  # which rejected.jsonl must not show either
                                what = "it is nested too deeply to be redacted"
                                raise RowError("not-json-value", what) from None
                            for kind, count in replaced.items():
                                source.cleaned[f"redacted {kind}"] += count
                        content = formats.read(record, find)
                        row, same = self._row(source, content)
                        if not seen.execute("INSERT OR IGNORE INTO row VALUES (?)", (same,)).rowcount:
                            raise RowError("duplicate", "an earlier row has the same conversation and tools")
                    except RowError as error:
                        source.rejected[error.reason] += 1
                        rejected.write(_rejection(name, number, error, record.text if broken else record))
                        continue
                    source.cleaned.update(content.cleaned)
                    spool.write(msgspec.json.encode(row) + b"\n")
                    self.count += 1
                before += file.stat().st_size

    def __iter__(self) -> Iterator[Row]:
        """Yield the rows in the order in which they were read."""
        decode = msgspec.json.Decoder(Row).decode
        with (self._folder / "rows").open("rb", files.BUFFER) as spool:
            yield from map(decode, spool)

    def total(self, what: str) -> Counter[str]:
        """Return the total of `cleaned`, `rejected` or `written` over all files."""
        return sum((getattr(source, what) for source in self.sources.values()), Counter())

    def _row(self, source: Source, content: Content) -> tuple[Row, int]:
        """Return a row, and the hash of its conversation and tools, by which duplicates are found."""
        settings, known = self._settings, self._catalogue.tools
        numbers = [self._catalogue.number(tool) for tool in content.tools]
        own = [tool if n is None else n for tool, n in zip(content.tools, numbers, strict=True)]
        content.tools = [known[tool] if isinstance(tool, int) else tool for tool in own]  # with validators
        turns = check(content, self._catalogue, settings)
        if settings.turns == "call":
            every, kept = (sum(len(turn.calls) for turn in each) for each in (content.turns, turns))
            content.cleaned += ["later-call"] * (every - kept)
        if turns[0].role != SYSTEM and own:  # plain chat has none
            turns.insert(0, Turn(SYSTEM, SYSTEM_MESSAGE))
        # ids do not make a row different
        said = [(turn.role, turn.text, turn.calls, turn.reasoning, turn.trained) for turn in turns]
        shown = [tool if isinstance(tool, int) else msgspec.structs.astuple(tool) for tool in own]
        same = hashlib.blake2b(as_json((said, shown)), digest_size=8).digest()
        asked = ""
        for turn in turns:
            if turn.calls and turn.trained:
                break
            asked = turn.text if turn.role == USER else asked
        # without case, spaces and punctuation, so that near copies count as the same
        bare = re.sub(r"[\W_]+", "", asked.casefold()) or asked
        digest = hashlib.blake2b(f"{settings.seed}\n{bare}".encode(), digest_size=16).digest()
        split_hash, no_call_hash = int.from_bytes(digest[:8]), int.from_bytes(digest[8:])
        called = list({call.name: None for turn in turns for call in turn.calls})
        for tool in content.tools:
            if called and tool.name == called[0]:
                key = tool.server, tool.name
                self.kept[key] = max(split_hash, self.kept.get(key, -1))
        place = source.file, source.format
        row = Row(*place, split_hash, no_call_hash, own, called, messages_of(turns))
        return row, int.from_bytes(same, signed=True)


def _rejection(file: str, number: int, error: RowError, record: Any) -> bytes:
    line = {"file": file, "row": number, "reason": error.reason, "message": str(error), "record": record}
    try:
        text = json.dumps(line, ensure_ascii=False, default=str)
    except (RecursionError, ValueError, TypeError):  # too deeply nested, or keys that JSON does not allow
        text = json.dumps(line | {"record": None})
    # a lone surrogate becomes its JSON escape
    return text.encode(errors="backslashreplace") + b"\n"


def messages_of(turns: list[Turn]) -> list[dict[str, Any]]:
    """Return turns as OpenAI messages; calls without an id get call_1, call_2, …, in order with results."""
    messages: list[dict[str, Any]] = []
    number = 0
    waiting: list[str] = []  # ids of calls without a result
    for turn in turns:
        if turn.role in (USER, SYSTEM):
            messages.append({"role": turn.role, "content": turn.text})
        elif turn.role == RESULT:
            answered = next((name for name in turn.ids if name in waiting), waiting[0] if waiting else "")
            if waiting:
                waiting.remove(answered)
            messages.append({"role": "tool", "tool_call_id": answered, "content": turn.text})
        else:
            message: dict[str, Any] = {"role": "assistant", "content": turn.text}
            if turn.reasoning:
                message["reasoning_content"] = turn.reasoning
            if not turn.trained:
                message["weight"] = 0
            if turn.calls:
                message["content"] = turn.text or None
                message["tool_calls"] = calls = []
                waiting = []
            for call, given in zip(turn.calls, turn.ids, strict=True):
                number += 1
                waiting.append(given or f"call_{number}")
                arguments = msgspec.json.encode(call.arguments).decode()
                function = {"name": call.name, "arguments": arguments}
                calls.append({"id": waiting[-1], "type": "function", "function": function})
            messages.append(message)
    return messages
