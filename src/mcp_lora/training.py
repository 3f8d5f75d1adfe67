"""Prepare a training run, and hand it to the engine."""

import math
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mcp_lora import config as configuration
from mcp_lora import dataset, embedded, engine, launch, lengths, manifest, memory, runs, templates
from mcp_lora.config import Machine
from mcp_lora.errors import McpLoraError
from mcp_lora.world import World, share_batch

# Of the memory, which is counted without CUDA's own and its fragments; see memory.py.
SAFE = 0.75


@dataclass(frozen=True)
class Plan:
    """What will be run: the resolved configuration, the command, its variables, remarks.

    `batch` says what the batch of a step is made of, `world` who trains.
    """

    config: dict[str, Any]
    argv: list[str]
    environment: dict[str, str]
    notes: list[str]
    batch: str
    world: World

    @property
    def run(self) -> Path:
        """The output folder."""
        return Path(self.config["output_dir"])


def plan(
    file: Path,
    overrides: list[str],
    flags: dict[str, Any],
    machine: Machine,
    world: World,
    batch: int | None = None,
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
        world: who trains.
        batch: samples of an optimizer step, if not the recipe's.
        resume: go on from the newest checkpoint.
        overwrite: the output folder may hold a run.
        dry_run: fetch nothing, and only remark on what this machine could not run.

    Raises:
        McpLoraError: the configuration, the model or the output folder will not do.
    """
    config, notes = configuration.resolve(file, os.environ, overrides, flags, machine)
    config.setdefault("output_dir", str(runs.DEFAULT.absolute()))
    shared, words = share_batch(config, world.processes, batch)
    config |= shared
    notes.append(words)
    problems = engine.problems(config)
    model = str(config.get("model_name_or_path"))
    if model != embedded.NAME and (missing := configuration.missing_model(model, dry_run)):
        problems.append(missing)
    zero = str(config.get("deepspeed") or "")
    if zero and not zero.lstrip().startswith("{") and not Path(zero).is_file():
        problems.append(f"there is no {zero}: go to the project's folder")
    if problems:
        raise McpLoraError(f"{'; '.join(problems)}. Mend that and run again: mcp-lora train --dry-run")
    if heavy := configuration.too_big(model, machine):
        if not dry_run:
            raise McpLoraError(heavy)
        notes.append(f"warning: {heavy}")
    if model == embedded.NAME:
        config["model_name_or_path"] = str(embedded.folder() if dry_run else embedded.ensure())
    notes.append(templates.fit(config, any(word.startswith("template=") for word in overrides)))
    if checkpoint := runs.prepare(Path(config["output_dir"]), config, resume, overwrite):
        config["resume_from_checkpoint"] = str(checkpoint)
        notes.append(f"resuming from {checkpoint}")
    return Plan(
        config,
        launch.engine_argv("train", Path(config["output_dir"]) / "run.yaml"),
        launch.engine_environment(config, world, machine.gpus, os.environ),
        notes,
        words,
        world,
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


def keep_activations(plan: Plan, machine: Machine, say: Callable[[str], None]) -> Plan:
    """Switch gradient checkpointing off where memory holds the activations of a batch of the longest samples.

    The engine computes them twice otherwise, which takes 20 to 30 % of the time. It is left as it is where
    the configuration speaks of it, and where the model's shape or the memory is not known.

    Args:
        plan: what will be run; how long samples are is known once they are converted.
        machine: where it will run.
        say: is told if they are kept.
    """
    if "disable_gradient_checkpointing" in plan.config or not machine.memory:
        return plan
    longest = _longest(plan.config)
    config = plan.config | {"disable_gradient_checkpointing": True}
    try:
        found = memory.estimate(config | {"cutoff_len": longest}, plan.world.processes)
    except Exception:  # see outlook
        found = None
    room = machine.memory if machine.gpus else machine.memory / plan.world.per_node
    if not found or found.total > SAFE * room:
        return plan
    say(
        f"activations are kept: {found.total / 1e9:.1f} of {room / 1e9:.0f} GB for samples of {longest} "
        f"tokens (disable_gradient_checkpointing=false: computed twice)"
    )
    return replace(plan, config=config)


def _longest(config: dict[str, Any]) -> int:
    """Return the tokens of the longest sample, of which nothing is known before the conversion."""
    known = dataset.facts(Path(str(config.get("dataset_dir"))), str(config.get("dataset")))
    cutoff = int(configuration.number(config, "cutoff_len", 2048))
    return min(cutoff, known["lengths"]["max"]) if known and known["lengths"] else cutoff


def outlook(plan: Plan) -> list[str]:
    """Say what a plan comes to: parameters, memory, steps. No weight is read.

    What cannot be known, as the model's config or the data is not here, is said instead.
    """
    lines = []
    config = plan.config
    model = config.get("model_name_or_path")
    try:
        found = memory.estimate(config, plan.world.processes)
        why = f"the config of {model} is not here"
    except Exception as error:  # models raise what they like where they are built otherwise than most
        found, why = None, f"{model} cannot be built without its weights: {' '.join(str(error).split())}"
    if found:
        share = found.trained / (found.base + found.trained)
        parts = (found.weights, found.adapter, found.activations, found.logits, found.total)
        weights, adapter, activations, logits, total = (f"{part / 1e9:.1f}" for part in parts)
        lines += [
            f"trained: {found.trained:,} parameters, {share:.1%} of the model; adapter on disk: "
            f"{found.file:,} bytes",
            f"memory per GPU, GB: weights {weights} + adapter {adapter} + activations {activations} + logits "
            f"{logits} = {total}, for samples of cutoff_len",
        ]
    else:
        lines.append(f"memory: not known, {why}")
    if known := dataset.facts(Path(str(config.get("dataset_dir"))), str(config.get("dataset"))):
        samples = known["samples"]
        held_out = configuration.number(config, "val_size", 0)
        samples -= round(samples * held_out) if held_out < 1 else int(held_out)
        batch = config["per_device_train_batch_size"] * config["gradient_accumulation_steps"]
        batch *= plan.world.processes
        steps = math.ceil(math.ceil(samples / batch) * configuration.number(config, "num_train_epochs", 3))
        most = configuration.number(config, "max_steps", -1)  # wins over the epochs where it is positive
        steps = int(most) if most > 0 else steps
        lines.append(f"steps: {steps}, of {samples} samples in batches of {batch}")
        if lengths_ := known["lengths"]:
            lines.append(
                f"tokens: {lengths_['median'] * batch:,} a step at the median of {lengths_['median']}; "
                f"padding {lengths_['padding']:.0%}"
            )
    else:
        lines.append("steps: not known, the data is not converted: mcp-lora convert")
    return lines


def start(plan: Plan, say: Callable[[str], None], retry: bool = True) -> None:
    """Write run.yaml and train: through llamafactory-cli, or in this process if it is a rank.

    Out of memory, the batch per device is halved and more of them are accumulated, so that the
    training stays the same; it goes on from the newest complete checkpoint.

    Args:
        plan: what to run.
        say: is told of what is done without having been asked for.
        retry: whether to start again after running out of memory.

    Raises:
        McpLoraError: the folder cannot be written, or the engine fails.
    """
    if plan.world.leads:
        _make_ready(plan, say)
    if plan.world.rank is not None:
        with _recorded(plan) as record:
            engine.train(plan.config)
            record["exit"] = 0
        return
    with _recorded(plan) as record:
        while True:
            outcome = _run(plan)
            record["exit"] = outcome.code
            if not outcome.code:
                return
            # Other machines would not know of it.
            smaller = _smaller(plan) if outcome.out_of_memory and retry and plan.world.nodes == 1 else None
            if not smaller:
                break
            plan = smaller
            keys = ("per_device_train_batch_size", "gradient_accumulation_steps", "resume_from_checkpoint")
            record["retries"].append({key: plan.config.get(key) for key in keys})
            _make_ready(plan, say)
            say(f"out of memory; again from {_from(plan)}: {plan.batch}")
    if outcome.out_of_memory:
        raise McpLoraError(
            f"out of memory at {plan.batch}:\n{launch.real_error(outcome.stderr)}\n"
            f"Lower cutoff_len (samples lose candidate tools to fit) or lora_rank, recompute activations "
            f"(disable_gradient_checkpointing=false), divide the model among GPUs (--zero 3), or train on a "
            f"4-bit base: mcp-lora train --config train_configs/qlora.yaml",
            outcome.code,
        )
    raise outcome.error(f"mcp-lora train{runs.how_to_go_on(plan.run)}")


def _make_ready(plan: Plan, say: Callable[[str], None]) -> None:
    """Write run.yaml, and put aside what the engine could not resume from."""
    runs.write_config(plan.run, plan.config)
    for checkpoint in runs.put_aside_incomplete(plan.run):
        say(f"{checkpoint} was not written to its end: no run resumes from it")


def _run(plan: Plan) -> launch.Outcome:
    """Run the engine; the run's folder, with its run.yaml, is the first machine's."""
    with tempfile.TemporaryDirectory(prefix="mcp-lora-") as folder:
        file = plan.run / "run.yaml" if plan.world.leads else runs.write_config(Path(folder), plan.config)
        with launch.without_spaces(file, plan.environment) as readable:
            return launch.run([*plan.argv[:-1], str(readable)], plan.environment)


def _smaller(plan: Plan) -> Plan | None:
    """Return the plan with half the batch per device, from the newest checkpoint; None if it is 1 already."""
    size = plan.config["per_device_train_batch_size"]
    if size == 1:
        return None
    processes = plan.world.processes
    batch = size * plan.config["gradient_accumulation_steps"] * processes
    keys, words = share_batch({"per_device_train_batch_size": size // 2}, processes, batch)
    saved = [checkpoint for checkpoint in runs.checkpoints(plan.run) if runs.is_complete(checkpoint)]
    config = plan.config | keys | {"resume_from_checkpoint": str(saved[-1]) if saved else None}
    return replace(plan, config=config, batch=words)


def _from(plan: Plan) -> str:
    checkpoint = plan.config["resume_from_checkpoint"]
    return Path(checkpoint).name if checkpoint else "the start"


@contextmanager
def _recorded(plan: Plan) -> Iterator[dict[str, Any]]:
    """Keep the run's manifest: the first process writes it, at the start and at the end."""
    record: dict[str, Any] = {"retries": [], "exit": None}
    if not plan.world.leads:
        yield record
        return
    try:
        record = manifest.describe(plan.config, plan.argv, plan.environment, plan.world.processes)
        manifest.write(plan.run, record)
    except OSError as error:
        raise McpLoraError(
            f"{error.filename or plan.run} cannot be read or written ({error.strerror}): "
            f"mcp-lora train --output OTHER_FOLDER"
        ) from None
    try:
        yield record
    except McpLoraError as error:
        record["exit"] = error.code
        raise
    except BaseException:
        record["exit"] = 1
        raise
    finally:
        record["ended"] = manifest.now()
        with suppress(OSError):  # a full disk is told of by the engine
            manifest.write(plan.run, record)
