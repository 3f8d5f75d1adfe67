"""A dataset's folder: tool-call data in OpenAI's form and in LLaMA-Factory's, and what it was made from.

train.jsonl                   the rows to train on (see mcp_lora.data.samples)
seen.jsonl                    held-out rows of tools that are trained on
unseen_tool.jsonl             rows of held-out tools, and of held-out servers
unseen_server.jsonl
no_call.jsonl                 held-out rows for which the right answer is not to call
mcp_train_data.json, mcp_test_seen.json, …, dataset_info.json     the same for LLaMA-Factory
rejected.jsonl                every row that could not be used
stats.json                    the account of all rows, the settings, and the hashes of the inputs
rendered/                     token ids, made of train.jsonl for a model (see mcp_lora.prompts.render)
"""

import contextlib
import json
import re
import shlex
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from datetime import datetime
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

from mcp_lora.data import catalogue as catalogues
from mcp_lora.data import files, formats
from mcp_lora.data.catalogue import Catalogue
from mcp_lora.data.records import Fault
from mcp_lora.data.records import Settings as Settings
from mcp_lora.data.rows import Progress as Progress
from mcp_lora.data.rows import Rows
from mcp_lora.data.samples import SPLITS as SPLITS
from mcp_lora.data.samples import Samples, engine_file
from mcp_lora.errors import McpLoraError, explained

FOLDER = Path("data/llama_factory")
RENDERED = "rendered"  # the folder of rendered data sets in it
TRAIN = SPLITS["train"]  # what a recipe calls the data set
_STATS = "stats.json"
_INFO = "dataset_info.json"
FILTERED_FOLDER = Path("data/filtered")
FILTERED = "filtered_*.json"
SAMPLE = "filtered_sample.json"


@dataclass(frozen=True)
class Refreshed:
    """What `refresh` did, in words; `statistics` are those of a new conversion, if it made one."""

    message: str
    statistics: dict[str, Any] | None = None


def newest_filtered(folder: Path = FILTERED_FOLDER) -> Path:
    """Return the newest `filtered_*.json` of `folder`; a McpLoraError where there is none.

    The date in the name (`filtered_20251113_175326.json`) counts, and the file's own where the
    name has none: copying and cloning change the file's. The shipped sample comes last.
    """

    def age(file: Path) -> tuple[bool, str, str]:
        named = re.search(r"\d{8}_\d{6}", file.name)
        written = datetime.fromtimestamp(file.stat().st_mtime).strftime("%Y%m%d_%H%M%S")
        return file.name != SAMPLE, named.group() if named else written, file.name

    newest = max(folder.glob(FILTERED), key=age, default=None)
    if not newest:
        raise McpLoraError(
            f"no filtered_*.json in {folder}: put your data there, or name it: mcp-lora convert FILE"
        )
    return newest


def _find(settings: Settings, left_out: list[Path] | None = None) -> tuple[list[Path], list[Path]]:
    """Return the files of a conversion: of rows, and of tools."""
    inputs = files.find([Path(name) for name in settings.inputs] or [newest_filtered()], left_out)
    return inputs, files.find([Path(name) for name in settings.tools], left_out)


def convert(
    settings: Settings, out: Path = FOLDER, progress: Progress = lambda doing, share: None
) -> dict[str, Any]:
    """Convert tool-call data and return the statistics that are also in `out`/stats.json.

    Every row ends in one place: `read` is the sum of `written` and of `rejected`. The same inputs,
    settings and seed give the same bytes. `out` holds the old conversion until the new one is whole.
    Files in it that no conversion has written, or that have been changed since, are never touched.

    Raises McpLoraError where there is no usable row, or `out` cannot be written; nothing has been written
    over then.
    """
    if foreign := _foreign(out):
        raise McpLoraError(
            f"{out} holds {', '.join(foreign)}, which mcp-lora did not make, or not so: "
            f"mcp-lora convert --out OTHER_FOLDER, and mcp-lora train dataset_dir=OTHER_FOLDER"
        )
    left_out: list[Path] = []
    inputs, tools = _find(settings, left_out)
    if own := [file for file in inputs if file.resolve().parent == out.resolve() and file.name in _OURS]:
        raise McpLoraError(f"{own[0]} would be written over: mcp-lora convert --out OTHER_FOLDER")
    new = out / ".new"
    with _writing(out):
        shutil.rmtree(new, ignore_errors=True)  # what a conversion that was killed has left
        new.mkdir(parents=True)
        try:
            stats = _convert(settings, inputs, tools, new, progress)
            if left_out:
                what = f"{left_out[0]}{' …' * (len(left_out) > 1)}: hidden, a link, or written by mcp-lora"
                stats["notes"].append(f"{len(left_out)} files are left out ({what})")
            others = {key: entry for key, entry in _load(out / _INFO).items() if key not in SPLITS.values()}
            _dump(others | stats.pop("info"), new / _INFO)
            stats["files"] = {file.name: files.sha256(file) for file in new.iterdir() if file.name != _INFO}
            _dump(stats, new / _STATS)
            _replace(out, new, settings)
        finally:
            shutil.rmtree(new)
            with contextlib.suppress(OSError):
                out.rmdir()  # if nothing has come into it
    return stats


