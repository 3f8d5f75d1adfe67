"""What will be run, and what is fitted to the machine and the data: batch sizes, steps; what it will take."""

import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mcp_lora.data import dataset
from mcp_lora.engine import launch
from mcp_lora.engine.api import number
from mcp_lora.engine.topology import Topology
from mcp_lora.errors import McpLoraError, one_line
from mcp_lora.prompts import chat_template as prompts
from mcp_lora.prompts import render
from mcp_lora.train import manifest, memory, runs, steps

Say = Callable[[str], None]
BATCH = ("per_device_train_batch_size", "gradient_accumulation_steps")
EVALUATED = "per_device_eval_batch_size"
_ROWS = 200  # that a dry run renders
# Parameters × tokens per second of an A100: for samples of 4,096 tokens Qwen reports 3,244 tokens per second
# with 7.7 billion parameters, 1,928 with 14.2 and 393 with 72.3, and less for short samples and quantized
# bases (docs/training.md).
_A100, _A100_QUANTIZED = 25e12, 15e12
_SAME = (  # settings that the memory of a sample depends on
    "model_name_or_path",
    "cutoff_len",
    "lora_rank",
    "lora_target",
    "deepspeed",
    "quantization_bit",
    "bf16",
    "optim",
    "flash_attn",
    "enable_liger_kernel",
    "disable_gradient_checkpointing",
)


@dataclass(frozen=True)
class Plan:
    """What will be run: LLaMA-Factory's keys, the engine's environment variables, the topology.

    `given` are the keys that were set on the command line, `memory` the bytes of a GPU (0 without one),
    `learned` the per-device batch size that was left when memory ran out before, `steps` a message on the
    optimizer steps (empty until the data is known). Once the data is rendered, `rendered` is the content of
    rendered.json, and `chat_template` the template to serve the adapter with, if that is not the model's own.
    """

    config: dict[str, Any]
    environment: dict[str, str]
    topology: Topology
    given: frozenset[str] = frozenset()
    memory: float = 0
    learned: int | None = None
    steps: str = ""
    rendered: dict[str, Any] | None = None
    chat_template: str | None = None

    @property
    def run(self) -> Path:
        """The output folder."""
        return Path(self.config["output_dir"])

    @property
    def data(self) -> Path:
        """The dataset's folder."""
        return Path(self.config["dataset_dir"])

    @property
    def batch(self) -> str:
        """A message on the factors of the global batch size."""
        return steps.describe_batch(self.config, self.topology.processes)

    @property
    def argv(self) -> list[str]:
        """The engine's command."""
        return launch.engine_argv("train", self.run / "run.yaml")


def needed_memory(plan: Plan) -> list[str]:
    """Return messages on the parameters that are trained, and the memory of a GPU."""
    model = plan.config.get("model_name_or_path")
    try:
        found = memory.estimate(plan.config, plan.topology.processes)
    except Exception as error:  # building an unusual model may raise any exception
        return [f"memory: not known, {model} cannot be built without its weights: {one_line(error)}"]
    if not found:
        return [f"memory: not known, the config of {model} is not on this machine"]
    fraction = found.trained / (found.base + found.trained)
    experts = " (its experts are not adapted)" if found.experts else ""
    return [
        f"trained: {found.trained:,} parameters, {fraction:.1%} of the model{experts}; "
        f"adapter on disk: about {4 * found.trained / 1e6:,.0f} MB",
        f"memory per GPU, estimated in GB: {found}, for samples of cutoff_len",
    ]


