"""Prepare a training run, and hand it to the engine."""

import math
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mcp_lora import config as configuration
from mcp_lora import dataset, embedded, engine, launch, manifest, memory, runs, steps
from mcp_lora.config import Machine
from mcp_lora.errors import McpLoraError
from mcp_lora.prompts import render as prompts
from mcp_lora.prompts import rendered
from mcp_lora.world import World, share_batch


@dataclass(frozen=True)
class Plan:
    """What will be run: the resolved configuration, the command, its variables, remarks.

    `batch` says what the batch of a step is made of, `world` who trains, `given` which keys were set on the
    command line. Once the data is rendered, `rendered` is what rendered.json holds, and `chat_template` what
    has to be served with the adapter where that is not the model's own.
    """

    config: dict[str, Any]
    argv: list[str]
    environment: dict[str, str]
    notes: list[str]
    batch: str
    world: World
    given: frozenset[str] = frozenset()
    rendered: dict[str, Any] | None = None
    chat_template: str | None = None

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
    problems = settings_problems(config)
    model = str(config.get("model_name_or_path"))
    if model != embedded.NAME and (missing := configuration.missing_model(model, dry_run)):
        problems.append(missing)
    zero = str(config.get("deepspeed") or "")
    if zero and not zero.lstrip().startswith("{") and not Path(zero).is_file():
        problems.append(f"there is no {zero}: go to the project's folder")
    if problems:
        raise McpLoraError(f"{'; '.join(problems)}. Fix that and run again: mcp-lora train --dry-run")
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
        launch.engine_environment(config, world, machine.gpus, os.environ),
        notes,
        words,
        world,
        frozenset(configuration.parse_overrides(overrides)),
    )


def settings_problems(config: dict[str, Any]) -> list[str]:
    """Return what is wrong with settings, whatever the machine, the model and the data."""
    return engine.problems(config) + _makes_no_adapter(config) + _renders_otherwise(config)


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


# What means something in the engine's own rendering alone, and what to do instead.
_ELSEWHERE = {
    "template": "the model's own chat template is trained",
    "tool_format": "the model's own chat template is trained",
    "default_system": "write a system message into the data",
    "packing": "samples are trained one by one",
    "neat_packing": "samples are trained one by one",
    "streaming": "the rendered data set is on disk, and read from there",
    "eval_dataset": "val_size holds rows out",
    "mix_strategy": "mcp-lora convert reads all data into one data set",
    "interleave_probs": "mcp-lora convert reads all data into one data set",
    "preserve_thinking": "enable_thinking decides what is trained",
    "overwrite_cache": "what changes is rendered anew",
    "split_special_tokens": "prompts are tokenized as a server does",
    "tokenized_path": "mcp-lora renders the data set, with dataset_dir",
}


def _renders_otherwise(config: Mapping[str, Any]) -> list[str]:
    """Return what is set that would be ignored, as the data set is rendered before the engine sees it."""
    problems = [
        f"{key}={config[key]} has no effect, {instead}: leave it out"
        for key, instead in _ELSEWHERE.items()
        if config.get(key)
    ]
    if (name := config.get("dataset", dataset.TRAIN)) != dataset.TRAIN:
        problems.append(
            f"dataset={name} is not converted: mcp-lora convert FILE, and dataset={dataset.TRAIN}"
        )
    if (stage := config.get("stage", "sft")) != "sft":
        problems.append(f"stage={stage} is not supervised fine-tuning, set stage=sft")
    return problems


def refresh_data(
    config: Mapping[str, Any],
    data: Path | None,
    progress: dataset.Progress = lambda doing, share: None,
) -> dataset.Refreshed:
    """Convert where the inputs are others than those of the conversion; of several ranks the first does.

    Raises:
        McpLoraError: the data cannot be read, or the folder cannot be written.
    """
    folder = Path(config["dataset_dir"])
    with dataset.locked(folder):
        return dataset.refresh(data, folder, progress)


def render(plan: Plan, say: Callable[[str], None]) -> Plan:
    """Render the training data with the model's chat template, and fit what depends on its size.

    Returns:
        The plan of a run on the rendered data set (see mcp_lora.prompts.rendered and `steps.fit`).

    Raises:
        McpLoraError: the model has no chat template to train with, no sample is left, or the run would make
            no step, or be all warm-up.
    """
    template = prompts.load(plan.config)
    say(f"prompts by {template.note}" + (", with thinking off" * template.is_thinking_off))
    folder = Path(plan.config["dataset_dir"])
    path, made = rendered.render(
        template, dataset.file_of(folder, "train"), folder / dataset.RENDERED, plan.config
    )
    _report(made, say)
    config = plan.config | {"template": rendered.TEMPLATE, "tokenized_path": str(path)}
    if not made["validation"]:
        config["eval_strategy"] = "no"
    plan = _fit(replace(plan, config=config), made["samples"], say)
    own = None if template.is_own else str(template.tokenizer.chat_template)
    made |= {"chat_template": template.note}
    return replace(plan, rendered=made, chat_template=own)


def foresee(plan: Plan, say: Callable[[str], None]) -> Plan:
    """Fit a plan for the rows that are converted, as `render` does for the samples that are made of them.

    Raises:
        McpLoraError: as render.
    """
    return _fit(plan, training_rows(plan.config), say)


def _fit(plan: Plan, samples: int | None, say: Callable[[str], None]) -> Plan:
    """Fit what depends on the number of optimizer steps (see `steps.fit`), and report that number."""
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


def _report(made: Mapping[str, Any], say: Callable[[str], None]) -> None:
    lengths = made["lengths"]
    say(
        f"tokens of a sample: median {lengths['median']}, 95 % up to {lengths['p95']}, max {lengths['max']}, "
        f"cutoff_len {lengths['cutoff_len']}"
    )
    if made["shortened"]:
        say(f"{made['shortened']} rows lost {made['dropped_tools']} distractors to fit into cutoff_len")
    if made["lost_texts"]:
        say(f"warning: the chat template leaves out the text beside a call in {made['lost_texts']} turns")
    if left_out := made["left_out"]:
        reasons = ", ".join(f"{count} {reason}" for reason, count in left_out.items())
        say(f"warning: {sum(left_out.values())} rows are left out ({reasons}): {'; '.join(made['reasons'])}")


def training_rows(config: Mapping[str, Any]) -> int | None:
    """Return how many rows are trained on, without those of val_size; None where nothing is converted."""
    known = dataset.facts(Path(str(config.get("dataset_dir"))))
    if known is None:
        return None
    rows = int(min(known, configuration.number(config, "max_samples", math.inf)))
    held_out = configuration.number(config, "val_size", 0)
    # datasets' train_test_split rounds a share up
    return rows - (math.ceil(rows * held_out) if held_out < 1 else int(held_out))


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
    rows = training_rows(config)
    count = steps.count(config, rows, plan.world.processes)
    if count is None:
        lines.append("steps: not known, the data is not converted: mcp-lora convert")
    elif rows is None:
        lines.append(f"steps: {count}")
    else:
        batch = steps.global_batch(config, plan.world.processes)
        lines.append(f"steps: {count}, of {rows} samples in batches of {batch}")
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
        if plan.chat_template:  # the engine has saved the base model's beside the adapter
            for folder in (plan.run, *runs.checkpoints(plan.run)):
                (folder / runs.CHAT_TEMPLATE).write_text(plan.chat_template, encoding="utf-8")


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
        record["rendered"] = plan.rendered
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