def _convert(
    settings: Settings, inputs: list[Path], tools: list[Path], new: Path, progress: Progress
) -> dict[str, Any]:
    catalogue = Catalogue()
    notes = catalogues.load(tools, catalogue)
    rows = Rows(new, catalogue, settings)
    rows.read(inputs, progress)
    if not rows.count:
        raise _nothing_usable(rows, inputs, new)
    if tools and not catalogue.consulted:
        notes.append("no row needed --tools, its tools are candidates alone")
    samples = Samples(new, catalogue, rows, settings)
    samples.write(progress)
    if not samples.count["train"]:
        raise McpLoraError(
            f"of {rows.count} usable rows none is left to train on: hold out less, with mcp-lora "
            f"convert --test, --holdout-tools and --holdout-servers"
        )
    shares = (settings.test, settings.holdout_tools, settings.holdout_servers)
    notes += [
        f"too little data for {name}, it is left out"
        for name, share in zip(("seen", "unseen_tool", "unseen_server"), shares, strict=True)
        if share and not samples.count[name]
    ]
    (new / "rows").unlink()
    written = _in_order(samples.count)
    return {
        "read": sum(account.read for account in rows.accounts.values()),
        "written": _in_order(rows.total("written")),
        "rejected": rows.total("rejected"),
        "cleaned": rows.total("cleaned"),
        "samples": written,
        "later_calls": rows.later_calls,
        "synonyms": samples.pool.synonyms,
        "unknown_parameters": dict(rows.unknown.most_common()),
        "no_call_samples": _in_order(samples.extra),
        "tools": len(rows.kept),
        "servers": len({server for server, _ in rows.kept if server}),
        "sources": [vars(account) for account in rows.accounts.values()],
        "broken_schemas": [
            {"server": server, "tool": tool, "problem": problem}
            for (server, tool), problem in catalogue.broken.items()
        ],
        "notes": notes,
        "settings": asdict(settings),
        "inputs": _hashes(inputs + tools),
        "info": {SPLITS[name]: {"file_name": engine_file(name)} | _COLUMNS for name in written},
    }


def _in_order(counted: dict[str, int]) -> dict[str, int]:
    return {split: counted[split] for split in SPLITS if split in counted}


def _foreign(out: Path) -> list[str]:
    """Return what in a folder has a name of ours, and is not as the conversion there wrote it."""
    there = [name for name in sorted(_OURS) if (out / name).is_file()]
    stats = _load(out / _STATS)
    if "settings" not in stats:
        return there + [_STATS] * (out / _STATS).is_file()
    if "files" not in stats:  # of an earlier version, or of one that was killed while it put its files there
        return []
    return [name for name in there if name != _INFO and stats["files"].get(name) != files.sha256(out / name)]


