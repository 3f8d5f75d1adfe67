"""From tool-call data to a dataset's folder: convert, convert again if inputs have changed, explain."""

import contextlib
import json
import re
import shlex
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from datetime import datetime
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from mcp_lora.data import catalogue as catalogues
from mcp_lora.data import dataset, files, formats
from mcp_lora.data.catalogue import Catalogue
from mcp_lora.data.records import RowError, Statistics
from mcp_lora.data.records import Settings as Settings
from mcp_lora.data.rows import Progress, Rows
from mcp_lora.data.samples import SPLITS, Samples, engine_file
from mcp_lora.errors import McpLoraError

FILTERED_FOLDER = Path("data/filtered")
SAMPLE = "filtered_sample.json"
_ONLY_SAMPLE = f"this is the shipped sample; {FILTERED_FOLDER} contains no data of your own"
# How LLaMA-Factory reads a file of samples; its tags are the default ones.
_COLUMNS = {
    "formatting": "sharegpt",
    "columns": {"messages": "conversations", "system": "system", "tools": "tools"},
}


def shipped_sample() -> Path:
    """Return the shipped sample: in the project's folder, else where the wheel installed it."""
    place = FILTERED_FOLDER / SAMPLE
    here = [place, Path(__file__).parents[3] / place, Path(__file__).parents[1] / SAMPLE]
    return next((file for file in here if file.is_file()), place)


def newest_filtered() -> Path:
    """Return the newest `filtered_*.json` of data/filtered; raise a McpLoraError if there is none.

    The date in the name (`filtered_20251113_175326.json`) counts, else the file's modification time, which
    copying and cloning change. If there is only the shipped sample, data in ../data/filtered, where the user
    guide puts it, takes precedence.
    """

    def age(file: Path) -> tuple[str, str]:
        named = re.search(r"\d{8}_\d{6}", file.name)
        written = datetime.fromtimestamp(file.stat().st_mtime).strftime("%Y%m%d_%H%M%S")
        return named.group() if named else written, file.name

    for place in (FILTERED_FOLDER, Path("..") / FILTERED_FOLDER):
        if found := [file for file in place.glob("filtered_*.json") if file.name != SAMPLE]:
            return max(found, key=age)
    if (sample := FILTERED_FOLDER / SAMPLE).is_file():
        return sample
    what = f"no filtered_*.json in {FILTERED_FOLDER}: put your data there, or name it"
    raise McpLoraError(f"{what}: mcp-lora convert FILE")


def _find(settings: Settings) -> tuple[list[Path], list[Path], int]:
    """Return the input files of a conversion, its catalogue files, and how many others were skipped."""
    inputs, skipped = files.find([Path(name) for name in settings.inputs] or [newest_filtered()])
    again = "mcp-lora convert --tools OTHER_FILE"
    tools, more = files.find([Path(name) for name in settings.tools], again)
    return inputs, tools, skipped + more


def convert(
    settings: Settings, out: Path = dataset.FOLDER, progress: Progress = lambda step, fraction: None
) -> Statistics:
    """Convert tool-call data and return the statistics, which are also written to `out`/stats.json.

    Every row is counted once: `read` is the sum of `written` and `rejected`. The same inputs, settings and
    seed give the same bytes. `out` keeps the old conversion until the new one is complete. Files in it that
    no conversion has written, or that were modified since, are never touched.

    Raises McpLoraError if there is no usable row, and OSError if `out` cannot be written, which
    `dataset.locked` explains; nothing is overwritten then.
    """
    if foreign := dataset.foreign(out):
        what = f"{out} contains {', '.join(foreign)}, not created by mcp-lora or modified since"
        commands = "mcp-lora convert --output OTHER_FOLDER, and mcp-lora train dataset_dir=OTHER_FOLDER"
        raise McpLoraError(f"{what}: {commands}")
    inputs, tools, skipped = _find(settings)
    for file in inputs:
        if file.name in dataset.FILES and file.resolve().parent == out.resolve():
            raise McpLoraError(f"{file} would be overwritten: mcp-lora convert --output OTHER_FOLDER")
    new = out / ".new"
    shutil.rmtree(new, ignore_errors=True)  # left by a conversion that was killed
    new.mkdir(parents=True)
    try:
        stats = _convert(settings, inputs, tools, new, progress)
        if skipped:
            stats.notes.append(f"{skipped} files were skipped: {files.SKIPPED}")
        stats.files = {file.name: files.sha256(file) for file in new.iterdir()}
        dataset.dump(stats, new / dataset.STATS)
        old = dataset.load(out / dataset.INFO)
        info = {name: entry for name, entry in old.items() if name not in SPLITS.values()}
        for split in stats.samples:
            info[SPLITS[split]] = {"file_name": engine_file(split)} | _COLUMNS
        dataset.dump(info, new / dataset.INFO)
        dataset.put_in_place(new, out, settings)
    finally:
        shutil.rmtree(new)
    return stats


