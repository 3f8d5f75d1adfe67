"""A dataset's folder: samples in OpenAI's and in LLaMA-Factory's format, and what they were made from.

train.jsonl                   the rows to train on (see mcp_lora.data.samples)
seen.jsonl                    held-out rows of tools that are trained on
unseen_tool.jsonl             rows of held-out tools, and of held-out servers
unseen_server.jsonl
no_call.jsonl                 held-out rows whose gold answer is not to call
mcp_train_data.json, mcp_test_seen.json, …, dataset_info.json     the same for LLaMA-Factory
rejected.jsonl                every rejected row, and why
stats.json                    the statistics, the settings, and the hashes of the inputs
rendered/                     train.jsonl as token ids of a model (see mcp_lora.prompts.render)
"""

import contextlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import msgspec

from mcp_lora.data import files
from mcp_lora.data.records import Settings, Statistics
from mcp_lora.data.samples import SPLITS as SPLITS
from mcp_lora.data.samples import engine_file
from mcp_lora.errors import McpLoraError, explained

FOLDER = Path("data/llama_factory")
RENDERED = "rendered"  # its subfolder of rendered datasets
TRAIN = SPLITS["train"]  # what a recipe calls the dataset
STATS = "stats.json"
INFO = "dataset_info.json"


def foreign(out: Path) -> list[str]:
    """Return the files that a conversion would overwrite, and that none has written as they are."""
    there = [name for name in sorted(FILES) if (out / name).is_file()]
    if "settings" not in load(out / STATS):
        return there + [STATS] * (out / STATS).is_file()
    written = recorded(out).files
    if written is None:  # a conversion that was killed
        return []
    return [name for name in there if name != INFO and written.get(name) != files.sha256(out / name)]


def recorded(folder: Path) -> Statistics:
    """Return the statistics in a folder, only the settings if it is not complete.

    Raises McpLoraError if they are damaged.
    """
    return files.parsed(folder / STATS, Statistics, f"remove it, and mcp-lora convert --output {folder}")


def statistics(folder: Path) -> Statistics | None:
    """Return the statistics of a complete conversion, or None; a McpLoraError if they are damaged."""
    found = recorded(folder)
    return found if found.inputs and found.samples else None


def summary(statistics: Statistics, out: Path) -> Iterator[str]:
    """Yield messages on what a conversion into `out` has read and written, and its warnings."""
    rejected = sum(statistics.rejected.values())
    parts = [f"{count} in {name}" for name, count in statistics.written.items()]
    tools = f"{statistics.tools} tools of {statistics.servers} servers"
    yield f"read {statistics.read} rows = {' + '.join(parts)} + {rejected} rejected; {tools} → {out}"
    if rejected:
        yield f"the rejected rows, and why, are in {out / 'rejected.jsonl'}"
    for name, count in statistics.no_call_samples.items():
        yield f"{count} extra samples without the gold tool in {name}"
    for note in (notes := statistics.notes)[:3]:
        yield f"warning: {note}"
    if len(notes) > 3:
        yield f"warning: {len(notes) - 3} more notes are in {out / 'stats.json'}"


def names(folder: Path) -> set[str]:
    """Return the splits in a folder; none if there is no conversion."""
    return {split for split in SPLITS if file_of(folder, split).is_file()}


def file_of(folder: Path, split: str) -> Path:
    """Return the file with the samples of a split, in OpenAI's format."""
    return folder / f"{split}.jsonl"


def samples(folder: Path, split: str) -> Iterator[dict[str, Any]]:
    """Yield the samples of a split, in OpenAI's format.

    Raises McpLoraError if the split is missing or damaged.
    """
    if split not in (there := names(folder)):
        what = ", ".join(name for name in SPLITS if name in there) or "no data"
        raise McpLoraError(f"{folder} contains {what}, not {split}: mcp-lora convert --output {folder}")
    for sample in files.read(file := file_of(folder, split)):
        if not isinstance(sample, dict) or not {"messages", "tools"} <= set(sample):
            what = getattr(sample, "message", "a row has no messages, or no tools")
            command = f"mcp-lora convert --output {folder}, after removing it"
            raise McpLoraError(f"{file} cannot be used ({what}): {command}")
        yield sample


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Allow one conversion into a folder at a time; several ranks may start one."""
    problem = f"another process has been converting into {folder} for an hour: end it, and run again"
    with explained(f"{folder} cannot be written", "mcp-lora convert --output OTHER_FOLDER"):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with files.exclusive(folder.parent / f".{folder.name}.lock", problem, files.WAIT):
            yield


# The files that a conversion may write, except stats.json.
FILES = {INFO, "rejected.jsonl", *(name for one in SPLITS for name in (f"{one}.jsonl", engine_file(one)))}


def load(file: Path) -> dict[str, Any]:
    """Return the JSON object in a file of a dataset's folder, or an empty one if there is no such file."""
    return files.load(file, f"remove it, and mcp-lora convert --output {file.parent}")


def dump(content: Any, file: Path) -> None:
    """Write JSON, or a dataclass as a JSON object, into a file."""
    text = json.dumps(msgspec.to_builtins(content), ensure_ascii=False, indent=2)
    file.write_text(text + "\n", encoding="utf-8")


def put_in_place(new: Path, out: Path, settings: Settings) -> None:
    """Replace the files of an old conversion by those of a new one.

    Until this is done stats.json contains only the settings: if it is killed, rows of the old and the new
    conversion are never mixed, and `refresh` converts again.
    """
    dump({"settings": asdict(settings)}, new / "unfinished")
    (new / "unfinished").replace(out / STATS)
    shutil.rmtree(out / RENDERED, ignore_errors=True)
    for name in FILES:
        (out / name).unlink(missing_ok=True)
    for file in sorted(new.iterdir(), key=lambda file: file.name == STATS):
        file.replace(out / file.name)
