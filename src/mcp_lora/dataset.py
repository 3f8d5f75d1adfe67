"""A dataset's folder: tool-call data in LLaMA-Factory's format, what it was made from, and how.

mcp_train_data.json         the samples to train on (see mcp_lora.samples), .jsonl above 100 MB
mcp_test_seen.json          held-out rows of tools that are trained on
mcp_test_unseen_tool.json   rows of held-out tools, and of held-out servers
mcp_test_unseen_server.json
mcp_test_no_call.json       held-out rows for which the right answer is not to call
dataset_info.json           names and describes them for LLaMA-Factory
rejected.jsonl              every row that could not be used
stats.json                  the account of all rows, and the settings
"""

import contextlib
import ctypes
import gc
import json
import os
import shutil
import sys
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any

from mcp_lora import catalogue as catalogues
from mcp_lora import files
from mcp_lora.accounts import Accounts
from mcp_lora.candidates import Split
from mcp_lora.catalogue import Catalogue
from mcp_lora.errors import McpLoraError
from mcp_lora.lengths import Lengths
from mcp_lora.readers import FILTERED, FILTERED_FOLDER, newest_filtered
from mcp_lora.records import Fault
from mcp_lora.rows import Counting, Progress, Rows, Settings
from mcp_lora.samples import SPLITS, TEST, TRAIN, UNSEEN_SERVER, UNSEEN_TOOL, Samples

__all__ = [
    "FOLDER",
    "TRAIN",
    "Progress",
    "Settings",
    "convert",
    "facts",
    "file_of",
    "locked",
    "names",
    "newer",
    "refresh",
    "samples",
    "statistics",
    "write",
]

FOLDER = Path("data/llama_factory")


def convert(
    settings: Settings,
    out: Path = FOLDER,
    budget: dict[str, Any] | None = None,
    progress: Progress = lambda doing, share: None,
) -> dict[str, Any]:
    """Convert tool-call data and return the statistics that are also in `out`/stats.json.

    Every row ends in one place: `read` is the sum of `written` and of `rejected`. The same inputs,
    settings and seed give the same bytes. `out` holds the old conversion until the new one is whole.

    Args:
        settings: what and how.
        out: the folder to write.
        budget: lengths.KEYS of the run's configuration. No sample is longer than its cutoff_len
            then; without it lengths are not known.
        progress: is told how far it is.

    Raises:
        McpLoraError: there is no usable row, the tokenizer cannot be read, or `out` cannot be
            written; nothing has been written over then.
    """
    out = Path(os.path.realpath(out))
    if out.exists() and not out.is_dir():
        raise McpLoraError(f"{out} is no folder: mcp-lora convert --out OTHER_FOLDER")
    if (out / "dataset_info.json").is_file() and not (out / "stats.json").is_file():
        raise McpLoraError(
            f"{out} holds a dataset that mcp-lora did not make: mcp-lora convert --out OTHER_FOLDER, "
            f"and mcp-lora train dataset_dir=OTHER_FOLDER"
        )
    found = files.find([Path(name) for name in settings.inputs] or [newest_filtered()])
    lengths = Lengths(budget) if budget else None
    collects = gc.isenabled()
    gc.disable()  # nothing here refers to itself, and to look for that takes a fifth of the time
    new = out.parent / f".{out.name}.new"
    try:
        shutil.rmtree(new, ignore_errors=True)  # what a conversion that was killed has left
        new.mkdir(parents=True)
        try:
            stats = _convert(settings, found, lengths, new, progress) | {"budget": budget}
            _dump(stats, new / "stats.json")
            _put(new, out)
        finally:
            shutil.rmtree(new, ignore_errors=True)
    except OSError as error:
        raise McpLoraError(
            f"{out} cannot be written ({error.strerror}): mcp-lora convert --out OTHER_FOLDER"
        ) from None
    finally:
        if collects:
            gc.enable()
    return stats