def _convert(
    settings: Settings, inputs: list[Path], tools: list[Path], new: Path, progress: Progress
) -> Statistics:
    catalogue = Catalogue()
    notes = catalogues.load(tools, catalogue)
    rows = Rows(new, catalogue, settings)
    rows.read(inputs, progress)
    if not rows.count:
        raise _nothing_usable(rows, inputs, new)
    if not settings.inputs and inputs[0].name == SAMPLE:
        notes.append(_ONLY_SAMPLE)
    samples = Samples(new, catalogue, rows, settings)
    samples.write(progress)
    if not samples.count["train"]:
        options = "mcp-lora convert --test, --holdout-tools and --holdout-servers"
        what = f"none of {rows.count} usable rows is left to train on: hold out less, with {options}"
        raise McpLoraError(what)
    held_out = {"seen": settings.test, "unseen_tool": settings.holdout_tools}
    for split, fraction in (held_out | {"unseen_server": settings.holdout_servers}).items():
        if fraction and not samples.count[split]:
            notes.append(f"too little data for split {split}, it was not created")
    for (_, tool), problem in catalogue.broken.items():
        notes.append(f"the schema of {tool} is invalid, its calls are not validated: {problem}")
    (new / "rows").unlink()
    return Statistics(
        read=sum(source.read for source in rows.sources.values()),
        written=_in_order(rows.total("written")),
        rejected=rows.total("rejected"),
        cleaned=rows.total("cleaned"),
        samples=_in_order(samples.count),
        no_call_samples=_in_order(samples.extra),
        tools=len(rows.kept),
        servers=len({server for server, _ in rows.kept if server}),
        sources=list(rows.sources.values()),
        notes=notes,
        settings=settings,
        inputs=_hashes(inputs + tools),
    )


def _in_order(counted: dict[str, int]) -> dict[str, int]:
    return {split: counted[split] for split in SPLITS if split in counted}


def _nothing_usable(rows: Rows, inputs: list[Path], new: Path) -> McpLoraError:
    """Return the error of a conversion without usable rows; keep the rejected rows beside the folder."""
    rejected = rows.total("rejected")
    details = [f"{count} × {reason}" for reason, count in rejected.most_common(3)]
    if details:
        first = next(iter(files.read(new / "rejected.jsonl")))
        details.append(f"the first is row {first['row']} of {first['file']}: {first['message']}")
        kept = Path(f"{new.parent.resolve()}.rejected.jsonl")  # resolved, as the folder "." has no name
        (new / "rejected.jsonl").replace(kept)
        details.append(f"all of them are in {kept}")
    names = ", ".join(map(str, inputs[:3])) + " …" * (len(inputs) > 3)
    advice = "--tools CATALOGUE" if "not-in-catalogue" in rejected else "OTHER_FILE"
    what = f"no usable row in {names} ({'; '.join(details) or 'it is empty'})"
    return McpLoraError(f"{what}: mcp-lora convert {advice}")


