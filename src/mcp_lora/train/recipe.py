"""From a preset, the environment, overrides and flags to the configuration that is run.

The keys are LLaMA-Factory's own (see mcp_lora.engine.api). A preset is a YAML file in train_configs/:

    model_name_or_path: Qwen/Qwen2.5-7B-Instruct
    lora_rank: 64
    learning_rate: 2.0e-4
"""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from mcp_lora.engine import api
from mcp_lora.errors import McpLoraError, explained
from mcp_lora.train.machine import Machine, detect_machine, fitted

RECIPE = Path("train_configs/lora_config.yaml")
ZERO = Path("train_configs/ds_z0_config.json")  # its neighbours are the other stages
# In a checkout, and in what a wheel has installed (see pyproject.toml).
_SHIPPED = [Path(__file__).parents[3] / RECIPE.parent, Path(__file__).parents[1] / RECIPE.parent]
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.*", "*.tiktoken")
_PATHS = ("model_name_or_path", "dataset_dir", "output_dir", "deepspeed")


def find(name: Path) -> Path:
    """Return a recipe or a DeepSpeed file: a path, or one that is shipped, by its name (qlora, qlora.yaml).

    In a folder without train_configs/ the shipped ones stand in for those in it. A path that is nowhere comes
    back as it is.
    """
    names = [f"{name.name}.yaml"] * (not name.suffix) + [name.name]
    if not name.is_file() and name.parent in (Path("."), RECIPE.parent):
        for shipped in (folder / one for folder in _SHIPPED for one in names):
            if shipped.is_file():
                return shipped
    return name


def resolve_here(file: Path, model: str | None) -> dict[str, Any]:
    """Return a recipe with a model as it is resolved on this machine, nothing else set (see `resolve`)."""
    api.require()
    return resolve(file, os.environ, [], {"model_name_or_path": model}, detect_machine())


def read_config(file: Path) -> dict[str, Any]:
    """Read a YAML file of LLaMA-Factory keys; a McpLoraError where it cannot be read or is no mapping."""
    with explained(f"{file} cannot be read", "go to the project's folder, or mcp-lora train --config FILE"):
        content = _yaml(file.read_bytes(), f"{file} is not YAML", "fix it and run again")
    if not isinstance(content, dict):
        raise McpLoraError(f"{file} holds no `key: value` lines: fix it and run again")
    return {str(key): _from_yaml(str(key), value) for key, value in content.items()}


def parse_overrides(words: Sequence[str]) -> dict[str, Any]:
    """Read `key=value` words; a value is YAML, so `true`, `0.1`, `1e-4` and `[a, b]` are typed.

    Raises McpLoraError with all words of another form.
    """
    wrong = [word for word in words if not re.match(r"\w+=", word)]
    if wrong:
        raise McpLoraError(f"not of the form key=value: {' '.join(wrong)}: mcp-lora train lora_rank=32")
    pairs = (word.split("=", 1) for word in words)
    quoted = "quote it, as in mcp-lora train 'key=\"value\"'"
    return {key: _from_yaml(key, _yaml(value, "a value is not YAML", quoted)) for key, value in pairs}


def resolve(
    file: Path,
    environment: Mapping[str, str],
    overrides: Sequence[str],
    flags: Mapping[str, Any],
    machine: Machine,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Put the four sources of a configuration together and fit the result to the machine.

    Later wins: `file`, MODEL_PATH in `environment`, `overrides` (key=value), `flags` (None is not set). Paths
    come out absolute. Returns the configuration in LLaMA-Factory's keys; what was fitted is said.

    Raises McpLoraError where the file or an override cannot be read.
    """
    config = read_config(find(file))
    model = environment.get("MODEL_PATH")
    given = parse_overrides(overrides) | {key: value for key, value in flags.items() if value is not None}
    if model and "model_name_or_path" not in given:
        config["model_name_or_path"] = model
        say(f"the model is {model}, by MODEL_PATH in the environment")
    config |= given
    for changes, note in fitted(config, machine, given.keys()):
        config |= changes
        say(note)
    if config.get("deepspeed") is None:
        config.pop("deepspeed", None)
    if (zero := config.get("deepspeed")) and isinstance(zero, str) and not zero.lstrip().startswith("{"):
        config["deepspeed"] = str(find(Path(zero)))
    for key in _PATHS:
        # A hub id looks like a path but is none; what does not exist stays as it was given.
        value = config.get(key)
        place = os.path.expanduser(value) if isinstance(value, str) else ""
        if place and (key.endswith("_dir") or os.path.exists(place)):
            config[key] = os.path.abspath(place)
    return config


def missing_model(model: str, shape_only: bool = False) -> str | None:
    """Say what is wrong with a model that is a path by its looks, but no folder with a model.

    With `shape_only` its config.json will do.
    """
    folder = Path(os.path.expanduser(model))
    looks_like_path = model.startswith((".", "~")) or "\\" in model or model.count("/") > 1
    if not (looks_like_path or folder.is_absolute() or os.path.exists(folder)):
        return None
    if not (folder / "config.json").is_file():
        return f"there is no model in {model} (no config.json)"
    # transformers makes an empty tokenizer of a config.json alone, and says nothing.
    if not shape_only and not any(any(folder.glob(name)) for name in _TOKENIZERS):
        return f"there is no tokenizer in {model} ({', '.join(_TOKENIZERS)})"
    return None


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice, of which YAML would silently take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise yaml.constructor.ConstructorError(None, None, f"{', '.join(twice)} stands twice")
        return super().construct_mapping(node, deep)  # which adds what `<<` merges


def _yaml(text: str | bytes, problem: str, command: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date such as 2025-13-01
        raise McpLoraError(f"{problem} ({' '.join(str(error).split())}): {command}") from None


def _from_yaml(key: str, value: Any) -> Any:
    """Undo what YAML 1.1 makes of two things that everybody writes.

    It reads 1e-4 as text (it wants 1.0e-4), and `no`, the name of a strategy, as false.
    """
    if isinstance(value, str) and re.fullmatch(r"[-+]?\d+\.?\d*[eE][-+]?\d+", value):
        return float(value)
    return "no" if value is False and key.endswith("_strategy") else value
