"""Prepare a training run, and hand it to the engine."""

import math
import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mcp_lora import demo_model
from mcp_lora.data import dataset, files
from mcp_lora.engine import api, launch
from mcp_lora.engine.api import number
from mcp_lora.engine.topology import World, share_batch
from mcp_lora.errors import Interrupted, McpLoraError
from mcp_lora.prompts import chat_template as prompts
from mcp_lora.prompts import render
from mcp_lora.train import manifest, memory, runs, steps
from mcp_lora.train import recipe as configuration
from mcp_lora.train.recipe import Machine

Say = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """What will be run: LLaMA-Factory's keys, the engine's variables, who trains.

    `batch` says what the global batch size is made of, `given` which keys were set on the command line,
    `steps` how many there are (empty until the data is known). Once the data is rendered, `rendered` is what
    rendered.json holds, and `chat_template` what has to be served with the adapter where that is not the
    model's own.
    """

    config: dict[str, Any]
    environment: dict[str, str]
    batch: str
    world: World
    given: frozenset[str] = frozenset()
    steps: str = ""
    rendered: dict[str, Any] | None = None
    chat_template: str | None = None

    @property
    def run(self) -> Path:
        """The output folder."""
        return Path(self.config["output_dir"])

    @property
    def argv(self) -> list[str]:
        """The engine's command."""
        return launch.engine_argv("train", self.run / "run.yaml")


def plan(
    file: Path,
    overrides: list[str],
    flags: dict[str, Any],
    machine: Machine,
    world: World,
    say: Say,
    batch: int | None = None,
    resume: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
) -> Plan:
    """Resolve and check a run; nothing is written, but the embedded model is fetched if it is used.

    `flags` are keys set by options of their own (None is not set), `batch` the global batch size if not the
    recipe's. What was fitted to the machine is said. A `dry_run` fetches nothing, and only remarks on what
    this machine could not run.

    Raises McpLoraError where the configuration, the model or the output folder will not do.
    """
    config, notes = configuration.resolve(file, os.environ, overrides, flags, machine)
    for note in notes:
        say(note)
    config["output_dir"] = config.get("output_dir") or str(runs.DEFAULT.absolute())
    shared, words = share_batch(config, world.processes, batch)
    config |= shared
    say(words)
    problems = settings_problems(config)
    model = str(config.get("model_name_or_path"))
    if model != demo_model.NAME and (missing := configuration.missing_model(model, dry_run)):
        problems.append(missing)
    if problems:
        raise McpLoraError(f"{'; '.join(problems)}. Fix that and run again: mcp-lora train --dry-run")
    if heavy := configuration.too_big(model, machine):
        if not dry_run:
            raise McpLoraError(heavy)
        say(f"warning: {heavy}")
    if not dry_run and not (os.path.exists(model) or manifest.cached(config, "tokenizer_config.json")):
        say(f"{model} is not on this machine, it is fetched")
    config |= demo_model.located(config, fetch=not dry_run)
    if checkpoint := runs.prepare(Path(config["output_dir"]), config, resume, overwrite):
        _check_batch(Path(config["output_dir"]), config, world)
        config["resume_from_checkpoint"] = str(checkpoint)
        say(f"resuming from {checkpoint}")
    environment = launch.engine_environment(config, world, machine.gpus, os.environ)
    given = frozenset(configuration.parse_overrides(overrides))
    return Plan(config, environment, words, world, given)


def _check_batch(run: Path, config: Mapping[str, Any], world: World) -> None:
    """Refuse to resume a run with another global batch size."""
    was = steps.global_batch(runs.read_run(run), manifest.read(run).get("processes", world.processes))
    now = steps.global_batch(config, world.processes)
    if was != now:
        raise McpLoraError(
            f"{run} was trained in batches of {was}, not {now}: mcp-lora train --resume "
            f"--global-batch {was}, or --overwrite"
        )


