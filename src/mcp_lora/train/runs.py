"""A run's folder: what is in it, whether a new run may write there, how it was configured.

outputs/mcp_lora/
├── run.yaml              the resolved configuration
├── manifest.json         the record of the run (see mcp_lora.train.manifest)
├── checkpoint-100/ …     adapter and optimizer state, every save_steps
├── adapter_model.safetensors, adapter_config.json     the final adapter
├── trainer_state.json, training_args.bin, training_loss.png
├── train.log             the engine's output
└── eval/                 the answers and metrics of mcp-lora eval
"""

import json
import shutil
import zipfile
from collections.abc import Mapping
from contextlib import AbstractContextManager
from itertools import chain, count
from pathlib import Path
from typing import Any

from mcp_lora.data import files
from mcp_lora.engine import api
from mcp_lora.errors import McpLoraError, explained
from mcp_lora.prompts.chat_template import hub_arguments
from mcp_lora.train import manifest
from mcp_lora.train.recipe import read_config

DEFAULT = Path("outputs/mcp_lora")
CHAT_TEMPLATE = "chat_template.jinja"  # where transformers looks for a tokenizer's
_ELSEWHERE = "mcp-lora train --output OTHER_FOLDER"
# To resume a run these must be the same as in the checkpoint.
_KEPT = ["model_name_or_path", "enable_thinking", "learning_rate", "cutoff_len"]
_KEPT += ["lora_rank", "lora_alpha", "lora_target"]


def checkpoints(run: Path) -> list[Path]:
    """Return a run's checkpoints, oldest first."""
    return sorted((path for path in run.glob("checkpoint-*") if path.name[11:].isdigit()), key=_step)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def complete_checkpoints(run: Path) -> list[Path]:
    """Return a run's complete checkpoints, oldest first."""
    return list(filter(is_complete, checkpoints(run)))


def is_complete(checkpoint: Path) -> bool:
    """Tell whether a checkpoint can be resumed from: a run may be killed while it writes one.

    The trainer's state is written last (transformers, Trainer._save_checkpoint), but after a power failure
    a file may exist without its content. What torch saves is a zip file, with its directory at the end.
    """
    from safetensors import SafetensorError, safe_open

    try:
        state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        for file in (tensors := list(checkpoint.glob("*.safetensors"))):
            with safe_open(file, framework="np"):  # checks the file's length against its header
                pass
    except (OSError, ValueError, SafetensorError):
        return False
    if not isinstance(state, dict) or checkpoint.name != f"checkpoint-{state.get('global_step')}":
        return False
    there = {file.name for file in checkpoint.iterdir()}
    optimizer = {"optimizer.pt", "latest"} & there  # `latest` is DeepSpeed's
    saved = [file for file in checkpoint.rglob("*") if file.suffix in (".pt", ".pth", ".bin")]
    found = "adapter_config.json" in there and optimizer and tensors
    return bool(found) and all(map(zipfile.is_zipfile, saved))


def put_aside_incomplete(run: Path) -> list[Path]:
    """Rename incomplete checkpoints, so that the engine does not resume from one; return them.

    transformers would count anything named `checkpoint-…` towards save_total_limit, and remove a complete
    checkpoint instead.

    Raises McpLoraError if one cannot be renamed.
    """
    aside = []
    for checkpoint in checkpoints(run):
        if not is_complete(checkpoint):
            target = checkpoint.with_name(f"incomplete-{checkpoint.name}")
            with explained(f"{checkpoint} is incomplete and cannot be renamed", "remove it and run again"):
                if target.exists():
                    shutil.rmtree(target)
                aside.append(checkpoint.rename(target))
    return aside


def is_finished(run: Path) -> bool:
    """Tell whether training in this folder has finished."""
    return (run / "trainer_state.json").is_file()


def contains_run(run: Path) -> bool:
    """Tell whether a folder contains anything that training has saved."""
    return bool(checkpoints(run)) or is_finished(run) or (run / "adapter_config.json").is_file()


def restart_option(run: Path) -> str:
    """Return the option that restarts a failed run, with a leading space, or "" if none is needed."""
    if complete_checkpoints(run):
        return " --resume"
    return " --overwrite" if contains_run(run) else ""


