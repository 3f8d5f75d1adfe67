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
from mcp_lora import dataset, embedded, engine, launch, lengths, manifest, memory, runs, steps, templates
from mcp_lora.config import Machine
from mcp_lora.errors import McpLoraError
from mcp_lora.world import World, share_batch


@dataclass(frozen=True)
class Plan:
    """What will be run: the resolved configuration, the command, its variables, remarks.

    `batch` says what the batch of a step is made of, `world` who trains, `given` which keys were set on the
    command line.
    """

    config: dict[str, Any]
    argv: list[str]
    environment: dict[str, str]
    notes: list[str]
    batch: str
    world: World
    given: frozenset[str] = frozenset()

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
    problems = engine.problems(config) + _makes_no_adapter(config)
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
        frozenset(configuration.parse_overrides(overrides)),
    )


def _makes_no_adapter(config: dict[str, Any]) -> list[str]:
    """Return why a configuration would end without an adapter that eval, chat and export can load.

    Of the engine's finetuning_type freeze and full save a whole model, and it loads no adapter of oft (its
    hparams/parser.py, _verify_model_args).
    """
    problems = []
    if not config.get("do_train"):
        problems.append("without do_train=true nothing is trained")
    if (method := config.get("finetuning_type", "lora")) != "lora":
        problems.append(f"finetuning_type={method} makes no LoRA adapter, set finetuning_type=lora")
    return problems


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


def fit(plan: Plan, say: Callable[[str], None]) -> Plan:
    """Fit what depends on the number of optimizer steps (see `steps.fit`), and report that number.

    A plan is returned as it is where the number is not known: the data is not converted, or not ours.

    Raises:
        McpLoraError: the run would make no step, or be all warm-up.
    """
    samples = training_samples(plan.config)
    count = steps.count(plan.config, samples, plan.world.processes)
    if count is None:
        return plan
    config = steps.fit(plan.config, count, plan.given)
    batch = steps.global_batch(config, plan.world.processes)
    made = f", of {samples} samples in batches of {batch}" if samples is not None else ""
    say(f"optimizer steps: {count}{made}; warm-up steps: {config['warmup_steps']}")
    if count < steps.FEW:
        say(f"warning: few steps to learn from; {steps.what_helps(config, plan.world.processes)}")
    return replace(plan, config=config)


def training_samples(config: dict[str, Any]) -> int | None:
    """Return how many samples are trained on, without those of val_size; None where that is not known.

    Packing and streaming leave open how many sequences the engine makes of the samples.
    """
    known = dataset.facts(Path(str(config.get("dataset_dir"))), str(config.get("dataset")))
    if not known or config.get("packing") or config.get("neat_packing") or config.get("streaming"):
        return None
    samples = int(min(known["samples"], configuration.number(config, "max_samples", math.inf)))
    held_out = configuration.number(config, "val_size", 0)
    # datasets' train_test_split rounds a share up; LLaMA-Factory takes what is above 1 as a number.
    return samples - (math.ceil(samples * held_out) if held_out < 1 else int(held_out))


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
            f"trained: {found.trained:,} parameters, {share:.1%} of the model; adapter on disk: about "
            f"{4 * found.trained / 1e6:,.0f} MB",
            f"memory per GPU, estimated in GB: weights {weights} + adapter {adapter} + activations "
            f"{activations} + logits {logits} = about {total}, for samples of cutoff_len",
        ]
    else:
        lines.append(f"memory: not known, {why}")
    samples = training_samples(config)
    count = steps.count(config, samples, plan.world.processes)
    known = dataset.facts(Path(str(config.get("dataset_dir"))), str(config.get("dataset")))
    if known and count is not None:
        batch = steps.global_batch(config, plan.world.processes)
        lines.append(f"steps: {count}, of {samples} samples in batches of {batch}")
        if lengths_ := known["lengths"]:
            lines.append(
                f"tokens: {lengths_['median'] * batch:,} a step at the median of {lengths_['median']}; "
                f"padding {lengths_['padding']:.0%}"
            )
    elif count is not None:
        lines.append(f"steps: {count}")
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
        McpLoraError: the folder cannot be written, the engine fails, or the adapter has learned nothing.
    """
    if plan.world.leads:
        _make_ready(plan, say)
    if plan.world.rank is not None:
        with _recorded(plan) as record:
            engine.train(plan.config)
            _check_result(plan)
            record["exit"] = 0
        return
    with _recorded(plan) as record:
        while True:
            outcome = _run(plan)
            record["exit"] = outcome.code
            if not outcome.code:
                _check_result(plan)
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


def _check_result(plan: Plan) -> None:
    """See to it that a run which has learned nothing does not count as a success; the first process looks."""
    if plan.world.leads:
        runs.check_adapter(plan.run)


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