# What means something in the engine's own rendering alone, by what to do instead.
_ELSEWHERE = {
    "the model's own chat template is trained": ("template", "tool_format"),
    "write a system message into the data": ("default_system",),
    "samples are trained one by one": ("packing", "neat_packing"),
    "the rendered data set is on disk, and read from there": ("streaming",),
    "val_size holds rows out": ("eval_dataset",),
    "mcp-lora convert reads all data into one data set": ("mix_strategy", "interleave_probs"),
    "enable_thinking decides what is trained": ("preserve_thinking",),
    "what changes is rendered anew": ("overwrite_cache",),
    "prompts are tokenized as a server does": ("split_special_tokens",),
    "mcp-lora renders the data set, with dataset_dir": ("tokenized_path",),
}


def settings_problems(config: Mapping[str, Any]) -> list[str]:
    """Return what is wrong with settings, whatever the machine, the model and the data.

    These are keys that the engine does not know, settings without effect, as the data set is rendered before
    the engine sees it, and those that make no adapter that eval, chat and export can load: of finetuning_type
    freeze and full save a whole model, and the engine loads no adapter of oft (its hparams/parser.py,
    _verify_model_args).
    """
    problems = api.problems(config)
    if not config.get("do_train"):
        problems.append("without do_train=true nothing is trained")
    if (method := config.get("finetuning_type", "lora")) != "lora":
        problems.append(f"finetuning_type={method} makes no LoRA adapter, set finetuning_type=lora")
    problems += [
        f"{key}={config[key]} has no effect, {instead}: leave it out"
        for instead, keys in _ELSEWHERE.items()
        for key in keys
        if config.get(key)
    ]
    if (name := config.get("dataset", dataset.TRAIN)) != dataset.TRAIN:
        problems.append(f"dataset={name} is not converted: mcp-lora convert, and dataset={dataset.TRAIN}")
    if not config.get("quantization_bit"):
        quantising = [key for key in config if key in ("quantization_type", "double_quantization")]
        problems += [f"{key} has no effect without quantization_bit: set it, to 4" for key in quantising]
    if (stage := config.get("stage", "sft")) != "sft":
        problems.append(f"stage={stage} is not supervised fine-tuning, set stage=sft")
    return problems + _deepspeed_problems(config.get("deepspeed"))


def _deepspeed_problems(given: Any) -> list[str]:
    """Return what is wrong with DeepSpeed's configuration: a file, or the JSON itself."""
    if not given or isinstance(given, dict) or str(given).lstrip().startswith("{"):
        return []
    if not os.path.isfile(str(given)):
        return [f"there is no {given}: go to the project's folder"]
    try:
        content = files.load(Path(given), "give another, as in mcp-lora train --zero 0")
    except McpLoraError as error:
        return [str(error)]
    return [] if content else [f"{given} is empty"]


def preview(plan: Plan, say: Say) -> str:
    """Return what would be run, and what it comes to: parameters, memory, steps. No weight is read.

    Raises McpLoraError where the run would make no step, or be all warm-up.
    """
    plan = _fit(plan, _training_rows(plan.config), say)
    known = plan.steps or "not known, the data is not converted: mcp-lora convert"
    parts = {
        str(plan.run / "run.yaml"): [api.dump(plan.config)],
        "command": [" ".join(plan.argv)],
        "environment": [f"{name}={value}" for name, value in plan.environment.items()],
        "plan": [plan.batch, *_needed_memory(plan), f"steps: {known}"],
    }
    return "\n".join(line for title, lines in parts.items() for line in (f"# {title}", *lines))


def _needed_memory(plan: Plan) -> list[str]:
    model = plan.config.get("model_name_or_path")
    try:
        found = memory.estimate(plan.config, plan.world.processes)
    except Exception as error:  # models raise what they like where they are built otherwise than most
        reason = " ".join(str(error).split())
        return [f"memory: not known, {model} cannot be built without its weights: {reason}"]
    if not found:
        return [f"memory: not known, the config of {model} is not here"]
    share = found.trained / (found.base + found.trained)
    parts = (found.weights, found.adapter, found.activations, found.logits, found.total)
    weights, adapter, activations, logits, total = (f"{part / 1e9:.1f}" for part in parts)
    return [
        f"trained: {found.trained:,} parameters, {share:.1%} of the model; adapter on disk: about "
        f"{4 * found.trained / 1e6:,.0f} MB",
        f"memory per GPU, estimated in GB: weights {weights} + adapter {adapter} + activations "
        f"{activations} + logits {logits} = about {total}, for samples of cutoff_len",
    ]


