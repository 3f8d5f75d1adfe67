"""A training from request to record: resolve, check, convert, render, start, retry, record."""

import os
import shlex
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mcp_lora import demo_model
from mcp_lora.data import conversion, dataset, files
from mcp_lora.data.rows import Progress
from mcp_lora.engine import api, launch
from mcp_lora.engine.api import number
from mcp_lora.engine.topology import find as find_topology
from mcp_lora.errors import Interrupted, McpLoraError
from mcp_lora.prompts import chat_template as prompts
from mcp_lora.prompts import render
from mcp_lora.train import manifest, runs, steps
from mcp_lora.train import plan as plans
from mcp_lora.train import recipe as configuration
from mcp_lora.train.machine import Machine, detect_machine, too_big
from mcp_lora.train.manifest import Manifest
from mcp_lora.train.plan import Plan, Say

LOG = "train.log"  # the engine's output


@dataclass(frozen=True)
class Request:
    """The request for a training: a recipe, what overrides it, and how it is run.

    `overrides` are `key=value` words with LLaMA-Factory's keys, `gpu_memory` is that of each GPU in GB. None
    leaves a setting to the recipe, the environment or the machine.
    """

    recipe: Path = configuration.RECIPE
    overrides: Sequence[str] = ()
    model: str | None = None
    data: Sequence[Path] = ()
    output: Path | None = None
    zero: str | None = None
    global_batch: int | None = None
    gpus: int | None = None
    gpu_memory: float | None = None
    nodes: int | None = None
    node_rank: int | None = None
    master: str | None = None
    retry: bool = True
    resume: bool = False
    overwrite: bool = False

    @property
    def flags(self) -> dict[str, str | None]:
        """The settings that have command-line options of their own."""
        output = str(self.output) if self.output else None
        zero = str(configuration.ZERO).replace("z0", f"z{self.zero}") if self.zero else None
        return {"model_name_or_path": self.model, "output_dir": output, "deepspeed": zero}


def train(request: Request, say: Say, progress: Progress) -> None:
    """Resolve and check a run, convert its data if it has changed, render it, start the engine, record.

    If memory runs out, the per-device batch size is halved and gradient accumulation doubled, so that the
    global batch size stays; training resumes from the newest complete checkpoint. With `overwrite` an old
    run is moved away.

    Raises McpLoraError if the configuration, the model, the data or the output folder cannot be used, the
    engine fails, or the adapter has learned nothing.
    """
    plan = _plan(request, say, dry=False)
    with dataset.locked(plan.data):
        done, statistics = conversion.refresh(request.data, plan.data, progress, keep=request.resume)
    say(done)
    for line in dataset.summary(statistics, plan.data) if statistics else ():
        say(line)
    with runs.locked(plan.run) if plan.topology.is_main else nullcontext():
        _run(plan, request, say)


def preview(request: Request, say: Say, speed: float | None = None) -> str:
    """Return what would be run, its parameters, memory and steps, and its hours (see `plans.expected`).

    Nothing is fetched or written, no weights are read, and what this machine cannot run is only a warning.

    Raises McpLoraError as `train` does, or if the run would have no steps, or be all warm-up.
    """
    plan = _plan(request, say, dry=True)
    try:
        plan = plans.fit_memory(plan, int(number(plan.config, "cutoff_len", 2048)), say)
    except McpLoraError as error:
        say(f"warning: {error}")
    plan = plans.fit_steps(plan, plans.training_rows(plan.config), say)
    known = plan.steps or "not known, the data is not converted: mcp-lora convert"
    expected = plans.expected(plan, speed) if plan.steps else []
    variables = [f"{name}={value}" for name, value in plan.environment.items()]
    lines = [f"# {plan.run / 'run.yaml'}", api.dump(plan.config), "# command", shlex.join(plan.argv)]
    lines += ["# environment", *variables, "# plan", plan.batch]
    lines += [*plans.deepspeed_costs(plan.config), *plans.needed_memory(plan), f"steps: {known}", *expected]
    return "\n".join(lines)