def prepare(run: Path, config: Mapping[str, Any], resume: bool, overwrite: bool) -> Path | None:
    """Make sure that a new run does not silently continue, skip or damage an old one.

    Returns the checkpoint to resume from (the newest complete one), or None to start from scratch.

    Raises McpLoraError if the folder contains a run and neither or both of `resume` and `overwrite` are set,
    it contains something else, there is nothing to resume, or the checkpoint does not match `config`.
    """
    if resume and overwrite:
        raise McpLoraError("--resume continues a run, --overwrite moves it away: use only one of them")
    if run.is_dir() and any(run.iterdir()) and not (run / "run.yaml").is_file():
        raise McpLoraError(f"{run} is not empty and was not created by mcp-lora: {_ELSEWHERE}")
    if resume:
        saved = complete_checkpoints(run)
        if not saved:
            again = f"mcp-lora train{restart_option(run)}"
            without = read_run(run).get("save_only_model") if checkpoints(run) else False
            why = " (save_only_model leaves out what resuming requires)" if without else ""
            raise McpLoraError(f"{run} contains no complete checkpoint to resume from{why}: {again}")
        _check_resumable(run, config)
        return saved[-1]
    if contains_run(run) and not overwrite:
        newest = [checkpoint.name for checkpoint in checkpoints(run)[-1:]] or ["adapter"]
        what = "a finished run" if is_finished(run) else f"a run's {newest[0]}"
        raise McpLoraError(f"{run} contains {what}: mcp-lora train --resume, --overwrite or --output FOLDER")
    return None


def _check_resumable(run: Path, config: Mapping[str, Any]) -> None:
    """Raise a McpLoraError for another model, another adapter configuration, or a finished run."""
    old = read_run(run)
    changed = [key for key in _KEPT if old.get(key) != config.get(key)]
    # The optimizer's state is in DeepSpeed's format, or in torch's; transformers would start without it.
    changed += ["deepspeed"] * (bool(old.get("deepspeed")) != bool(config.get("deepspeed")))
    if changed:
        what = ", ".join(f"{key} {old.get(key)} → {config.get(key)}" for key in changed)
        again = "use that run's settings, or mcp-lora train --overwrite"
        raise McpLoraError(f"{run} contains another run's checkpoint ({what}): {again}")
    # It may have finished without a record, if mcp-lora was killed and the engine was not; a newer checkpoint
    # is of a continuation.
    record = manifest.read(run)
    unrecorded = record is not None and record.ended is None
    if is_done(run, config) and not (
        unrecorded and _step(checkpoints(run)[-1]) <= _state(run)["global_step"]
    ):
        state = _state(run)
        more = f"max_steps={2 * config.get('max_steps', 0)}"
        if config.get("max_steps", -1) <= 0:
            more = f"num_train_epochs={state['epoch'] + 1:g}"
        what = f"a finished run ({state['global_step']} steps, {state['epoch']:g} epochs), nothing to resume"
        raise McpLoraError(f"{run} contains {what}: mcp-lora train --resume {more}, or --overwrite")


def is_done(run: Path, config: Mapping[str, Any]) -> bool:
    """Tell whether training in this folder has reached the end that a configuration sets."""
    if not is_finished(run):
        return False
    state, steps = _state(run), config.get("max_steps", -1)  # takes precedence over the epochs if positive
    if steps > 0:
        return bool(state["global_step"] >= steps)
    return bool(state["epoch"] >= float(config.get("num_train_epochs", 3)) - 1e-6)


def _state(run: Path) -> dict[str, Any]:
    return files.load(run / "trainer_state.json", f"mcp-lora train --overwrite --output {run}")


def put_aside(run: Path) -> Path | None:
    """Move an old run to NAME.previous, NAME.previous-2 and so on, and return that; nothing is deleted.

    A folder where nothing was saved is not moved (None). Raises McpLoraError if the folder cannot be moved.
    """
    if not contains_run(run):
        return None
    names = chain([f"{run.name}.previous"], (f"{run.name}.previous-{number}" for number in count(2)))
    previous = next(place for place in map(run.with_name, names) if not place.exists())
    with explained(f"{run} cannot be moved", _ELSEWHERE):
        return run.rename(previous)


def locked(run: Path) -> AbstractContextManager[Any]:
    """Lock a run's folder; raise a McpLoraError if another training has locked it."""
    with explained(f"{run} cannot be written", _ELSEWHERE):
        run.parent.mkdir(parents=True, exist_ok=True)
        problem = f"{run} is in use by another mcp-lora train: {_ELSEWHERE}"
        return files.exclusive(run.parent / f".{run.name}.lock", problem)