def _training_rows(config: Mapping[str, Any]) -> int | None:
    """Return how many rows are trained on, without those of val_size; None where nothing is converted."""
    stats = dataset.statistics(Path(str(config.get("dataset_dir"))))
    if stats is None:
        return None
    rows = int(min(stats["samples"]["train"], number(config, "max_samples", math.inf)))
    held_out = number(config, "val_size", 0)
    # datasets' train_test_split rounds a share up
    return rows - (math.ceil(rows * held_out) if held_out < 1 else int(held_out))


def run(plan: Plan, say: Say, retry: bool = True, overwrite: bool = False) -> None:
    """Train on the converted data: render it, put an old run aside if `overwrite`, start the engine.

    Out of memory, with `retry`, the per-device batch size is halved and more batches are accumulated, so
    that the training stays the same; it goes on from the newest complete checkpoint.

    Raises McpLoraError where the data cannot be rendered, the folder cannot be written, the engine fails,
    or the adapter has learned nothing.
    """
    with runs.locked(plan.run) if plan.world.leads else nullcontext():
        _run(plan, say, retry, overwrite)


def _run(plan: Plan, say: Say, retry: bool, overwrite: bool) -> None:
    resume = bool(plan.config.get("resume_from_checkpoint"))
    # once more, as another training may have been in the folder meanwhile
    if plan.world.leads and (checkpoint := runs.prepare(plan.run, plan.config, resume, overwrite)):
        plan = replace(plan, config=plan.config | {"resume_from_checkpoint": str(checkpoint)})
    if resume:
        manifest.check_data(plan.run, Path(plan.config["dataset_dir"]))
    plan = _render(plan, say)
    if overwrite and plan.world.leads and (previous := runs.put_aside(plan.run)):
        say(f"the run that was in {plan.run} is now in {previous}")
    say(f"training; the configuration is in {plan.run / 'run.yaml'}")
    retries: list[dict[str, Any]] = []
    recorded: AbstractContextManager[None] = nullcontext()
    if plan.world.leads:
        _write(plan, say)
        record = manifest.describe(plan.config, plan.argv, plan.environment, plan.world.processes)
        record |= {"rendered": plan.rendered, "retries": retries}
        recorded = manifest.recorded(plan.run, record)
    try:
        with recorded:
            if resume and runs.is_done(plan.run, plan.config):
                say("training has come to its end already, and was not recorded")
            elif plan.world.rank is None:
                _run_engine(plan, say, retry, retries)
            else:
                api.train(plan.config)
            if plan.world.leads:
                _check_result(plan)
    except Interrupted as interruption:
        interruption.option = runs.how_to_go_on(plan.run).strip()
        raise
    say(f"the adapter is in {plan.run}; the next steps: mcp-lora eval, chat and export {plan.run}")


def _render(plan: Plan, say: Say) -> Plan:
    """Render the training data with the model's chat template, and fit what depends on its size."""
    template = prompts.load(plan.config)
    say(f"prompts: {template.note}" + (", with thinking off" * template.is_thinking_off))
    folder = Path(plan.config["dataset_dir"])
    path, made = render.render(
        template, dataset.file_of(folder, "train"), folder / dataset.RENDERED, plan.config
    )
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
    config = plan.config | {"template": render.TEMPLATE, "tokenized_path": str(path)}
    if not made["validation"]:
        config["eval_strategy"] = "no"
    own = None if template.is_own else str(template.tokenizer.chat_template)
    made = made | {"chat_template": template.note}
    return _fit(replace(plan, config=config, rendered=made, chat_template=own), made["samples"], say)


