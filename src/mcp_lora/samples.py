r"""The second pass of a conversion: each row gets its split and its candidate tools, and is written.

A sample, in LLaMA-Factory's sharegpt format (its data/README.md; a `function_call` turn is the
call as a JSON string, or a list of parallel ones, `tools` the candidate tools as a JSON string):

    {"conversations": [{"from": "human", "value": "What is 128 * 46?"},
                       {"from": "function_call",
                        "value": "{\"name\": \"calculate\", \"arguments\": {\"expression\": …}}"}],
     "system": "You are a helpful assistant …",
     "tools": "[{\"name\": \"calculate\", \"description\": …, \"parameters\": …}]"}
"""

import contextlib
import io
import json
import shutil
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from mcp_lora import forking, languages
from mcp_lora.accounts import Accounts
from mcp_lora.candidates import Drawn, Offer, Pool, Split
from mcp_lora.catalogue import Catalogue
from mcp_lora.lengths import Lengths
from mcp_lora.records import Fault, Origin, Rejected, Tool, as_json
from mcp_lora.rows import SYSTEM, Counted, Counting, Head, Progress, Row, Rows

TRAIN, TEST = "mcp_train", "mcp_test_seen"
UNSEEN_TOOL, UNSEEN_SERVER, NO_CALL = "mcp_test_unseen_tool", "mcp_test_unseen_server", "mcp_test_no_call"
SPLITS = (TRAIN, TEST, UNSEEN_TOOL, UNSEEN_SERVER, NO_CALL)

LIMIT = 100_000_000  # bytes; a bigger file is JSON Lines, which the engine reads as a stream

WORTH_A_PROCESS = 20_000  # rows
_SHARED = 40_000  # rows that two processes write at a time: a part is gone before it reaches the disk
_BATCH = 500
_APART = ".lines.apart"
_SYSTEM = as_json(SYSTEM)


class _Sample(NamedTuple):
    """A sample before it is written: `tokens` are those of the conversation without its tools."""

    row: Head
    split: str
    conversation: bytes
    tokens: int
    drawn: Drawn


