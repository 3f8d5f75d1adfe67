r"""Read the records of a file, one at a time: a big file takes no more memory than a small one.

`.json` is an array of records, one record, or several concatenated records; `.jsonl` and `.jsonl.gz`
have one record per line, `.parquet` one per row. Text is UTF-8, with or without a byte order mark.
Invalid UTF-8 becomes lone surrogates, so that only the row that contains it is rejected.
"""

import codecs
import gzip
import hashlib
import json
import logging
import os
import re
import shlex
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, suppress
from decimal import Decimal
from glob import glob
from pathlib import Path
from typing import Any, NamedTuple, TextIO, TypeVar

import msgspec

from mcp_lora.data.records import mapped
from mcp_lora.errors import McpLoraError, one_line

SUFFIXES = (".json", ".jsonl", ".jsonl.gz", ".parquet")
SKIPPED = "hidden, broken links, linked folders (name them to read them), or written by mcp-lora"
_OUTPUTS = ("stats.json", "run.yaml")  # they mark the folder of a conversion or a run
CHUNK = 1 << 17  # characters decoded at a time
WAIT = 3600.0  # seconds for files that another process makes, of this node or of another
PATIENCE = 5.0  # of them without a word
BUFFER = 1 << 20  # bytes read or written at a time
_LOOKAHEAD = 32  # chunks to search for the end of a broken element
_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*(?:(?P<closed>")|\\?\Z)|[{}\[\]]', re.DOTALL)  # a string or a bracket
_SEPARATORS = re.compile(r"[\s,]*")

_T = TypeVar("_T")
Progress = Callable[[int], None]  # receives the number of bytes read so far


class Broken(NamedTuple):
    """A record that cannot be read: what is wrong with it, and its text if it is known."""

    message: str
    text: str | None = None


def find(places: list[Path], command: str = "mcp-lora convert OTHER_FILE") -> tuple[list[Path], int]:
    """Return the files that `places` refer to: files, folders (searched recursively) and globs.

    Also returns how many files in the folders were skipped (see SKIPPED). `command` is the next command to
    run after an error.

    Raises McpLoraError if a place contains no readable file, a folder cannot be listed, or a file name is not
    valid UTF-8.
    """
    found, missing, skipped = list[Path](), list[str](), 0
    for place in places:
        if os.path.isdir(place):
            there = sorted(place.rglob("*"))  # not in linked folders, which may lead in circles
            walked = (one for one in there if one.is_dir() and not one.is_symlink())
            for one in (place, *walked):  # rglob passes over what it cannot list
                if not os.access(one, os.R_OK | os.X_OK) and not _is_hidden(one, place):
                    again = f"chmod -R u+rX {shlex.quote(str(one))}, or name other folders or files"
                    raise McpLoraError(f"{one} cannot be listed: {again}")
            every = [
                one for one in there if (one.is_symlink() if one.is_dir() else one.name.endswith(SUFFIXES))
            ]
            outputs = {file.parent for file in there if file.name in _OUTPUTS and _is_output(file)}
            files = [file for file in every if not _is_skipped(file, place, outputs)]
            skipped += len(every) - len(files)
        else:
            files = [place] if os.path.exists(place) else sorted(map(Path, glob(str(place), recursive=True)))
        if not files:
            missing.append(str(place))
        found += files
    kinds = ", ".join(SUFFIXES)
    if missing:
        others = f"; {skipped} files are {SKIPPED}" * bool(skipped)
        raise McpLoraError(f"no data in {', '.join(missing)} ({kinds}{others}): {command}")
    if unknown := [str(file) for file in found if not file.name.endswith(SUFFIXES)]:
        raise McpLoraError(f"{', '.join(unknown)}: not one of {kinds}: {command}")
    for file in found:
        try:
            str(file).encode()
        except UnicodeEncodeError:
            raise McpLoraError(f"{str(file)!r}: the file name is not valid UTF-8: rename it") from None
    return list(dict.fromkeys(found)), skipped


def _is_output(marker: Path) -> bool:
    """Tell whether mcp-lora wrote a marker file; other programs write a stats.json, too."""
    if marker.name != "stats.json":
        return True
    with suppress(OSError, ValueError, RecursionError):
        content = json.loads(marker.read_bytes())
        return isinstance(content, dict) and "settings" in content
    return False


def _is_skipped(file: Path, place: Path, outputs: set[Path]) -> bool:
    """Tell whether a file in `place` is skipped (see SKIPPED); `outputs` are folders of mcp-lora."""
    is_output = file.name.endswith(".rejected.jsonl") or not outputs.isdisjoint(file.parents)
    return _is_hidden(file, place) or is_output or not file.is_file()


def _is_hidden(path: Path, place: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(place).parts)


def read(file: Path, progress: Progress = lambda done: None) -> Iterator[Any]:
    """Yield the records of a file in order, with a Broken in place of each unreadable one.

    A broken line or array element affects nothing else. A truncated `.json` or compressed file ends with
    one Broken, as the records after that point cannot be separated.
    """
    try:
        with file.open("rb") as stream:
            if stream.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
                yield Broken("the file is UTF-16: save it as UTF-8")
                return
        if file.name.endswith(".parquet"):
            yield from _parquet(file, progress)
        elif file.name.endswith(".json"):
            with file.open(buffering=BUFFER, encoding="utf-8", errors="surrogateescape") as stream:
                yield from _values(stream, progress)
        else:
            yield from _lines(file, progress)
    except (OSError, EOFError, zlib.error) as error:
        yield _stopped(error)


def load(file: Path, command: str) -> dict[str, Any]:
    """Return the JSON object in a file written by mcp-lora, or an empty one if there is no such file.

    Raises McpLoraError if it is damaged; `command` is the next command to run.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise McpLoraError(f"{file} is damaged: {command}")
    return content


def exclusive(lock: Path, problem: str, wait: float = 0) -> AbstractContextManager[Any]:
    """Lock a file, which is made and remains, until the returned context ends.

    Args:
        lock: the file.
        problem: the message of the McpLoraError that is raised if another process keeps it locked.
        wait: seconds to wait for that process.

    Raises an OSError if the file cannot be made.
    """
    import filelock

    found = filelock.FileLock(lock)
    try:
        with suppress(filelock.Timeout):
            return found.acquire(timeout=min(wait, PATIENCE))
        if wait:  # logging prints it on stderr, also for the callers that have no way to print
            logging.getLogger("mcp_lora").warning("mcp-lora: waiting for the process that locks %s", lock)
        return found.acquire(timeout=wait)
    except filelock.Timeout:
        raise McpLoraError(problem) from None


def typed(content: Any, kind: type[_T]) -> _T:
    """Return JSON as a dataclass, without keys that it does not have; raise a ValueError if it is invalid."""
    return msgspec.convert(content, kind, dec_hook=lambda other, value: other(value))


def parsed(file: Path, kind: type[_T], command: str) -> _T:
    """Return a JSON object as a dataclass, without keys that it does not have; else as `load`."""
    try:
        return typed(load(file, command), kind)
    except ValueError as error:
        raise McpLoraError(f"{file} is damaged ({error}): {command}") from None


def sha256(file: Path) -> str:
    """Return the SHA-256 of a file's content."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _lines(file: Path, progress: Progress) -> Iterator[Any]:
    # Split the bytes, not the text: str.splitlines also breaks at characters that JSON may contain.
    with file.open("rb", BUFFER) as raw:
        for number, line in enumerate(gzip.GzipFile(fileobj=raw) if file.suffix == ".gz" else raw):
            line = line.strip()
            if number == 0:
                line = line.removeprefix(codecs.BOM_UTF8)
            if line:
                yield _decoded(line)
            if number % 256 == 0:  # tell() is as slow as reading a line
                progress(raw.tell())


def _decoded(line: bytes) -> Any:
    with suppress(ValueError, RecursionError):
        return msgspec.json.decode(line)
    # Python's json accepts more: NaN, control characters, lone surrogates.
    text = line.decode("utf-8", "surrogateescape")
    try:
        return json.loads(text, strict=False)
    except (ValueError, RecursionError) as error:
        return Broken(f"it is not JSON: {one_line(error)}", text)


def _values(stream: TextIO, progress: Progress) -> Iterator[Any]:
    """Yield the elements of the array in a file, or its concatenated values."""
    decode = json.JSONDecoder(strict=False).raw_decode
    text, at, size, ended, count = stream.read(1).removeprefix("\ufeff"), 0, CHUNK, False, 0
    array: bool | None = None  # not known before the first character
    while True:
        at = _SEPARATORS.match(text, at).end()  # type: ignore[union-attr]  # it also matches the empty string
        problem, broken = "", False
        if at < len(text):
            if array is None:
                array = text[at] == "["
                at += array
                continue
            if array and text[at] == "]":
                if text[at + 1 :].strip() or stream.read(CHUNK).strip():
                    yield Broken(f"there is text after the end of the array of {count} records")
                return
            try:
                value, end = decode(text, at)
                if not (ended or end < len(text) or text[end - 1] in '}]"'):
                    end = 0  # a number may continue
            except (ValueError, RecursionError) as error:
                problem = getattr(error, "msg", None) or one_line(error)
                # An error near the end of the text may only mean that the value continues in the next chunk.
                near = getattr(error, "pos", -1) > len(text) - 16
                broken = not (near or problem.startswith("Unterminated string"))
                end = _end_of_element(text, at) if array and (broken or ended) else 0
                value = Broken(f"it is not JSON: {problem}", text[at:end])
            if end:
                yield value
                count += 1
                at, size = end, CHUNK
                continue
        if ended or (broken and (not array or len(text) - at > _LOOKAHEAD * CHUNK)):
            if problem:
                yield Broken(f"not JSON after {count} records, the rest is not read: {problem}")
            elif array:
                yield Broken(f"the array is not closed: the file ends after {count} records")
            return
        more = stream.read(size)
        progress(stream.buffer.tell())
        text, at, size, ended = text[at:] + more, 0, 2 * size, not more


def _end_of_element(text: str, at: int) -> int:
    """Return where an invalid array element ends, judging by its brackets; 0 if that is not found."""
    closing = ""
    for token in _TOKEN.finditer(text, at):
        if token.group() in "{[":
            closing += "}" if token.group() == "{" else "]"
        elif token.group() in "}]":
            if not closing.endswith(token.group()):
                return 0
            closing = closing[:-1]
        elif not token["closed"]:
            return 0
        if not closing:
            return token.end()
    return 0


def _parquet(file: Path, progress: Progress) -> Iterator[Any]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            size, read, count = file.stat().st_size, 0, table.metadata.num_rows
            for batch in table.iter_batches(batch_size=256):
                yield from mapped(batch.to_pylist(), _number)
                read += batch.num_rows
                progress(size * read // count)
    except (pyarrow.ArrowException, ValueError, LookupError, OverflowError) as error:  # times, zones, texts
        yield _stopped(error)


def _number(value: Any) -> Any:
    """Return a decimal as the number that JSON has, and anything else unchanged."""
    if not isinstance(value, Decimal):
        return value
    return int(value) if value == value.to_integral_value() else float(value)


def _stopped(error: Exception) -> Broken:
    return Broken(f"the file cannot be read any further: {one_line(error)}")