def _fit(plan: Plan, samples: int | None, say: Say) -> Plan:
    """Fit what depends on the number of optimizer steps (see `steps.fit`), and report that number."""
    processes = plan.world.processes
    count = steps.count(plan.config, samples, processes)
    if count is None:
        return plan
    config = steps.fit(plan.config, count, plan.given)
    batch = steps.global_batch(config, processes)
    words = f"{count}, of {samples} samples in batches of {batch}" if samples is not None else str(count)
    say(f"optimizer steps: {words}; warm-up steps: {config['warmup_steps']}")
    if count < steps.FEW:
        say(f"warning: few steps to learn from; {steps.what_helps(config, processes)}")
    return replace(plan, config=config, steps=words)


def _write(plan: Plan, say: Say) -> None:
    """Write run.yaml, and put aside what the engine could not resume from."""
    runs.write_config(plan.run, plan.config)
    for checkpoint in runs.put_aside_incomplete(plan.run):
        say(f"{checkpoint} was not written to its end: no run resumes from it")


def _run_engine(plan: Plan, say: Say, retry: bool, retries: list[dict[str, Any]]) -> None:
    while (outcome := launch.run_engine("train", plan.config, plan.environment)).code:
        # Other machines would not know of it.
        again = outcome.out_of_memory and retry and plan.world.nodes == 1
        smaller = _smaller(plan, outcome.in_evaluation) if again else None
        if not smaller:
            raise _failure(plan, outcome)
        plan = smaller
        retries.append({key: plan.config.get(key) for key in (*_BATCH, _EVALUATED, "resume_from_checkpoint")})
        _write(plan, say)
        checkpoint = plan.config["resume_from_checkpoint"]
        say(f"out of memory; again from {Path(checkpoint).name if checkpoint else 'the start'}: {plan.batch}")


_BATCH = ("per_device_train_batch_size", "gradient_accumulation_steps")
_EVALUATED = "per_device_eval_batch_size"


def _smaller(plan: Plan, in_evaluation: bool) -> Plan | None:
    """Return the plan with half the batch per device, from the newest checkpoint; None if it is 1 already.

    The batch is that of training, or that of validation where memory ran out in it.
    """
    size = int(number(plan.config, _EVALUATED if in_evaluation else _BATCH[0], 8))
    if size == 1:
        return None
    processes = plan.world.processes
    if in_evaluation:
        keys, words = {_EVALUATED: size // 2}, f"{plan.batch}, in validation {size // 2} per device"
    else:
        batch = steps.global_batch(plan.config, processes)
        keys, words = share_batch({_BATCH[0]: size // 2}, processes, batch)
    saved = [checkpoint for checkpoint in runs.checkpoints(plan.run) if runs.is_complete(checkpoint)]
    config = plan.config | keys | {"resume_from_checkpoint": str(saved[-1]) if saved else None}
    return replace(plan, config=config, batch=words)


def _failure(plan: Plan, outcome: launch.Outcome) -> McpLoraError:
    if not outcome.out_of_memory:
        return outcome.error(f"mcp-lora train{runs.how_to_go_on(plan.run)}")
    return McpLoraError(
        f"out of memory at {plan.batch}:\n{launch.real_error(outcome.stderr)}\n"
        f"Lower cutoff_len (samples lose candidate tools to fit) or lora_rank, recompute activations "
        f"(disable_gradient_checkpointing=false), divide the model among GPUs (--zero 3), or train on a "
        f"4-bit base: mcp-lora train --config train_configs/qlora.yaml",
        outcome.code,
    )


def _check_result(plan: Plan) -> None:
    """See to it that a run which has learned nothing does not count as a success."""
    runs.check_adapter(plan.run)
    if plan.chat_template:  # the engine has saved the base model's beside the adapter
        for folder in (plan.run, *runs.checkpoints(plan.run)):
            (folder / runs.CHAT_TEMPLATE).write_text(plan.chat_template, encoding="utf-8")