def write_config(run: Path, config: Mapping[str, Any]) -> None:
    """Write run.yaml; raise a McpLoraError if the folder cannot be written."""
    with explained(f"{run} cannot be written", _ELSEWHERE):
        run.mkdir(parents=True, exist_ok=True)
        (run / "run.yaml").write_text(api.dump(config), encoding="utf-8")


def read_run(run: Path) -> dict[str, Any]:
    """Return the configuration of a run; raise a McpLoraError if the folder contains no run."""
    if not (run / "run.yaml").is_file():
        raise McpLoraError(f"{run} contains no run (no run.yaml): mcp-lora train --output {run}")
    return read_config(run / "run.yaml")


def adapter(run: Path, checkpoint: str | None = None) -> Path:
    """Return the folder of a run's adapter: of `checkpoint` (checkpoint-300 or 300), else the newest one.

    A finished run has it in its own folder, the best one with load_best_model_at_end. Raises McpLoraError
    if there is none.
    """
    if checkpoint:
        choices = [run / (f"checkpoint-{checkpoint}" if checkpoint.isdigit() else checkpoint)]
    else:
        whole = complete_checkpoints(run)[::-1]
        resumed = whole and _state(run).get("global_step", 0) < int(whole[0].name[11:])
        choices = [*whole, run] if resumed else [run, *whole]
    for folder in choices:
        if (folder / "adapter_config.json").is_file():
            return folder
    there = ", ".join(path.name for path in checkpoints(run)) or "none"
    what = f"{choices[0]} contains no adapter (checkpoints: {there})"
    raise McpLoraError(f"{what}: mcp-lora train --output {run}")


def check_adapter(run: Path) -> None:
    """Check the adapter of a finished training.

    LoRA initializes lora_B to 0, so that the adapter changes nothing; after training none of them is 0.

    Raises McpLoraError, with exit code 1, if there is none, all its lora_B are 0, or it has NaN or Inf.
    """
    import torch
    from safetensors.torch import load_file

    file = run / "adapter_model.safetensors"
    if not file.is_file():
        raise McpLoraError(f"training ended without an adapter (no {file}): mcp-lora train --dry-run", 1)
    tensors = load_file(file)
    if broken := [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]:
        again = "lower the learning rate, as in mcp-lora train --overwrite learning_rate=1e-5"
        raise McpLoraError(f"{file} has NaN or Inf (in {broken[0]}), training has diverged: {again}", 1)
    if not any(tensor.any() for name, tensor in tensors.items() if name.endswith(("_B.weight", "_B"))):
        what = f"the run has learned nothing, all lora_B matrices in {file} are 0"
        again = "mcp-lora train --overwrite --global-batch 8 num_train_epochs=3"
        raise McpLoraError(f"{what}: raise learning_rate or train longer: {again}", 1)


def serving_config(run: Path, adapter_folder: Path | None) -> dict[str, Any]:
    """Return the settings of a run for chat, export and prediction: the model's, and the adapter.

    They do not include the run's `template`, which is for prerendered data.
    """
    config = read_run(run)
    found = api.model_settings(config) | {"enable_thinking": bool(config.get("enable_thinking"))}
    if adapter_folder:
        found |= {"adapter_name_or_path": str(adapter_folder.absolute()), "finetuning_type": "lora"}
    return found


def is_quantized(run: Path) -> bool:
    """Tell whether a run's base was quantized, by the run itself or in its own files."""
    config = read_run(run)
    file = manifest.cached(config, "config.json")
    model = files.load(file, "copy the model again") if file else {}
    return bool(config.get("quantization_bit") or model.get("quantization_config"))


def adapter_hash(adapter: Path) -> str:
    """Return the hash of an adapter's weights."""
    return files.sha256(next(iter(adapter.glob("adapter_model.*")), adapter / "adapter_config.json"))


def loaded(config: Mapping[str, Any], adapter: Path, vocabulary: int | None = None, **how: Any) -> Any:
    """Return the model that a configuration names, with an adapter, in evaluation mode.

    Args:
        config: in LLaMA-Factory's keys.
        adapter: its folder.
        vocabulary: number of embeddings, if the run has changed it (resize_vocab).
        how: arguments of transformers' from_pretrained, such as dtype.
    """
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        str(config["model_name_or_path"]), **how, **hub_arguments(config)
    )
    if vocabulary and vocabulary != model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(vocabulary, mean_resizing=False)
    return PeftModel.from_pretrained(model, adapter).eval()
