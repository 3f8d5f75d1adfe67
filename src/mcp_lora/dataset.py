"""A dataset's folder: tool-call data in OpenAI's form and in LLaMA-Factory's, and what it was made from.

train.jsonl                   the rows to train on (see mcp_lora.samples)
seen.jsonl                    held-out rows of tools that are trained on
unseen_tool.jsonl             rows of held-out tools, and of held-out servers
unseen_server.jsonl
no_call.jsonl                 held-out rows for which the right answer is not to call
mcp_train_data.json, mcp_test_seen.json, …, dataset_info.json     the same for LLaMA-Factory
rejected.jsonl                every row that could not be used
stats.json                    the account of all rows, the settings, and the hashes of the inputs
rendered/                     token ids, made of train.jsonl for a model (see mcp_lora.prompts.rendered)
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from mcp_lora import catalogue as catalogues
from mcp_lora import files
from mcp_lora.accounts import Accounts
from mcp_lora.candidates import Split
from mcp_lora.catalogue import Catalogue
from mcp_lora.errors import McpLoraError
from mcp_lora.readers import FILTERED, FILTERED_FOLDER, SAMPLE, newest_filtered
from mcp_lora.rows import Progress, Rows, Settings
from mcp_lora.samples import SPLITS, Samples

__all__ = [
    "FOLDER",
    "SPLITS",
    "TRAIN",
    "Progress",
    "Refreshed",
    "Settings",
    "convert",
    "facts",
    "file_of",
    "is_up_to_date",
    "locked",
    "names",
    "refresh",
    "samples",
    "statistics",
]

FOLDER = Path("data/llama_factory")
RENDERED = "rendered"  # the folder of rendered data sets in it
TRAIN = SPLITS["train"]  # what a recipe calls the data set


@dataclass(frozen=True)
class Refreshed:
    """What `refresh` did, in words; `statistics` are those of a new conversion, if it made one."""

    message: str
    statistics: dict[str, Any] | None = None


def convert(
    settings: Settings,
    out: Path = FOLDER,
    progress: Progress = lambda doing, share: None,
) -> dict[str, Any]:
    """Convert tool-call data and return the statistics that are also in `out`/stats.json.

    Every row ends in one place: `read` is the sum of `written` and of `rejected`. The same inputs,
    settings and seed give the same bytes. `out` holds the old conversion until the new one is whole.

    Args:
        settings: what and how.
        out: the folder to write.
        progress: receives how far it is.

    Raises:
        McpLoraError: there is no usable row, or `out` cannot be written; nothing has been written
            over then.
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
    new = out.parent / f".{out.name}.new"
    try:
        _recover(out)
        shutil.rmtree(new, ignore_errors=True)  # what a conversion that was killed has left
        new.mkdir(parents=True)
        try:
            stats = _convert(settings, found, new, progress)
            _dump(stats, new / "stats.json")
            _put(new, out)
        finally:
            shutil.rmtree(new, ignore_errors=True)
    except OSError as error:
        raise McpLoraError(
            f"{out} cannot be written ({error.strerror}): mcp-lora convert --out OTHER_FOLDER"
        ) from None
    return stats


def _convert(settings: Settings, found: list[Path], new: Path, progress: Progress) -> dict[str, Any]:
    catalogue = Catalogue()
    tool_files = files.find([Path(name) for name in settings.tools])
    notes = catalogues.load(tool_files, catalogue)
    rows = Rows(new / "rows", catalogue, settings)
    with Accounts(new / "rejected.jsonl") as accounts:
        rows.read(found, accounts, progress)
    if not rows.count:
        raise _unusable(accounts, found)
    split = Split(settings.holdout_servers, settings.holdout_tools, settings.test, settings.seed)
    split = split.within(rows.kept)
    writer = Samples(new, catalogue, split, settings.candidates, settings.no_call)
    writer.write(rows, accounts, progress)
    (new / "rows").unlink()
    written = writer.finish()
    if "train" not in written:
        raise McpLoraError(
            f"of {rows.count} usable rows none is left to train on: hold out less, with mcp-lora "
            f"convert --test, --holdout-tools and --holdout-servers"
        )
    shares = (settings.test, settings.holdout_tools, settings.holdout_servers)
    notes += [
        f"too little data for {name}, it is left out"
        for name, share in zip(("seen", "unseen_tool", "unseen_server"), shares, strict=True)
        if share and name not in written
    ]
    _dump({SPLITS[name]: _description(file) for name, file in written.items()}, new / "dataset_info.json")
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
        "broken_schemas": [
            {"server": server, "tool": tool, "problem": problem}
            for (server, tool), problem in catalogue.broken.items()
        ],
        "notes": notes,
        "settings": asdict(settings),
        "inputs": _hashes(found, tool_files),
    }


def refresh(data: Path | None, out: Path, progress: Progress = lambda doing, share: None) -> Refreshed:
    """Convert again where the inputs are others than those that the conversion in `out` was made of.

    They are compared by their contents. The settings of the last conversion are kept. Without `data` its
    inputs are too, or the newest filtered data again if none were named. A conversion whose inputs are gone
    is used: it may be all that was copied to this machine.

    Raises:
        McpLoraError: as convert, or the folder holds another's dataset.
    """
    _recover(out)
    old = statistics(out)
    settings = Settings(**old["settings"]) if old else Settings()
    if data:
        settings = replace(settings, inputs=[str(data)])
    if old and file_of(out, "train").is_file():
        now = _now(settings, old)
        if now is None and not data:
            return Refreshed(f"the data in {out} is used; what it was made of is not here")
        if _same(now, old):
            return Refreshed(f"the data in {out} is up to date")
    chosen = {key: value for key, value in asdict(settings).items() if value != getattr(Settings(), key)}
    words = ", ".join(f"{key}={value}" for key, value in chosen.items()) or "the defaults"
    return Refreshed(f"converted into {out}, with {words}", convert(settings, out, progress))