def deepspeed_costs(config: Mapping[str, Any]) -> list[str]:
    """Return a message on what DeepSpeed's stage 0 costs in bf16.

    On any device it casts the parameters of the model, which LLaMA-Factory has cast to fp32 (0.9.5,
    model/adapter.py:324), to bf16 (deepspeed 0.19.8, runtime/engine.py:2080), keeps copies in fp32 for AdamW
    (runtime/fp16/unfused_optimizer.py:78), and lets it make a step without gradients first (line 412).
    """
    sharding = memory.zero(config)
    if not config.get("bf16") or sharding is None or sharding.get("stage"):
        return []
    costs = "shards nothing, computes with the adapter in bf16, and starts with a step without gradients"
    return [f"DeepSpeed: stage 0 {costs}; to train without it: deepspeed=null"]


def expected(plan: Plan, speed: float | None) -> list[str]:
    """Return messages on tokens, padding and time, by the first rows and a speed.

    Args:
        plan: its data is converted.
        speed: tokens per second of each process; by default, on a GPU, an A100's.
    """
    try:
        template = prompts.load(plan.config, local_files_only=True)
        found = render.first_lengths(template, dataset.file_of(plan.data, "train"), plan.config, _ROWS)
    except (McpLoraError, OSError) as error:
        return [f"tokens: not known ({error})"]
    if not len(found):
        return ["tokens: not known, the first rows cannot be rendered: mcp-lora inspect 1"]
    config, processes = plan.config, plan.topology.processes
    batch, most = steps.global_batch(config, processes), number(config, "max_steps", -1)
    rows, stats = training_rows(config) or 0, dataset.statistics(plan.data)
    per_row = len(found) / min(_ROWS, stats.samples["train"]) if stats else 1.0
    samples = most * batch if most >= 0 else number(config, "num_train_epochs", 3) * rows * per_row
    tokens = samples * float(found.mean())
    lines = [f"tokens: about {found.mean():,.0f} per sample, {tokens:,.0f} in all, by the first {_ROWS} rows"]
    if is_sorted(plan) and config[BATCH[0]] > 1:
        lines.append(padding(found[render.order(found, batch, 0)], plan))
    stated = "" if speed else ", an A100's; of another: --tokens-per-second"
    if speed := speed or speed_of(config):
        words = f"{speed:,.0f} tokens per second in each process{stated}"
        lines.append(f"time: about {tokens / (3600 * speed * processes):.2g} hours at {words}")
    return lines


def speed_of(config: Mapping[str, Any]) -> float | None:
    """Return an A100's tokens per second; None on a CPU, or if no report is near the configuration.

    Small models do not use a GPU as fully, and of a mixture of experts a token passes a few.
    """
    if config.get("use_cpu"):
        return None
    with suppress(Exception):  # building an unusual model may raise any exception
        found = memory.estimate(config, 1)
        if found and found.base > 1e9 and not found.experts:
            return (_A100_QUANTIZED if config.get("quantization_bit") else _A100) / found.base
    return None


def training_rows(config: Mapping[str, Any]) -> int | None:
    """Return the number of training rows without those of val_size; None if nothing is converted."""
    stats = dataset.statistics(Path(str(config.get("dataset_dir"))))
    if stats is None:
        return None
    rows = int(min(stats.samples["train"], number(config, "max_samples", math.inf)))
    held_out = number(config, "val_size", 0)
    # datasets' train_test_split rounds a fraction up
    return rows - (math.ceil(rows * held_out) if held_out < 1 else int(held_out))


def padding(lengths: Any, plan: Plan) -> str:
    """Return a message on the padding of samples of these lengths, in their order."""
    import numpy

    size, shuffled = plan.config[BATCH[0]], numpy.random.default_rng(0).permutation(lengths)
    words = f"padding: {render.padding(lengths, size):.1%} of the tokens, as the samples of a step are sorted"
    return f"{words} by length (shuffled: {render.padding(shuffled, size):.1%})"


def is_sorted(plan: Plan) -> bool:
    """Tell whether the samples of each step are sorted by length.

    They are if a batch has several, unless the recipe sets an order; a resumed run keeps its own.
    """
    if plan.config.get("disable_shuffling") or plan.config.get("train_sampling_strategy"):
        return False
    if plan.config.get("resume_from_checkpoint"):
        return bool(runs.read_run(plan.run).get("disable_shuffling"))
    return bool(plan.config[BATCH[0]] > 1)


