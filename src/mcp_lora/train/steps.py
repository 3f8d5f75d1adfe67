"""The batch sizes, the number of optimizer steps of a run, and the settings that depend on it.

With 128 samples per step, 5 rows make 1 step and 10,000 rows 79. transformers rounds fractional warm-up up
(TrainingArguments.get_warmup_steps), and step i of a warm-up of w has i / w of the learning rate, from i = 0.
So a run of one step with `warmup_steps: 0.1` would be all warm-up, at a rate of 0, and learn nothing.
"""

import math
from collections.abc import Collection, Mapping
from typing import Any

from mcp_lora.engine.api import number
from mcp_lora.errors import McpLoraError

FEW = 50  # steps; for fewer a warning is logged
_POINTS = 20  # of the loss curve
_EVALUATIONS = 5  # of a run that is too short for the recipe's eval_steps


def count(config: Mapping[str, Any], samples: int | None, processes: int) -> int | None:
    """Return the optimizer steps of a run; None if neither max_steps nor `samples` is known.

    This is max_steps if that is not negative, else, without the validation samples,

        batches = ceil(ceil(samples / per_device_train_batch_size) / processes)
        steps   = ceil(num_train_epochs × max(1, ceil(batches / gradient_accumulation_steps)))

    where with dataloader_drop_last both divisions of the first line round down. Sources: accelerate 1.11,
    BatchSamplerShard.__len__; transformers 5.5, Trainer.set_initial_training_values.

    Raises McpLoraError if a value is not a number.
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
    """Return the global batch size: the samples of an optimizer step on all processes."""
    size = number(config, "per_device_train_batch_size", 8)
    return int(size * number(config, "gradient_accumulation_steps", 1) * processes)


def split_batch(config: Mapping[str, Any], processes: int, wanted: int | None = None) -> dict[str, int]:
    """Return the two keys of a configuration that split its global batch size across processes.

    The global batch size is `wanted`, or a recipe's per_device_train_batch_size × gradient_accumulation_steps
    (8 × 1 by default, as in transformers). It does not depend on the number of processes, as the learning
    rate is tuned for it:

        per-device batch size × accumulation steps × processes = global batch size

    If the processes do not divide it, the result is the nearest possible global batch size, with at least
    half the per-device batch size.

    Raises McpLoraError if one of the two keys is not a positive integer.
    """
    most = _size(config, "per_device_train_batch_size", 8)
    batch = wanted or most * _size(config, "gradient_accumulation_steps", 1)
    most = min(most, max(1, batch // processes))
    sizes = [(size, max(1, round(batch / (size * processes)))) for size in range(most, (most - 1) // 2, -1)]
    per_device, steps = min(sizes, key=lambda pair: abs(pair[0] * pair[1] * processes - batch))
    return {"per_device_train_batch_size": per_device, "gradient_accumulation_steps": steps}


def lower(config: Mapping[str, Any], processes: int, size: int) -> dict[str, int]:
    """Return the two keys for a per-device batch size of at most `size`, and the same global batch size."""
    batch = global_batch(config, processes)
    even = next((one for one in range(size, 0, -1) if batch % (one * processes) == 0), size)
    return split_batch({"per_device_train_batch_size": even}, processes, batch)


def describe_batch(config: Mapping[str, Any], processes: int) -> str:
    """Return a message on the factors of the global batch size."""
    size = number(config, "per_device_train_batch_size", 8)
    steps, batch = number(config, "gradient_accumulation_steps", 1), global_batch(config, processes)
    return f"global batch size {batch} = {size} per device × {steps} accumulated × {processes} processes"


def _size(config: Mapping[str, Any], key: str, default: int) -> int:
    value = number(config, key, default)
    if value < 1 or value != int(value):
        raise McpLoraError(f"{key}={value} is not a positive integer: mcp-lora train {key}={default}")
    return int(value)


def fit(config: Mapping[str, Any], steps: int, given: Collection[str]) -> dict[str, Any]:
    """Return a configuration adapted to the number of optimizer steps of a run.

    - Warm-up becomes a number of steps, floor(fraction × steps), and less than all of them.
    - logging_steps is lowered for a loss curve of 20 points, or as many as there are steps.
    - eval_steps is lowered if the curve of eval_loss would have only one point, at the end.

    Intervals in `given`, the keys that were set on the command line, are kept.

    Raises McpLoraError if there is no step, or warm-up would be the whole run.
    """
    if steps < 1:
        raise McpLoraError("the run has no optimizer steps: mcp-lora train max_steps=-1 num_train_epochs=1")
    # warmup_ratio takes precedence
    key = "warmup_steps" if config.get("warmup_ratio") is None else "warmup_ratio"
    value = number(config, key, 0)
    # 0.29 × 100 is 28.999999999999996
    warmup = min(steps - 1, math.floor(value * steps + 1e-9)) if value < 1 else int(value)
    if not 0 <= warmup < steps:
        problem = f"{key}={value:g}, but the run has {steps} optimizer steps and warm-up must be fewer"
        raise McpLoraError(f"{problem}: use a fraction below 1, as in mcp-lora train warmup_steps=0.1")
    fitted = {**config, "warmup_steps": warmup}
    fitted.pop("warmup_ratio", None)
    every, most = number(config, "logging_steps", 500), max(1, steps // _POINTS)
    if "logging_steps" not in given and every * (steps if every < 1 else 1) > most:
        fitted["logging_steps"] = most
    # With load_best_model_at_end transformers requires save_steps to be a multiple of eval_steps.
    free = "eval_steps" not in given and not config.get("load_best_model_at_end")
    every = number(config, "eval_steps", every)
    if config.get("eval_strategy") == "steps" and free and every >= 1 and 2 * every > steps:
        fitted["eval_steps"] = max(1, steps // _EVALUATIONS)
    return fitted


def what_helps(config: Mapping[str, Any], processes: int) -> str:
    """Return a message on how a run gets more steps."""
    if number(config, "max_steps", -1) >= 0:
        return "what helps: a larger max_steps, more rows"
    smaller = "--global-batch 8, " if global_batch(config, processes) > 8 >= processes else ""
    epochs = math.ceil(number(config, "num_train_epochs", 3)) + 2
    return f"what helps: {smaller}more rows, num_train_epochs={epochs}"