def is_up_to_date(folder: Path) -> bool:
    """Tell whether a conversion would be used as it is.

    Raises:
        McpLoraError: its description is damaged.
    """
    old = statistics(folder)
    if old is None:
        return False
    now = _now(Settings(**old["settings"]), old)
    return now is None or _same(now, old)


def _same(now: dict[str, str] | None, old: dict[str, Any]) -> bool:
    """Tell whether inputs hold what a conversion was made of, wherever they lie now."""
    return now is not None and [*now.values()] == [*old.get("inputs", {}).values()]


def _now(settings: Settings, old: dict[str, Any]) -> dict[str, str] | None:
    """Return the hashes of what would be read now; None where any of it is gone.

    The shipped sample, which is on every machine, stands in for nothing that is gone.
    """
    inputs = [Path(name) for name in settings.inputs]
    if not inputs and any(FILTERED_FOLDER.glob(FILTERED)):
        inputs = [newest_filtered()]
        known = old.get("inputs")
        if known and inputs[0].name == SAMPLE and str(inputs[0].absolute()) not in known:
            return None
    try:
        tool_files = files.find([Path(name) for name in settings.tools])
        return _hashes(files.find(inputs), tool_files) if inputs else None
    except (McpLoraError, OSError):
        return None


def _hashes(*groups: list[Path]) -> dict[str, str]:
    """Return the SHA-256 of each file, by its absolute path."""
    hashes = {}
    for file in (file for group in groups for file in group):
        with file.open("rb") as stream:
            hashes[str(file.absolute())] = hashlib.file_digest(stream, "sha256").hexdigest()
    return hashes


def statistics(folder: Path) -> dict[str, Any] | None:
    """Return the account of a conversion, None where there is none.

    Raises:
        McpLoraError: it is damaged.
    """
    return _load(folder / "stats.json") or None


def facts(folder: Path) -> int | None:
    """Return how many rows a conversion has to train on, None where there is none.

    Raises:
        McpLoraError: its description is damaged.
    """
    stats = statistics(folder)
    if not stats or "inputs" not in stats:  # of an earlier version of mcp-lora
        return None
    return int(stats["written"]["train"] + stats["no_call_samples"].get("train", 0))


def names(folder: Path) -> set[str]:
    """Return the splits in a folder; none where there is no conversion."""
    return {split for split in SPLITS if file_of(folder, split).is_file()}


def file_of(folder: Path, split: str) -> Path:
    """Return where the rows of a split are, in OpenAI's form."""
    return folder / f"{split}.jsonl"


def samples(folder: Path, split: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of a split, in OpenAI's form.

    Raises:
        McpLoraError: the folder has no such split, or a damaged one.
    """
    file = file_of(folder, split)
    if split not in SPLITS or not file.is_file():
        there = ", ".join(name for name in SPLITS if name in names(folder)) or "no data"
        raise McpLoraError(f"{folder} holds {there}, not {split}: mcp-lora convert --out {folder}")
    for sample in files.read(file):
        if not isinstance(sample, dict) or not {"messages", "tools"} <= set(sample):
            what = (
                sample.sentence if isinstance(sample, files.Broken) else "a row has no messages, or no tools"
            )
            raise McpLoraError(f"{file} cannot be used ({what}): mcp-lora convert --out {folder}")
        yield sample


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
    """Put a whole new folder in the place of the old one.

    Where `out` holds others' files, which are never moved, or is a mount point, our files are replaced one
    after another, stats.json last.
    """
    old = _old(out)
    if out.exists() and all(map(_is_ours, out.iterdir())):
        with contextlib.suppress(OSError):  # a mount point cannot be renamed
            out.rename(old)
    if not out.exists():
        new.rename(out)
        shutil.rmtree(old, ignore_errors=True)
        return
    files_now = sorted(new.iterdir(), key=lambda file: file.name == "stats.json")
    for file in files_now:
        shutil.move(file, out / file.name)  # a mount point may be another device
    for left in out.iterdir():
        if _is_ours(left) and left.name not in {file.name for file in files_now}:
            shutil.rmtree(left) if left.is_dir() else left.unlink()


def _recover(out: Path) -> None:
    """Bring back, or remove, the old folder that a conversion which was killed has left."""
    out = Path(os.path.realpath(out))
    old = _old(out)
    if old.exists():
        if out.exists():
            shutil.rmtree(old)
        else:
            old.rename(out)


def _old(out: Path) -> Path:
    return out.with_name(f".{out.name}.old")


def _is_ours(file: Path) -> bool:
    names = {"dataset_info.json", "rejected.jsonl", "stats.json", RENDERED}
    names |= {f"{split}.jsonl" for split in SPLITS}
    return file.name in names or (
        file.name.startswith(("mcp_train_data.", "mcp_test_")) and file.suffix in (".json", ".jsonl")
    )