def explain(settings: Settings, number: int) -> Iterator[tuple[str, Any]]:
    """Yield a row as read, as parsed and as written, or why it is rejected; all inputs' rows count from 1.

    Raises McpLoraError if there are fewer rows, or the inputs cannot be read.
    """
    inputs, tools, _ = _find(settings)
    every = ((file, record) for file in inputs for record in formats.records(files.read(file)))
    found = next(islice(every, number - 1, None), None)
    if found is None:
        raise McpLoraError(f"there are fewer than {number} rows: mcp-lora convert --explain 1")
    file, record = found
    if isinstance(record, files.Broken):
        yield "as read (?)", record.text
        yield "rejected", record.message
        return
    yield f"as read ({formats.recognise(record)})", record
    catalogue = Catalogue()
    catalogues.load(tools, catalogue)
    with contextlib.suppress(RowError):  # which the conversion reports
        turns = formats.read(record, partial(catalogue.find, server=file.stem)).turns
        yield "as understood", [turn._asdict() for turn in turns]
    with tempfile.TemporaryDirectory(prefix="mcp-lora-") as folder:
        # of the same name, by which a catalogue is chosen
        source, out = Path(folder, f"{file.stem}.jsonl"), Path(folder, "out")
        source.write_text(json.dumps(record, default=str) + "\n", encoding="utf-8")
        rejected = out.with_name(f"{out.name}.rejected.jsonl")
        alone = replace(settings, inputs=[str(source)], test=0.0, holdout_tools=0.0, holdout_servers=0.0)
        try:
            convert(alone, out)
            yield "as written", list(dataset.samples(out, "train"))
        except McpLoraError:
            if not rejected.is_file():
                raise
            yield "rejected", next(iter(files.read(rejected)))["message"]


def refresh(
    data: Sequence[Path], out: Path, progress: Progress = lambda step, fraction: None, keep: bool = False
) -> tuple[str, Statistics | None]:
    """Convert again if the inputs differ from those of the conversion in `out`.

    Returns a message on what was done, and the statistics of the new conversion, if there was one.

    Inputs are compared by content. The settings of the last conversion are kept, and without `data` also its
    inputs, or the newest filtered data if none were named. A conversion whose inputs no longer exist is
    used: it may be all that was copied to this machine. With `keep`, to resume a training, the converted
    data is used whatever the inputs are.

    Raises McpLoraError as convert does.
    """
    old = dataset.recorded(out)
    settings = old.settings
    is_complete = bool(old.inputs) and dataset.file_of(out, "train").is_file()
    if keep and is_complete:
        if data:
            raise McpLoraError("a run is resumed on its own data, omit --data: mcp-lora train --resume")
        return f"the data in {out} is used as it is, to resume", None
    if data:
        settings = replace(settings, inputs=[str(one) for one in data])
    if is_complete:
        now = _present(settings, old.inputs)
        if now is None and not data:
            return f"the data in {out} is used; its inputs are not on this machine", None
        if now == list(old.inputs.values()):
            sample = f"; warning: {_ONLY_SAMPLE}" * (_ONLY_SAMPLE in old.notes)
            return f"the data in {out} is up to date{sample}", None
    return f"converted, like {command(settings, out)}", convert(settings, out, progress)


def command(settings: Settings, out: Path) -> str:
    """Return the command that converts with these settings."""
    words = ["mcp-lora", "convert", *settings.inputs]
    for key, value in asdict(replace(settings, inputs=[])).items():
        if value != getattr(Settings(), key):
            option = f"--{'' if value is not False else 'no-'}{key.replace('_', '-')}"
            for one in value if isinstance(value, list) else [value]:
                words += [option] if isinstance(one, bool) else [option, str(one)]
    return shlex.join([*words, "--output", str(out)])


def is_up_to_date(folder: Path) -> bool:
    """Tell whether a conversion is up to date; raise a McpLoraError if its stats.json is damaged."""
    old = dataset.statistics(folder)
    return old is not None and _present(old.settings, old.inputs) in (None, list(old.inputs.values()))


def _present(settings: Settings, known: dict[str, str]) -> list[str] | None:
    """Return the SHA-256 of each input, wherever they are now; None if any is missing.

    The shipped sample, which is on every machine, does not replace missing inputs.
    """
    try:
        inputs, tools, _ = _find(settings)
        is_sample = not settings.inputs and inputs[0].name == SAMPLE
        if is_sample and known and str(inputs[0].absolute()) not in known:
            return None
        return list(_hashes(inputs + tools).values())
    except (McpLoraError, OSError):
        return None


def _hashes(found: list[Path]) -> dict[str, str]:
    return {str(file.absolute()): files.sha256(file) for file in found}