def _plan(request: Request, say: Say, dry: bool) -> Plan:
    """Resolve and check a run; nothing is written, but the embedded model is fetched if it is used."""
    api.require()
    wanted_memory = 1e9 * request.gpu_memory if request.gpu_memory else None
    machine = detect_machine(request.gpus if dry else None, wanted_memory)
    nodes = (request.nodes, request.node_rank, request.master)
    topology = find_topology(os.environ, machine.gpus, request.gpus, *nodes)
    config = configuration.resolve(request.recipe, os.environ, request.overrides, request.flags, machine, say)
    config["output_dir"] = config.get("output_dir") or str(runs.DEFAULT.absolute())
    wanted = request.global_batch or steps.global_batch(config, 1)
    config |= steps.split_batch(config, topology.processes, request.global_batch)
    given = frozenset(configuration.parse_overrides(request.overrides))
    if request.gpu_memory and not machine.gpus:
        raise McpLoraError("--gpu-memory is of a GPU, and there is none: mcp-lora train --dry-run --gpus 1")
    plan = Plan(config, {}, topology, given, min(machine.memory[: topology.per_node], default=0))
    is_kept = steps.global_batch(config, topology.processes) == wanted
    say(plan.batch if is_kept else f"warning: {plan.batch}, as {topology.processes} does not divide {wanted}")
    _check(config, machine, say, dry)
    model = str(config["model_name_or_path"])
    place = str({**config, **demo_model.located(config, fetch=False)}["model_name_or_path"])
    if not dry and not (os.path.exists(place) or manifest.cached(config, "tokenizer_config.json")):
        say(f"{model} is not on this machine, fetching it")
    config |= demo_model.located(config, fetch=not dry)
    if checkpoint := runs.prepare(plan.run, config, request.resume, request.overwrite):
        processes, record = topology.processes, manifest.read(plan.run)
        was = steps.global_batch(runs.read_run(plan.run), record.processes if record else processes)
        if was != (batch := steps.global_batch(config, processes)):
            what = f"{plan.run} has a global batch size of {was}, not {batch}"
            raise McpLoraError(f"{what}: mcp-lora train --resume --global-batch {was}, or --overwrite")
        config["resume_from_checkpoint"] = str(checkpoint)
        say(f"resuming from {checkpoint}")
    return replace(plan, environment=launch.engine_environment(config, topology, machine.gpus, os.environ))


def _check(config: Mapping[str, Any], machine: Machine, say: Say, dry: bool) -> None:
    """Raise a McpLoraError for invalid settings or models; if `dry`, a model may be too big."""
    problems = settings_problems(config)
    model = str(config.get("model_name_or_path"))
    if model != demo_model.NAME and (missing := configuration.missing_model(model, dry)):
        problems.append(missing)
    if problems:
        raise McpLoraError(f"{'; '.join(problems)}. Fix this and run again: mcp-lora train --dry-run")
    if heavy := too_big(model, machine):
        if not dry:
            raise McpLoraError(heavy)
        say(f"warning: {heavy}")


_REQUIRED = (
    ("finetuning_type", "lora", "does not train a LoRA adapter"),
    ("dataset", dataset.TRAIN, "is not created by mcp-lora convert"),
    ("stage", "sft", "is not supervised fine-tuning"),
)
# Keys that only affect the engine's own rendering, with the reason or what to do instead.
_IGNORED = {
    "template": "the model's own chat template is used",
    "tool_format": "the model's own chat template is used",
    "packing": "samples are not packed",
    "neat_packing": "samples are not packed",
    "mix_strategy": "mcp-lora convert reads all data into one dataset",
    "interleave_probs": "mcp-lora convert reads all data into one dataset",
    "default_system": "write a system message into the data",
    "streaming": "the rendered dataset is read from disk",
    "eval_dataset": "val_size holds rows out",
    "preserve_thinking": "enable_thinking decides whether reasoning is trained on",
    "overwrite_cache": "data is rendered again whenever it changes",
    "split_special_tokens": "prompts are tokenized as a server does",
    "tokenized_path": "mcp-lora renders the dataset in dataset_dir",
}


