"""The record of a run: `manifest.json` in its folder, written at its start and again at its end.

    {"started": "2026-11-24T12:00:00+00:00", "ended": "2026-11-24T14:10:03+00:00", "exit": 0,
     "retries": [{"per_device_train_batch_size": 8, "gradient_accumulation_steps": 16,
                  "per_device_eval_batch_size": 8,
                  "resume_from_checkpoint": "outputs/mcp_lora/checkpoint-100"}],
     "command": ["…/llamafactory-cli", "train", "outputs/mcp_lora/run.yaml"],
     "environment": {"FORCE_TORCHRUN": "1", "NPROC_PER_NODE": "4"}, "processes": 4,
     "python": "3.11.7", "platform": "Linux-…", "packages": {"torch": "2.14.1"}, "gpus": ["NVIDIA A100"],
     "git_commit": "8373a1e…", "seed": 42, "data": {"file": "…/train.jsonl", "sha256": "…"},
     "base": {"file": "…/config.json", "sha256": "…"}, "conversion": {"read": 293, …},
     "rendered": {"samples": 236, …}, "config": {"lora_rank": 64, …}}

`memory` has the bytes of a GPU, `learned` the per-device batch size that was left when memory had run out, in
this run or an earlier one in its folder. `conversion` is the dataset's stats.json, which the next conversion
overwrites, `rendered` the rendered dataset's rendered.json. `ended` and `exit` are null during training, and
remain so if it is killed.
"""

import importlib.metadata
import os
import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mcp_lora.data import conversion, dataset, files
from mcp_lora.data.records import Statistics
from mcp_lora.engine import launch
from mcp_lora.errors import McpLoraError, explained
from mcp_lora.prompts.chat_template import hub_arguments

NAME = "manifest.json"
_ENGINE = ["llamafactory", "torch", "transformers", "peft", "deepspeed", "accelerate", "datasets"]


@dataclass
class Hashed:
    """A file and its SHA-256."""

    file: str
    sha256: str


@dataclass
class Manifest:
    """The content of manifest.json, see above; one of an earlier version may lack some of it."""

    started: str = ""
    ended: str | None = None
    exit: int | None = None
    retries: list[dict[str, Any]] = field(default_factory=list)
    command: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    processes: int = 1
    python: str = ""
    platform: str = ""
    packages: dict[str, str] = field(default_factory=dict)
    gpus: list[str] = field(default_factory=list)
    git_commit: str | None = None
    seed: int | None = None
    data: Hashed | None = None
    base: Hashed | None = None
    conversion: Statistics | None = None
    rendered: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    memory: float = 0
    learned: int | None = None


def describe(
    config: Mapping[str, Any], argv: list[str], environment: Mapping[str, str], processes: int
) -> Manifest:
    """Return the manifest of a run of `config` that starts now.

    `argv` and `environment` are the engine's command and extra variables, `processes` their total number.
    """
    import torch

    folder, versions = Path(str(config.get("dataset_dir"))), {}
    for package in ["mcp-lora", *_ENGINE]:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return Manifest(
        started=_now(),
        command=argv,
        environment=dict(environment),
        processes=processes,
        python=platform.python_version(),
        platform=platform.platform(),
        packages=versions,
        gpus=[torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())],
        git_commit=launch.output(["git", "rev-parse", "HEAD"]),
        seed=config.get("seed", 42),  # transformers' own
        data=_hashed(dataset.file_of(folder, "train")),
        conversion=dataset.statistics(folder),
        base=_hashed(cached(config, "config.json")),
        config=dict(config),
    )


def read(run: Path) -> Manifest | None:
    """Return a run's manifest, None if there is none; raise a McpLoraError if it is damaged."""
    again = f"remove it, and mcp-lora report {run}"
    return files.parsed(run / NAME, Manifest, again) if (run / NAME).is_file() else None


def check_data(run: Path, folder: Path) -> None:
    """Raise a McpLoraError if the data in `folder` is not what a run was trained on."""
    record, file = read(run), dataset.file_of(folder, "train")
    if record and record.data and file.is_file() and files.sha256(file) != record.data.sha256:
        statistics = record.conversion or Statistics()
        inputs = list(dict.fromkeys(source.file for source in statistics.sources))
        again = conversion.command(replace(statistics.settings, inputs=inputs), folder)
        raise McpLoraError(f"{file} is not what {run} was trained on: {again}, or mcp-lora train --overwrite")


def write(run: Path, manifest: Manifest) -> None:
    """Write a run's manifest atomically; raise an OSError if the folder cannot be written."""
    new = run / f"{NAME}.new"
    dataset.dump(manifest, new)
    os.replace(new, run / NAME)


@contextmanager
def recorded(run: Path, record: Manifest) -> Iterator[None]:
    """Write a manifest now, and again at the end of the `with` block with its exit code.

    Raises McpLoraError if the folder cannot be written.
    """
    with explained(f"{run} cannot be written", "mcp-lora train --output OTHER_FOLDER"):
        write(run, record)
    try:
        yield
        record.exit = 0
    except BaseException as error:
        record.exit = error.code if isinstance(error, McpLoraError) else 1
        raise
    finally:
        record.ended = _now()
        with suppress(OSError):  # the engine reports a full disk
            write(run, record)


def cached(config: Mapping[str, Any], name: str) -> Path | None:
    """Return a file of the base model from its folder or the hub's cache; nothing is fetched."""
    from transformers.utils import cached_file

    places = hub_arguments(config)
    del places["trust_remote_code"]
    try:
        return Path(cached_file(str(config.get("model_name_or_path")), name, local_files_only=True, **places))
    except (OSError, ValueError):
        return None


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _hashed(file: Path | None) -> Hashed | None:
    return Hashed(str(file), files.sha256(file)) if file and file.is_file() else None
