"""Prepare a training run, and hand it to the engine."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mcp_lora import config as configuration
from mcp_lora import dataset, embedded, engine, launch, lengths, runs
from mcp_lora.config import Machine
from mcp_lora.errors import McpLoraError


@dataclass(frozen=True)
class Plan:
    """What will be run: the resolved configuration, the command, its variables, remarks.

    `rank` is this process's among those that deepspeed or torchrun started, None without them.
    """

    config: dict[str, Any]
    argv: list[str]
    environment: dict[str, str]
    notes: list[str]
    rank: int | None

    @property
    def run(self) -> Path:
        """The output folder."""
        return Path(self.config["output_dir"])

    @property
    def leads(self) -> bool:
        """Whether this process speaks and writes for all."""
        return not self.rank


def plan(
    file: Path,
    overrides: list[str],
    flags: dict[str, Any],
    machine: Machine,
    resume: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
) -> Plan:
    """Resolve and check a run; nothing is written, but the embedded model is fetched if it is used.

    Args:
        file: the recipe.
        overrides: key=value words, in the engine's names.
        flags: keys set by options of their own; None is not set.
        machine: where it will run.
        resume: go on from the newest checkpoint.
        overwrite: the output folder may hold a run.
        dry_run: fetch nothing, and only remark on what this machine could not run.

    Raises:
        McpLoraError: the configuration, the model or the output folder will not do.
    """
    config, notes = configuration.resolve(file, os.environ, overrides, flags, machine)
    config.setdefault("output_dir", str(runs.DEFAULT.absolute()))
    problems = engine.problems(config)
    model = str(config.get("model_name_or_path"))
    if model != embedded.NAME and (missing := configuration.missing_model(model)):
        problems.append(missing)
    if problems:
        raise McpLoraError(f"{'; '.join(problems)}. Mend that and run again: mcp-lora train --dry-run")
    if heavy := configuration.too_big(model, machine):
        if not dry_run:
            raise McpLoraError(heavy)
        notes.append(f"warning: {heavy}")
    if model == embedded.NAME:
        config["model_name_or_path"] = str(embedded.folder() if dry_run else embedded.ensure())
    if checkpoint := runs.prepare(Path(config["output_dir"]), config, resume, overwrite):
        config["resume_from_checkpoint"] = str(checkpoint)
        notes.append(f"resuming from {checkpoint}")
    return Plan(
        config,
        launch.engine_argv("train", Path(config["output_dir"]) / "run.yaml"),
        launch.engine_environment(config, machine, os.environ),
        notes,
        launch.worker_rank(os.environ),
    )


def refresh_data(
    config: dict[str, Any],
    data: Path | None,
    progress: dataset.Progress = lambda doing, share: None,
) -> dict[str, Any] | None:
    """Convert where the data is newer than the conversion, or was converted for another model.

    Of several ranks the first to come does.

    Returns:
        The statistics of a new conversion, or None where there was nothing to do.

    Raises:
        McpLoraError: the data cannot be read, the folder cannot be written, or `data` is given for
            a dataset that is not ours.
    """
    if config.get("dataset") != dataset.TRAIN:
        if data:
            raise McpLoraError(
                f"--data is converted into the dataset {dataset.TRAIN}, but dataset is "
                f"{config.get('dataset')}: mcp-lora train --data {data} dataset={dataset.TRAIN}"
            )
        return None
    folder = Path(config["dataset_dir"])
    with dataset.locked(folder):
        return dataset.refresh(data, folder, lengths.budget(config), progress)


def start(plan: Plan) -> None:
    """Write run.yaml and train: through llamafactory-cli, or in this process if it is a rank.

    Raises:
        McpLoraError: the folder cannot be written, or the engine fails.
    """
    if plan.leads:
        runs.write_config(plan.run, plan.config)
    if plan.rank is not None:
        engine.train(plan.config)
        return
    *command, file = plan.argv
    with launch.without_spaces(Path(file), plan.environment) as readable:
        outcome = launch.run([*command, str(readable)], plan.environment)
    if outcome.code:
        raise outcome.error("mcp-lora train")