def settings_problems(config: Mapping[str, Any]) -> list[str]:
    """Return what is wrong with settings, regardless of the machine, the model and the data.

    These are unknown keys, settings without effect because the dataset is rendered before the engine reads
    it, and those that give no adapter for eval, chat and export: with finetuning_type freeze and full save a
    whole model, and the engine cannot load an adapter of oft (its hparams/parser.py, _verify_model_args).
    """
    problems = api.problems(config)
    if not config.get("do_train"):
        problems.append("nothing is trained without do_train=true")
    for key in ("model_name_or_path", "dataset_dir", "dataset"):
        if not config.get(key):
            problems.append(f"{key} is not set")
    for key, value, why in _REQUIRED:
        if (given := config.get(key) or value) != value:
            problems.append(f"{key}={given} {why}, set {key}={value}")
    for key, instead in _IGNORED.items():
        if config.get(key):
            problems.append(f"{key}={config[key]} has no effect, {instead}: leave it out")
    # in a run.yaml, which has a tokenized_path, these are not the user's: other data may not be sorted
    for key in ("disable_shuffling", "resume_from_checkpoint") if config.get("tokenized_path") else ():
        if config.get(key):
            problems.append(f"{key}={config[key]} was set for its run only: leave it out")
    if not config.get("quantization_bit"):
        quantizing = [key for key in config if key in ("quantization_type", "double_quantization")]
        problems += [f"{key} has no effect without quantization_bit, set it to 4" for key in quantizing]
    deepspeed = str(config.get("deepspeed") or "{}")
    if not deepspeed.lstrip().startswith("{"):  # a file, not the JSON itself
        if not os.path.isfile(deepspeed):
            return [*problems, f"there is no {deepspeed}: go to the project's folder"]
        try:
            if not files.load(Path(deepspeed), "give another, as in mcp-lora train --zero 0"):
                problems.append(f"{deepspeed} is empty")
        except McpLoraError as error:
            problems.append(str(error))
    return problems


def _run(plan: Plan, request: Request, say: Say) -> None:
    is_main, resume = plan.topology.is_main, request.resume
    # checked again, as another training may have used the folder meanwhile
    if is_main and (checkpoint := runs.prepare(plan.run, plan.config, resume, request.overwrite)):
        plan = replace(plan, config=plan.config | {"resume_from_checkpoint": str(checkpoint)})
    if resume:
        manifest.check_data(plan.run, plan.data)
    plan = _render(plan, say)
    if request.overwrite and is_main and (previous := runs.put_aside(plan.run)):
        say(f"the old run in {plan.run} was moved to {previous}")
    say(f"training; the configuration is in {plan.run / 'run.yaml'}")
    record = Manifest()
    recorded: AbstractContextManager[None] = nullcontext()
    if is_main:
        _write(plan, say)
        record = manifest.describe(plan.config, plan.argv, plan.environment, plan.topology.processes)
        record.rendered, record.memory = plan.rendered or {}, plan.memory
        record.learned = plan.learned
        recorded = manifest.recorded(plan.run, record)
    try:
        with recorded:
            if resume and runs.is_done(plan.run, plan.config):
                say("training has already finished, recording it")
            else:
                _run_engine(plan, say, request.retry, record)
            if is_main:
                runs.check_adapter(plan.run)
                if plan.chat_template:  # replaces the base model's, which the engine has saved
                    for folder in (plan.run, *runs.checkpoints(plan.run)):
                        (folder / runs.CHAT_TEMPLATE).write_text(plan.chat_template, encoding="utf-8")
    except Interrupted as interruption:
        interruption.option = runs.restart_option(plan.run).strip()
        raise
    say(f"the adapter is in {plan.run}; the next steps: mcp-lora eval, chat and export {plan.run}")