def _nothing_usable(rows: Rows, inputs: list[Path], new: Path) -> McpLoraError:
    """Return why no row can be used, and keep the rejected rows beside the folder."""
    rejected = rows.total("rejected")
    told = []
    for reason, count in rejected.most_common(3):
        sentence, numbers = rows.examples[reason]
        which = ", ".join(map(str, numbers)) + " …" * (count > len(numbers))
        told.append(f"{count} × {reason}, row{'s' * (count > 1)} {which}: {sentence}")
    if told:
        kept = new.parent.with_name(f"{new.parent.name}.rejected.jsonl")
        (new / "rejected.jsonl").replace(kept)
        told.append(f"all of them are in {kept}")
    names = ", ".join(map(str, inputs[:3])) + " …" * (len(inputs) > 3)
    advice = "--tools CATALOGUE" if "not-in-catalogue" in rejected else "OTHER_FILE"
    return McpLoraError(
        f"no usable row in {names} ({'; '.join(told) or 'it is empty'}): mcp-lora convert {advice}"
    )


def explain(settings: Settings, number: int) -> Iterator[tuple[str, Any]]:
    """Yield a row as it is read, understood and written, or why it is rejected; the first of all inputs is 1.

    Raises McpLoraError where there are fewer rows, or the inputs cannot be read.
    """
    inputs, tools = _find(settings)
    every = chain.from_iterable(formats.records(files.read(file)) for file in inputs)
    record = next(islice(every, number - 1, None), None)
    if record is None:
        raise McpLoraError(f"there are fewer than {number} rows: mcp-lora convert --explain 1")
    if isinstance(record, files.Broken):
        yield "as read (?)", record.text
        yield "rejected", record.sentence
        return
    yield f"as read ({formats.recognise(record)})", record
    with tempfile.TemporaryDirectory(prefix="mcp-lora-") as folder:
        source, out = Path(folder, "row.jsonl"), Path(folder, "out")
        source.write_text(json.dumps(record, default=str) + "\n", encoding="utf-8")
        alone = replace(settings, inputs=[str(source)], test=0.0, holdout_tools=0.0, holdout_servers=0.0)
        catalogue = Catalogue()
        catalogues.load(tools, catalogue)
        try:
            content = formats.read(record, partial(catalogue.find, server=""))
            yield "as understood", [turn._asdict() for turn in content.turns]
            convert(alone, out)
        except (Fault, McpLoraError) as error:
            yield "rejected", str(error).split(";")[0]
            return
        yield "as written", list(samples(out, "train"))


def refresh(
    data: Path | None, out: Path, progress: Progress = lambda doing, share: None, keep: bool = False
) -> Refreshed:
    """Convert again where the inputs are others than those that the conversion in `out` was made of.

    They are compared by their contents. The settings of the last conversion are kept. Without `data` its
    inputs are too, or the newest filtered data again if none were named. A conversion whose inputs are gone
    is used: it may be all that was copied to this machine. With `keep`, to resume a training, what is
    converted is used whatever the inputs are.

    Raises McpLoraError as convert does, or where the folder holds another's dataset.
    """
    old = _load(out / _STATS)
    settings = settings_of(old)
    if keep and "inputs" in old and file_of(out, "train").is_file():
        if data:
            raise McpLoraError("a run is resumed on its own data: mcp-lora train --resume, without --data")
        return Refreshed(f"the data in {out} is used as it is, to resume")
    if data:
        settings = replace(settings, inputs=[str(data)])
    if "inputs" in old and file_of(out, "train").is_file():
        changed = _have_changed(settings, old["inputs"])
        if changed is None and not data:
            return Refreshed(f"the data in {out} is used; what it was made of is not here")
        if changed is False:
            return Refreshed(f"the data in {out} is up to date")
    return Refreshed(f"converted as by {command(settings, out)}", convert(settings, out, progress))


def command(settings: Settings, out: Path) -> str:
    """Return the command that converts with these settings."""
    words = ["mcp-lora", "convert", *settings.inputs]
    for key, value in asdict(replace(settings, inputs=[])).items():
        if value != getattr(Settings(), key):
            option = f"--{'' if value is not False else 'no-'}{key.replace('_', '-')}"
            for one in value if isinstance(value, list) else [value]:
                words += [option] if isinstance(one, bool) else [option, str(one)]
    return shlex.join([*words, "--out", str(out)])


def is_up_to_date(folder: Path) -> bool:
    """Tell whether a conversion would be used as it is; a McpLoraError where its description is damaged."""
    old = statistics(folder)
    return old is not None and not _have_changed(settings_of(old), old["inputs"])