class Samples:
    """Writes the samples of a conversion into `folder`, a file a split.

    Attributes:
        extra: no-call samples that were made, by split.
        lengths: tokens of each sample to train on, if they are counted.
        shortened: samples that lost tools to fit.
        dropped: tools that they lost.
    """

    def __init__(
        self, folder: Path, catalogue: Catalogue, split: Split, candidates: int, no_call: float
    ) -> None:
        self.extra: Counter[str] = Counter()
        self.lengths = array("I")
        self.shortened = self.dropped = 0
        self._folder = folder
        self._catalogue = catalogue
        self._split = split
        self._candidates = candidates
        self._no_call = no_call
        self._pool = Pool(catalogue, split)
        self._written: Counter[tuple[str, str, str]] = Counter()  # by file, shape and split
        self._rejected: list[Rejected] = []
        self._ending = ".lines"
        self._lines: defaultdict[str, list[bytes]] = defaultdict(list)  # by split, to be written
        self._outputs: dict[str, io.FileIO] = {}
        self._writing: Future[None] | None = None
        self._texts: dict[int, bytes] = {}  # a tool's JSON as it stands in a string, by its number
        self._adds: dict[int, int | None] = {}  # tokens that a tool adds, by its number
        self._counted = Counted(array("I"), {})

    def write(
        self,
        rows: Rows,
        accounts: Accounts,
        lengths: Lengths | None,
        counting: Counting | None,
        progress: Progress,
    ) -> None:
        """Write a sample for every row, or reject a row that is too long.

        Rows do not depend on each other: of many, another process writes a part.
        """
        many = forking.POSSIBLE and rows.count >= WORTH_A_PROCESS
        if lengths and many:  # once, for both
            self._count_tools(range(len(self._catalogue.tools)), lengths)
        if counting:
            self._counted = counting.result()
        start = 0
        while start < rows.count:
            stop = min(rows.beginning(start + _SHARED), rows.count) if many else rows.count
            middle = rows.beginning((start + stop) // 2) if many else start
            if middle > start:
                with forking.beside(partial(self._write_apart, rows, middle, stop, lengths)) as other:
                    self._write_rows(rows, start, middle, lengths, progress)
                    self._add(*other())
            else:
                self._write_rows(rows, start, stop, lengths, progress)
            start = stop
        for (file, shape, split), count in self._written.items():
            accounts.of(file, shape).written[split] = count
        for rejected in self._rejected:
            accounts.reject_late(rejected)

    def _write_apart(self, rows: Rows, start: int, stop: int, lengths: Lengths | None) -> tuple[Any, ...]:
        """Write rows into files of their own; return what `_add` takes. For another process."""
        self._written, self._rejected, self.extra = Counter(), [], Counter()
        self.lengths, self.shortened, self.dropped = array("I"), 0, 0
        self._ending = _APART
        self._write_rows(rows, start, stop, lengths, lambda doing, share: None)
        return self._written, self._rejected, self.extra, self.lengths, self.shortened, self.dropped

    def _add(
        self,
        written: Counter[tuple[str, str, str]],
        rejected: list[Rejected],
        extra: Counter[str],
        lengths: "array[int]",
        shortened: int,
        dropped: int,
    ) -> None:
        """Take over what another process has written behind what this one has."""
        self._written += written
        self._rejected += rejected
        self.extra += extra
        self.lengths += lengths
        self.shortened += shortened
        self.dropped += dropped
        for file in self._folder.glob(f"*{_APART}"):
            with file.open("rb") as source, file.with_suffix("").open("ab") as target:
                shutil.copyfileobj(source, target, 2**20)
            file.unlink()

    def _write_rows(
        self, rows: Rows, start: int, stop: int, lengths: Lengths | None, progress: Progress
    ) -> None:
        source = rows.between(start, stop)
        done = start
        # Another thread writes while the next samples are drawn.
        with ThreadPoolExecutor(1) as disk, contextlib.ExitStack() as self._open:
            while batch := list(islice(source, _BATCH)):
                samples = [
                    self._draw(row, place, rows, lengths) for place, row in enumerate(batch, start=done)
                ]
                if lengths:
                    drawn = (sample.drawn for sample in samples)
                    self._count_tools(
                        (tool for right, others, _ in drawn for tool in right + others), lengths
                    )
                for place, sample in enumerate(samples, start=done):
                    row = sample.row
                    try:
                        if place in self._counted.faults:
                            raise Fault("not-renderable", self._counted.faults[place])
                        fitted = self._write(sample, lengths)
                    except Fault as fault:
                        origin = Origin(row.file, row.number, row.shape, None)
                        self._rejected.append(Rejected(origin, fault.reason, fault.sentence))
                        continue
                    self._written[row.file, row.shape, sample.split] += 1
                    if row.called and row.other < self._no_call * 2**64 and fitted.drawn.distractors:
                        self._write_no_call(fitted, lengths)
                self._flush(disk)
                done += len(batch)
                progress("writing", done / rows.count)
            if self._writing:
                self._writing.result()
                self._writing = None
        self._outputs.clear()

    def _flush(self, disk: ThreadPoolExecutor) -> None:
        """Let the samples so far be written; an error of the batch before is raised here."""
        if self._writing:
            self._writing.result()
        for name in self._lines:
            if name not in self._outputs:
                lines = self._folder / f"{name}{self._ending}"
                self._outputs[name] = self._open.enter_context(lines.open("ab", buffering=0))
        # Joined, as each write hands the interpreter over to another thread, and back.
        batch = [(self._outputs[name], b"".join(lines)) for name, lines in self._lines.items()]
        self._lines.clear()
        self._writing = disk.submit(_write_all, batch)

    def finish(self) -> dict[str, Path]:
        """Return the file of each split that has samples, in its final form."""
        final = {}
        for name in SPLITS:
            lines = self._folder / f"{name}.lines"
            if lines.is_file():
                stem = f"{TRAIN}_data" if name == TRAIN else name
                if lines.stat().st_size > LIMIT:
                    final[name] = lines.rename(self._folder / f"{stem}.jsonl")
                else:
                    final[name] = self._folder / f"{stem}.json"
                    _as_array(lines, final[name])
                    lines.unlink()
        return final

    def _draw(self, row: Row, place: int, rows: Rows, lengths: Lengths | None) -> _Sample:
        """Give a row its split and its tools; `place` is its own among all rows."""
        head, conversation = row
        own: list[Offer] = [Tool(*json.loads(tool)) if isinstance(tool, str) else tool for tool in head.own]
        called = [tool for offer in own if (tool := self._tool(offer)).name in head.called]
        split = self._split_of(head, called, rows)
        drawn = self._pool.draw(own, set(head.called), self._candidates, head.content, split == UNSEEN_SERVER)
        tokens = self._counted.lengths[place] if lengths else 0
        if split != TRAIN and called and head.turns > 2 and place not in self._counted.faults:
            # A test asks for the call, and for nothing after it.
            turns = _turns(conversation)
            conversation = _joined(turns[: _first_call(turns) + 1])
            tokens = _count(Row(head, conversation), lengths) if lengths else 0
        return _Sample(head, split, conversation, tokens, drawn)

    def _split_of(self, row: Head, called: list[Tool], rows: Rows) -> str:
        if self._split.servers and any(self._split.server(tool.server) for tool in called):
            return UNSEEN_SERVER
        if self._split.tools and any(self._split.tool(tool.server, tool.name) for tool in called):
            return UNSEEN_TOOL
        if not self._split.row(row.content):
            return TRAIN
        if not called:
            return NO_CALL
        # One row of a tool is always trained on, or it would not be a seen tool. That it is the
        # one with the highest hash lets rows move from training into the test, never back.
        last = any(
            rows.kept.get((tool.server, tool.name)) == row.content
            for tool in called
            if tool.name == row.called[0]
        )
        return TRAIN if last else TEST

    def _write(self, sample: _Sample, lengths: Lengths | None) -> _Sample:
        """Write a sample with the candidate tools that it has room for.

        Returns:
            The sample as it was written.

        Raises:
            Fault: it is too long with its own tools alone, or the template cannot render these.
        """
        tokens = 0
        if lengths:
            tokens, drawn = self._fit(sample, lengths)
            sample = sample._replace(drawn=drawn)
        name = sample.split
        offers = sample.drawn.offered()
        tools = b",".join(self._in_text(offers))
        system = as_json(sample.row.system) if sample.row.system else _SYSTEM
        ends = (b', "tools": "[', b']"}\n') if offers else (b', "tools": "', b'"}\n')
        # Of a test it is told where it is weak; the engine takes no notice.
        server = b"" if name == TRAIN else b', "server": ' + as_json(self._server(sample))
        head = b'{"conversations": [%b], "system": %b%b%b' % (sample.conversation, system, server, ends[0])
        # In pieces, to be copied once: the tools are most of what is written.
        self._lines[name] += (head, tools, ends[1])
        if lengths and name == TRAIN:
            self.lengths.append(tokens)
        return sample

    def _write_no_call(self, sample: _Sample, lengths: Lengths | None) -> None:
        """Write the sample's question once more, without the right tool and with the answer that says so."""
        turns = _turns(sample.conversation)
        turns = turns[: _first_call(turns)]
        question = next(turn["value"] for turn in reversed(turns) if turn["from"] == "human")
        conversation = _joined([*turns, {"from": "gpt", "value": languages.refusal(question)}])
        split = TRAIN if sample.split == TRAIN else NO_CALL
        tokens = _count(Row(sample.row, conversation), lengths) if lengths else 0
        drawn = sample.drawn.without_right()
        extra = sample._replace(split=split, conversation=conversation, tokens=tokens, drawn=drawn)
        with contextlib.suppress(Fault):  # it is an extra: where it does not fit nothing is lost
            self._write(extra, lengths)
            self.extra[split] += 1

    def _fit(self, sample: _Sample, lengths: Lengths) -> tuple[int, Drawn]:
        """Return a sample's tokens, and the tools that it has room for."""
        right = [self._added(tool, lengths) for tool in sample.drawn.right]
        added = [self._added(tool, lengths) for tool in sample.drawn.distractors]
        if None in right:
            raise Fault("not-renderable", f"template {lengths.name} cannot render the tool that is called")
        kept = [place for place, tokens in enumerate(added) if tokens is not None]
        room = [tokens for tokens in added if tokens is not None]
        total = sample.tokens + sum(filter(None, right)) + sum(room)
        total += lengths.any_tools if right or room else 0
        dropped = 0
        while not self._fits(total, sample, sample.drawn.only(kept), lengths):
            if not kept or (len(kept) == 1 and not right):
                alone = f"{total} tokens without any other tool"
                raise Fault("too-long", f"{alone}, and cutoff_len is {lengths.cutoff_len}")
            kept.pop()
            total -= room.pop()
            dropped += 1
        self.shortened += bool(dropped)
        self.dropped += dropped
        return total, sample.drawn.only(kept)

    def _fits(self, tokens: int, sample: _Sample, kept: Drawn, lengths: Lengths) -> bool:
        if lengths.is_clear(tokens):
            return tokens <= lengths.cutoff_len
        texts = b",".join(self._in_text(kept.offered()))
        tools: str = json.loads(b'"[%b]"' % texts)
        return _count(Row(sample.row, sample.conversation), lengths, tools) <= lengths.cutoff_len

    def _count_tools(self, offers: Iterable[Offer], lengths: Lengths) -> None:
        """Count what those tools of the catalogue add that have not been counted yet."""
        new = sorted({offer for offer in offers if isinstance(offer, int)} - self._adds.keys())
        if new:
            counted = lengths.tools([_in_prompt(self._catalogue.tools[number]) for number in new])
            self._adds.update(zip(new, counted, strict=True))

    def _added(self, offer: Offer, lengths: Lengths) -> int | None:
        """Return the tokens that a tool adds to a sample, None if the template cannot render it."""
        return self._adds[offer] if isinstance(offer, int) else lengths.tools([_in_prompt(offer)])[0]

    def _server(self, sample: _Sample) -> str:
        """Return whose tool is called, empty where none is."""
        return next((self._tool(offer).server for offer in sample.drawn.right), "")

    def _in_text(self, offers: list[Offer]) -> list[bytes]:
        """Return tools as JSON inside a JSON string."""
        known = self._texts
        try:
            return [known[offer] for offer in offers]  # type: ignore[index]  # see below
        except (KeyError, TypeError):  # one that is new, or a row's own
            return [self._text(offer) for offer in offers]

    def _text(self, offer: Offer) -> bytes:
        if isinstance(offer, int):
            if offer not in self._texts:
                self._texts[offer] = _escaped(self._tool(offer))
            return self._texts[offer]
        return _escaped(offer)

    def _tool(self, offer: Offer) -> Tool:
        return self._catalogue.tools[offer] if isinstance(offer, int) else offer


def _in_prompt(tool: Tool) -> dict[str, Any]:
    # The schema's own dialect tells a model nothing; hosts leave it out too.
    parameters = {key: value for key, value in tool.parameters.items() if key != "$schema"}
    return {"name": tool.name, "description": tool.description, "parameters": parameters}


def _escaped(tool: Tool) -> bytes:
    return as_json(as_json(_in_prompt(tool)).decode())[1:-1]


def _turns(conversation: bytes) -> list[dict[str, str]]:
    found: list[dict[str, str]] = json.loads(b"[%b]" % conversation)
    return found


def _joined(turns: list[dict[str, str]]) -> bytes:
    return b", ".join(map(as_json, turns))


def _first_call(turns: list[dict[str, str]]) -> int:
    return next(place for place, turn in enumerate(turns) if turn["from"] == "function_call")


def _count(row: Row, lengths: Lengths, tools: str | None = None) -> int:
    return lengths.count([lengths.render_sample(row.sample(tools))])[0]


def _write_all(batch: list[tuple[io.FileIO, bytes]]) -> None:
    for file, samples in batch:
        rest = memoryview(samples)
        while rest:  # the system may take a part
            rest = rest[file.write(rest) :]


def _as_array(lines: Path, file: Path) -> None:
    """Write JSON Lines as an array, a line each."""
    with lines.open("rb") as source, file.open("wb") as target:
        before = b"[\n"
        for line in source:
            target.write(before + line.rstrip(b"\n"))
            before = b",\n"
        target.write(b"\n]\n")