def _render(plan: Plan, say: Say) -> Plan:
    """Render the training data with the model's chat template, and fit what depends on its size."""
    template = prompts.load(plan.config)
    off = template.switches_thinking and not template.thinking
    say(f"prompts: {template.note}" + ", with thinking off" * off)
    source, folder = dataset.file_of(plan.data, "train"), plan.data / dataset.RENDERED
    step = steps.global_batch(plan.config, plan.topology.processes) if plans.is_sorted(plan) else None
    path, made = render.render(template, source, folder, plan.config, step)
    tokens = "median {median}, 95 % up to {p95}, max {max}, cutoff_len {cutoff_len}"
    say(f"tokens per sample: {tokens.format_map(made['lengths'])}")
    if made["shortened"]:
        say(f"{made['shortened']} rows lost {made['dropped_tools']} distractors to fit into cutoff_len")
    if made["lost_texts"]:
        say(f"warning: the chat template leaves out the text beside a call in {made['lost_texts']} turns")
    if left_out := made["left_out"]:
        reasons = ", ".join(f"{count} {reason}" for reason, count in left_out.items())
        say(f"warning: {sum(left_out.values())} rows are left out ({reasons}): {'; '.join(made['reasons'])}")
    config = plan.config | {"template": render.TEMPLATE, "tokenized_path": str(path)}
    if step:
        config["disable_shuffling"] = True
    if not made["validation"]:
        config["eval_strategy"] = "no"
    own = None if template.is_own else str(template.tokenizer.chat_template)
    made = made | {"chat_template": template.note}
    plan = replace(plan, config=config, rendered=made, chat_template=own)
    plan = plans.fit_memory(plan, made["lengths"]["max"], say)
    if step and plan.config[plans.BATCH[0]] > 1:
        say(plans.padding(render.lengths(path), plan))
    return plans.fit_steps(plan, made["samples"], say)


def _write(plan: Plan, say: Say) -> None:
    """Write run.yaml, and rename the checkpoints that the engine could not resume from."""
    runs.write_config(plan.run, plan.config)
    for checkpoint in runs.put_aside_incomplete(plan.run):
        say(f"{checkpoint} was not written completely and will not be resumed from")


def _run_engine(plan: Plan, say: Say, retry: bool, record: Manifest) -> None:
    log = plan.run / LOG if plan.topology.is_main else None
    while (outcome := launch.run_engine("train", plan.config, plan.environment, log=log)).code:
        if outcome.aborted_at_exit and runs.is_done(plan.run, plan.config):
            return
        # Other nodes would not restart.
        again = outcome.out_of_memory and retry and plan.topology.nodes == 1
        if not again or not (smaller := plans.smaller(plan)):
            raise _failure(plan, outcome)
        plan = smaller
        record.retries.append(
            {key: plan.config.get(key) for key in (*plans.BATCH, plans.EVALUATED, "resume_from_checkpoint")}
        )
        record.learned = plan.config[plans.BATCH[0]]
        _write(plan, say)
        with suppress(OSError):  # the engine reports a full disk
            manifest.write(plan.run, record)
        checkpoint = plan.config["resume_from_checkpoint"]
        start = Path(checkpoint).name if checkpoint else "the start"
        say(f"out of memory; restarting from {start}: {plan.batch}")


def _failure(plan: Plan, outcome: launch.Outcome) -> McpLoraError:
    if not outcome.out_of_memory:
        return outcome.error(f"mcp-lora train{runs.restart_option(plan.run)}")
    what = f"out of memory at {plan.batch}:\n{launch.real_error(outcome.stderr)}"
    helps = (
        "Lower cutoff_len (samples lose candidate tools to fit) or lora_rank, turn on gradient checkpointing "
        "(disable_gradient_checkpointing=false), shard the model across GPUs (--zero 3), or train on a "
        "4-bit base: mcp-lora train --config qlora"
    )
    return McpLoraError(f"{what}\n{helps}", outcome.code)