def settings_of(stats: dict[str, Any]) -> Settings:
    """Return the settings of a conversion, of an earlier version too."""
    known = {field.name for field in fields(Settings)}
    return Settings(**{key: value for key, value in stats.get("settings", {}).items() if key in known})


def _have_changed(settings: Settings, known: dict[str, str]) -> bool | None:
    """Tell whether inputs hold other contents than those known, wherever they lie; None where any is gone.

    The shipped sample, which is on every machine, stands in for nothing that is gone.
    """
    try:
        inputs, tools = _find(settings)
        is_sample = not settings.inputs and inputs[0].name == SAMPLE
        if is_sample and known and str(inputs[0].absolute()) not in known:
            return None
        return list(_hashes(inputs + tools).values()) != list(known.values())
    except (McpLoraError, OSError):
        return None


def _hashes(found: list[Path]) -> dict[str, str]:
    """Return the SHA-256 of each file, by its absolute path."""
    return {str(file.absolute()): files.sha256(file) for file in found}


def statistics(folder: Path) -> dict[str, Any] | None:
    """Return the account of a conversion, None where there is no whole one; a McpLoraError if it is damaged.

    `samples` counts what there is to train on and to test with, by split.
    """
    stats = _load(folder / _STATS)
    return stats if {"inputs", "samples"} <= stats.keys() else None


def names(folder: Path) -> set[str]:
    """Return the splits in a folder; none where there is no conversion."""
    return {split for split in SPLITS if file_of(folder, split).is_file()}


def file_of(folder: Path, split: str) -> Path:
    """Return where the rows of a split are, in OpenAI's form."""
    return folder / f"{split}.jsonl"


def samples(folder: Path, split: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of a split, in OpenAI's form.

    Raises McpLoraError where the folder has no such split, or a damaged one.
    """
    if split not in (there := names(folder)):
        what = ", ".join(name for name in SPLITS if name in there) or "no data"
        raise McpLoraError(f"{folder} holds {what}, not {split}: mcp-lora convert --out {folder}")
    file = file_of(folder, split)
    for sample in files.read(file):
        if not isinstance(sample, dict) or not {"messages", "tools"} <= set(sample):
            broken = isinstance(sample, files.Broken)
            what = sample.sentence if broken else "a row has no messages, or no tools"
            raise McpLoraError(
                f"{file} cannot be used ({what}): mcp-lora convert --out {folder}, after removing it"
            )
        yield sample


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep others from converting into a folder at the same time; several ranks may want to."""
    import filelock

    with _writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(folder.parent / f".{folder.name}.lock"):
            yield


def _writing(out: Path) -> contextlib.AbstractContextManager[None]:
    return explained(f"{out} cannot be written", "mcp-lora convert --out OTHER_FOLDER")


# Any name that LLaMA-Factory is not given would fall back to none at all.
_COLUMNS = {
    "formatting": "sharegpt",
    "columns": {"messages": "conversations", "system": "system", "tools": "tools"},
    "tags": {
        "role_tag": "from",
        "content_tag": "value",
        "user_tag": "human",
        "assistant_tag": "gpt",
        "observation_tag": "observation",
        "function_tag": "function_call",
        "system_tag": "system",
    },
}
# The files that a conversion may write, but for stats.json.
_OURS = {_INFO, "rejected.jsonl", *(name for one in SPLITS for name in (f"{one}.jsonl", engine_file(one)))}


def _load(file: Path) -> dict[str, Any]:
    return files.load(file, f"remove it, and mcp-lora convert --out {file.parent}")


def _dump(content: Any, file: Path) -> None:
    file.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def _replace(out: Path, new: Path, settings: Settings) -> None:
    """Put a new conversion's files in the place of the old one's.

    Until all are there stats.json holds the settings alone: should this be killed, no rows of the old
    conversion stand beside new ones, and `refresh` makes the new one again.
    """
    _dump({"settings": asdict(settings)}, new / "unfinished")
    (new / "unfinished").replace(out / _STATS)
    shutil.rmtree(out / RENDERED, ignore_errors=True)
    for name in _OURS:
        (out / name).unlink(missing_ok=True)
    for file in sorted(new.iterdir(), key=lambda file: file.name == _STATS):
        file.replace(out / file.name)