def _convert(
    settings: Settings, found: list[Path], lengths: Lengths | None, new: Path, progress: Progress
) -> dict[str, Any]:
    catalogue = Catalogue()
    tool_files = files.find([Path(name) for name in settings.tools])
    notes = catalogues.load(tool_files, catalogue)
    rows = Rows(new / "rows", catalogue, settings)
    with Accounts(new / "rejected.jsonl") as accounts, contextlib.ExitStack() as beside:
        counting = beside.enter_context(Counting(rows, lengths)) if lengths else None
        rows.read(found, accounts, counting, progress)
        if not rows.count:
            raise _unusable(accounts, found)
        split = Split(settings.holdout_servers, settings.holdout_tools, settings.test, settings.seed)
        split = split.within(rows.kept)
        writer = Samples(new, catalogue, split, settings.candidates, settings.no_call)
        writer.write(rows, accounts, lengths, counting, progress)
        accounts.write_late()
    (new / "rows").unlink()
    written = writer.finish()
    if TRAIN not in written:
        raise McpLoraError(
            f"of {rows.count} usable rows none is left to train on: hold out less, with mcp-lora "
            f"convert --test, --holdout-tools and --holdout-servers"
        )
    shares = (settings.test, settings.holdout_tools, settings.holdout_servers)
    notes += [
        f"too little data for {name}, it is left out"
        for name, share in zip((TEST, UNSEEN_TOOL, UNSEEN_SERVER), shares, strict=True)
        if share and name not in written
    ]
    _dump({name: _description(file) for name, file in written.items()}, new / "dataset_info.json")
    totals = {what: dict(accounts.total(what)) for what in ("written", "rejected", "cleaned")}
    return {
        "read": sum(account.read for account in accounts.all()),
        "written": {name: totals["written"][name] for name in SPLITS if name in totals["written"]},
        "rejected": totals["rejected"],
        "cleaned": totals["cleaned"],
        "no_call_samples": {name: writer.extra[name] for name in SPLITS if name in writer.extra},
        "tools": len(rows.kept),
        "servers": len({server for server, _ in rows.kept if server}),
        "sources": [vars(account) for account in accounts.all()],
        "lengths": lengths.summary(writer.lengths) if lengths else None,
        "samples_that_lost_tools": writer.shortened,
        "tools_dropped": writer.dropped,
        "broken_schemas": [
            {"server": server, "tool": tool, "problem": problem}
            for (server, tool), problem in catalogue.broken.items()
        ],
        "notes": notes,
        "settings": asdict(settings),
        "files": [str(file) for file in found],
        "catalogues": [str(file) for file in tool_files],
    }


def refresh(
    data: Path | None,
    out: Path,
    budget: dict[str, Any],
    progress: Progress = lambda doing, share: None,
) -> dict[str, Any] | None:
    """Convert again where the data is newer than the conversion in `out`, or the run's budget another.

    The settings of the last conversion are kept. Without `data` its inputs are too, or the newest
    filtered data again if none were named. A conversion whose data is gone stands, unless there is
    newer data: it may be all that was copied to this machine.

    Returns:
        The statistics of a new conversion, or None where the old one is good.

    Raises:
        McpLoraError: as convert, or the folder holds another's dataset, or a sample of a conversion
            that cannot be repeated would be cut.
    """
    settings = Settings()
    done = out / "stats.json"
    if done.is_file():
        old = _load(done)
        settings = Settings(**old["settings"])
        now = _inputs(settings, data)
        sources = _sources(old)
        gone = not data and not all(file.is_file() for file in sources)
        stands = not _newer(done, [*now, *sources]) and (gone or list(map(str, now)) == old["files"])
        counted = old.get("budget") == budget
        if stands and (counted or gone):
            if not counted:
                _measure(out, old, budget)
            return None
    if data:
        settings = replace(settings, inputs=[str(data)])
    return convert(settings, out, budget, progress)


def file_of(folder: Path, dataset: str) -> Path | None:
    """Return the file of a dataset, None where the folder describes no such dataset.

    Raises:
        McpLoraError: the description is damaged.
    """
    described = _load(folder / "dataset_info.json").get(dataset)
    return folder / described["file_name"] if described and "file_name" in described else None


def newer(folder: Path) -> list[Path]:
    """Return the files for which a conversion would be made anew: changed since, or not yet among its inputs.

    Raises:
        McpLoraError: its description is damaged.
    """
    done = folder / "stats.json"
    if not done.is_file():
        return []
    old = _load(done)
    now = _inputs(Settings(**old["settings"]), None)
    added = [file for file in now if str(file) not in old["files"]]
    return list(dict.fromkeys([*added, *_newer(done, [*now, *_sources(old)])]))


def _inputs(settings: Settings, data: Path | None) -> list[Path]:
    """Return the files that a conversion would read now; none where they are gone."""
    inputs = [data] if data else [Path(name) for name in settings.inputs]
    if not inputs and any(FILTERED_FOLDER.glob(FILTERED)):
        inputs = [newest_filtered()]
    try:
        return files.find(inputs)
    except McpLoraError:
        return []


def _sources(stats: dict[str, Any]) -> list[Path]:
    return [*map(Path, stats["files"]), *map(Path, stats.get("catalogues", []))]


def _newer(done: Path, sources: list[Path]) -> list[Path]:
    return [file for file in sources if file.is_file() and file.stat().st_mtime > done.stat().st_mtime]


def statistics(folder: Path, dataset: str) -> dict[str, Any] | None:
    """Return the account of the conversion that a dataset comes from, None if it is none of ours.

    Raises:
        McpLoraError: it is damaged.
    """
    return (dataset == TRAIN and _load(folder / "stats.json")) or None


def facts(folder: Path, dataset: str) -> dict[str, Any] | None:
    """Return how many `samples` a conversion of ours has to train on, and their `lengths`, if counted.

    Raises:
        McpLoraError: its description is damaged.
    """
    stats = statistics(folder, dataset)
    if not stats:
        return None
    count = stats["written"][TRAIN] + stats["no_call_samples"].get(TRAIN, 0)
    return {"samples": count, "lengths": stats["lengths"]}