def fit_memory(plan: Plan, longest: int, say: Say) -> Plan:
    """Lower the per-device batch size to what is estimated to fit; the global batch size stays.

    If memory ran out in the last run in this folder, the size that was found there is the most. A batch size
    that was set on the command line stays.

    Args:
        plan: whose `memory` is known, or nothing is changed.
        longest: tokens of the longest sample.

    Raises McpLoraError, with what would fit, if not even one sample does.
    """
    key, processes = BATCH[0], plan.topology.processes
    if not plan.memory or key in plan.given:
        return plan
    learned = _learned(plan)
    plan = replace(plan, learned=learned)
    config, room = plan.config, f"{plan.memory / 1e9:.0f} GB of a GPU"
    if learned:
        config = config | {key: min(learned, config[key])}
    size = memory.fit(config, processes, plan.memory, longest)
    if size is None:
        needed = memory.estimate({**config, key: 1, "cutoff_len": longest}, processes)
        what = f"one sample of {longest} tokens takes more than the {room} (estimated in GB: {needed})"
        ways = ", ".join(memory.alternatives(config, processes, plan.memory, longest)) or "a smaller model"
        raise McpLoraError(f"{what}. What would fit: {ways}; to try it anyway: mcp-lora train {key}=1")
    if size == plan.config[key]:
        return plan
    smaller = replace(plan, config=plan.config | steps.lower(plan.config, processes, size))
    why = f"{config[key]} samples of {longest} tokens are estimated not to fit into the {room}"
    if size == learned:
        why = "with more the last run ran out of memory"
    say(f"{smaller.batch}, as {why} (to keep {plan.config[key]}: {key}={plan.config[key]})")
    return smaller


def _learned(plan: Plan) -> int | None:
    """Return the per-device batch size that was left when memory ran out in the folder, if it did."""
    if plan.topology.nodes > 1:  # all nodes have to find the same
        return None
    with suppress(McpLoraError):  # of a damaged manifest
        record = manifest.read(plan.run)
        same = record and all(record.config.get(key) == plan.config.get(key) for key in _SAME)
        if record and same and record.processes == plan.topology.processes and record.memory == plan.memory:
            return record.learned
    return None


def fit_steps(plan: Plan, samples: int | None, say: Say) -> Plan:
    """Fit what depends on the number of optimizer steps (see `steps.fit`), and log that number."""
    processes = plan.topology.processes
    count = steps.count(plan.config, samples, processes)
    if count is None:
        return plan
    config = steps.fit(plan.config, count, plan.given)
    batch = steps.global_batch(config, processes)
    words = f"{count} ({samples} samples, global batch size {batch})" if samples is not None else str(count)
    say(f"optimizer steps: {words}; warm-up steps: {config['warmup_steps']}")
    if count < steps.FEW:
        say(f"warning: few optimizer steps; {steps.what_helps(config, processes)}")
    return replace(plan, config=config, steps=words)


def smaller(plan: Plan) -> Plan | None:
    """Return the plan with half the per-device batch size, from the newest checkpoint; None if none is left.

    Validation takes one sample at a time then, as memory may have run out there.
    """
    size = int(number(plan.config, BATCH[0], 8))
    is_validated = plan.config.get("eval_strategy", "no") != "no"
    validated = int(number(plan.config, EVALUATED, 8)) if is_validated else 1
    if size == validated == 1:
        return None
    keys = steps.lower(plan.config, plan.topology.processes, max(1, size // 2)) | {EVALUATED: 1}
    saved = runs.complete_checkpoints(plan.run)
    resumed = {"resume_from_checkpoint": str(saved[-1]) if saved else None}
    return replace(plan, config=plan.config | keys | resumed)
