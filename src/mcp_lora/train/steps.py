"""The batch, how many optimizer steps a run makes, and what of a configuration depends on it.

With 128 samples a step, 5 rows make 1 step and 10,000 rows 79. transformers rounds a share of warm-up up
(TrainingArguments.get_warmup_steps), and step i of a warm-up of w has i / w of the learning rate, from i = 0.
So a run of one step with `warmup_steps: 0.1` would be all warm-up, at a rate of 0, and learn nothing.
"""

import math
from collections.abc import Collection, Mapping
from typing import Any

from mcp_lora.engine.api import number
from mcp_lora.errors import McpLoraError

FEW = 50  # steps, below which more rows or a smaller batch help
_POINTS = 20  # of a loss curve
_EVALUATIONS = 5  # of a run too short for the recipe's eval_steps


def count(config: Mapping[str, Any], samples: int | None, processes: int) -> int | None:
    """Return the optimizer steps of a run; None where neither max_steps nor `samples` is known.

    They are max_steps where that is not negative, else, without validation samples,

        batches = ceil(ceil(samples / per_device_train_batch_size) / processes)
        steps   = ceil(num_train_epochs × max(1, ceil(batches / gradient_accumulation_steps)))

    and with dataloader_drop_last both divisions of the first line round down. Sources: accelerate 1.11,
    BatchSamplerShard.__len__; transformers 5.5, Trainer.set_initial_training_values.

    Raises McpLoraError where a value is no number.
    """
    most = number(config, "max_steps", -1)
    if most >= 0:
        return int(most)
    if samples is None:
        return None
    size = number(config, "per_device_train_batch_size", 8)
    rounded = math.floor if config.get("dataloader_drop_last") else math.ceil
    batches = rounded(rounded(samples / size) / processes)
    updates = max(1, math.ceil(batches / number(config, "gradient_accumulation_steps", 1)))
    return math.ceil(number(config, "num_train_epochs", 3) * updates)


def global_batch(config: Mapping[str, Any], processes: int) -> int:
    """Return the samples of an optimizer step, on all processes together."""
    size = number(config, "per_device_train_batch_size", 8)
    return int(size * number(config, "gradient_accumulation_steps", 1) * processes)


def share_batch(config: Mapping[str, Any], processes: int, wanted: int | None = None) -> dict[str, int]:
    """Return the two keys of a configuration that divide its global batch size among processes.

    A recipe's per_device_train_batch_size × gradient_accumulation_steps (8 × 1 where left out, as in
    transformers) is its global batch size, or `wanted` is. It stays the same on any number of processes, as
    the learning rate belongs to it:

        per device × accumulation × processes = batch

    Where the processes do not divide the batch it is the nearest that they can have, with at least half the
    batch per device.

    Raises McpLoraError where one of the two keys is no whole number from 1.
    """
    most = _size(config, "per_device_train_batch_size", 8)
    batch = wanted or most * _size(config, "gradient_accumulation_steps", 1)
    most = min(most, max(1, batch // processes))
    sizes = [(size, max(1, round(batch / (size * processes)))) for size in range(most, (most - 1) // 2, -1)]
    per_device, steps = min(sizes, key=lambda pair: abs(pair[0] * pair[1] * processes - batch))
    return {"per_device_train_batch_size": per_device, "gradient_accumulation_steps": steps}


def describe_batch(config: Mapping[str, Any], processes: int) -> str:
    """Return, in words, what the global batch size is made of."""
    size = number(config, "per_device_train_batch_size", 8)
    steps, batch = number(config, "gradient_accumulation_steps", 1), global_batch(config, processes)
    return f"batch {batch} = {size} per device × {steps} accumulated × {processes} processes"


def _size(config: Mapping[str, Any], key: str, default: int) -> int:
    value = number(config, key, default)
    if value < 1 or value != int(value):
        raise McpLoraError(f"{key}={value} is no whole number from 1: mcp-lora train {key}={default}")
    return int(value)


def fit(config: Mapping[str, Any], steps: int, given: Collection[str]) -> dict[str, Any]:
    """Return a configuration that suits a run of so many optimizer steps.

    - Warm-up becomes a number of steps, floor(share × steps), never all of them.
    - logging_steps is lowered for a loss curve of 20 points, or as many as there are steps.
    - eval_steps is lowered where a curve of eval_loss would have one point, the one at the end.

    Intervals among `given`, the keys that were set on the command line, stay.

    Raises McpLoraError where there is no step, or warm-up would be all of the run.
    """
    if steps < 1:
        raise McpLoraError("this makes no optimizer step: mcp-lora train max_steps=-1 num_train_epochs=1")
    key = "warmup_steps" if config.get("warmup_ratio") is None else "warmup_ratio"  # the ratio wins
    share = number(config, key, 0)
    # 0.29 × 100 is 28.999999999999996
    warmup = min(steps - 1, math.floor(share * steps + 1e-9)) if share < 1 else int(share)
    if not 0 <= warmup < steps:
        problem = f"{key}={share:g}, but the run has {steps} optimizer steps and warm-up must be fewer"
        raise McpLoraError(f"{problem}: give a share below 1, as in mcp-lora train warmup_steps=0.1")
    fitted = {**config, "warmup_steps": warmup}
    fitted.pop("warmup_ratio", None)
    if "logging_steps" not in given:
        every = number(config, "logging_steps", 500)
        if every * (steps if every < 1 else 1) > max(1, steps // _POINTS):
            fitted["logging_steps"] = max(1, steps // _POINTS)
    # With load_best_model_at_end transformers requires save_steps to be a multiple of eval_steps.
    free = "eval_steps" not in given and not config.get("load_best_model_at_end")
    if config.get("eval_strategy") == "steps" and free:
        every = number(config, "eval_steps", number(config, "logging_steps", 500))
        if every >= 1 and 2 * every > steps:
            fitted["eval_steps"] = max(1, steps // _EVALUATIONS)
    return fitted


def what_helps(config: Mapping[str, Any], processes: int) -> str:
    """Return, in words, how a run gets more steps."""
    if number(config, "max_steps", -1) >= 0:
        return "what helps: a larger max_steps, more rows"
    smaller = "--global-batch 8, " if global_batch(config, processes) > 8 >= processes else ""
    epochs = math.ceil(number(config, "num_train_epochs", 3)) + 2
    return f"what helps: {smaller}more rows, num_train_epochs={epochs}"