def samples(folder: Path, dataset: str) -> Iterator[dict[str, Any]]:
    """Yield the samples of a dataset, as they stand in its file.

    Raises:
        McpLoraError: the folder holds no such dataset, or a damaged one.
    """
    described = _load(folder / "dataset_info.json")
    if dataset not in described:
        names = ", ".join(described) or "no dataset"
        raise McpLoraError(f"{folder} holds {names}, not {dataset}: mcp-lora convert --out {folder}")
    file = folder / described[dataset]["file_name"]
    for sample in files.read(file):
        if not isinstance(sample, dict) or not {"conversations", "system", "tools"} <= set(sample):
            what = sample.sentence if isinstance(sample, files.Broken) else "a sample is of another make"
            raise McpLoraError(f"{file} cannot be used ({what}): mcp-lora convert --out {folder}")
        yield sample


def names(folder: Path) -> set[str]:
    """Return the names of the datasets in a folder; none where there is no dataset_info.json."""
    return set(_load(folder / "dataset_info.json"))


def write(folder: Path, dataset: str, samples: Sequence[dict[str, Any]]) -> None:
    """Write samples as a dataset of this name into a folder that holds none."""
    file = folder / f"{dataset}.json"
    _dump(samples, file)
    _dump({dataset: _description(file)}, folder / "dataset_info.json")


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep others from converting into a folder at the same time; several ranks may want to.

    Raises:
        McpLoraError: the folder's parent cannot be written.
    """
    import filelock

    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(folder.parent / f".{folder.name}.lock"):
            yield
    except OSError as error:
        raise McpLoraError(
            f"{folder} cannot be written ({error.strerror}): mcp-lora convert --out OTHER_FOLDER"
        ) from None


def _measure(folder: Path, old: dict[str, Any], budget: dict[str, Any]) -> None:
    """Count the tokens of a conversion that cannot be repeated, for another model than it was made for."""
    lengths = Lengths(budget)
    counted = array("I")
    source = samples(folder, TRAIN)
    try:
        while batch := list(islice(source, 100)):
            counted.extend(lengths.count([lengths.render_sample(sample) for sample in batch]))
    except Fault as fault:
        raise McpLoraError(
            f"a sample in {folder}: {fault}. Convert for this model where the data is: "
            f"mcp-lora convert --model MODEL"
        ) from None
    too_long = sum(length > lengths.cutoff_len for length in counted)
    if too_long:
        raise McpLoraError(
            f"{too_long} of {len(counted)} samples in {folder} are longer than cutoff_len = "
            f"{lengths.cutoff_len} tokens (up to {max(counted)}), and the engine would cut their questions. "
            f"Convert for this model where the data is: mcp-lora convert --model MODEL"
        )
    stats = old | {"budget": budget, "lengths": lengths.summary(counted)}
    _dump(stats, folder / "stats.json.new")
    os.replace(folder / "stats.json.new", folder / "stats.json")


def _unusable(accounts: Accounts, found: list[Path]) -> McpLoraError:
    reasons = accounts.total("rejected")
    names = ", ".join(map(str, found[:3])) + (" …" if len(found) > 3 else "")
    what = ", ".join(f"{count} × {reason}" for reason, count in reasons.most_common()) or "it is empty"
    advice = "--tools CATALOGUE" if "not-in-catalogue" in reasons else "OTHER_FILE"
    return McpLoraError(f"no usable row in {names} ({what}): mcp-lora convert {advice}")


def _description(file: Path) -> dict[str, Any]:
    """Describe a file for LLaMA-Factory; any name left out would fall back to none at all."""
    return {
        "file_name": file.name,
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


def _load(file: Path) -> dict[str, Any]:
    """Return what one of our descriptions holds, nothing where there is none."""
    try:
        content = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise McpLoraError(f"{file} is damaged: make it anew with mcp-lora convert --out {file.parent}")
    return content


def _dump(content: Any, file: Path) -> None:
    file.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def _put(new: Path, out: Path) -> None:
    """Put a whole new folder in the place of the old one, in one step where the system can.

    On Linux two folders change places at once. Elsewhere, where `out` is a mount point, or where it
    holds others' files, which are never moved, our files are replaced one after another, stats.json last.
    """
    if not out.exists():
        new.rename(out)
    elif not all(map(_is_ours, out.iterdir())) or not _exchange(new, out):
        files_now = sorted(new.iterdir(), key=lambda file: file.name == "stats.json")
        for file in files_now:
            os.replace(file, out / file.name)
        for old in out.iterdir():
            if _is_ours(old) and old.name not in {file.name for file in files_now}:
                old.unlink()


def _is_ours(file: Path) -> bool:
    return file.name in ("dataset_info.json", "rejected.jsonl", "stats.json") or (
        file.name.startswith(("mcp_train_data.", "mcp_test_")) and file.suffix in (".json", ".jsonl")
    )


def _exchange(one: Path, two: Path) -> bool:
    """Let two folders change places; False where the system cannot (see man 2 renameat2)."""
    if sys.platform != "linux":
        return False
    at_cwd, exchange = -100, 2
    try:
        rename = ctypes.CDLL(None).renameat2
    except AttributeError:  # a C library of before 2018
        return False
    return not rename(at_cwd, os.fsencode(one), at_cwd, os.fsencode(two), exchange)
