"""From a recipe, the environment, overrides and flags to the configuration of a run.

The keys are LLaMA-Factory's own (see mcp_lora.engine.api). A recipe is a YAML file in train_configs/:

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
from mcp_lora.errors import McpLoraError, explained, one_line
from mcp_lora.train.machine import Machine, detect_machine, fitted

RECIPE = Path("train_configs/lora_config.yaml")
ZERO = Path("train_configs/ds_z0_config.json")  # the other stages are beside it
# In a checkout, and in an installed wheel (see pyproject.toml).
_SHIPPED = [Path(__file__).parents[3] / RECIPE.parent, Path(__file__).parents[1] / RECIPE.parent]
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.*", "*.tiktoken")
_PATHS = ("model_name_or_path", "dataset_dir", "output_dir", "deepspeed")


def find(name: Path) -> Path:
    """Return the path of a recipe or a DeepSpeed file; shipped ones have names, too (qlora, qlora.yaml).

    Those in the current folder's train_configs/ take precedence over the shipped ones. A path that does not
    exist is returned unchanged.
    """
    names = [f"{name.name}.yaml"] * (not name.suffix) + [name.name]
    if not name.is_file() and name.parent in (Path("."), RECIPE.parent):
        for file in (folder / one for folder in (RECIPE.parent, *_SHIPPED) for one in names):
            if file.is_file():
                return file
    return name


def resolve_here(file: Path, model: str | None) -> dict[str, Any]:
    """Resolve a recipe with a model on this machine, without other overrides (see `resolve`)."""
    api.require()
    return resolve(file, os.environ, [], {"model_name_or_path": model}, detect_machine())


def read_config(file: Path) -> dict[str, Any]:
    """Read a YAML file of LLaMA-Factory keys; a McpLoraError if it cannot be read or is not a mapping."""
    from omegaconf import OmegaConf

    with explained(f"{file} cannot be read", "go to the project's folder, or mcp-lora train --config FILE"):
        content = _plain(lambda: OmegaConf.load(file), f"{file} is not YAML", "fix it and run again")
    if not content:
        raise McpLoraError(f"{file} contains no `key: value` lines: fix it and run again")
    return content


def parse_overrides(words: Sequence[str]) -> dict[str, Any]:
    """Parse `key=value` words; a value is YAML, so `true`, `0.1`, `1e-4` and `[a, b]` are typed.

    Raises McpLoraError that lists all words of another form.
    """
    wrong = [word for word in words if not re.match(r"\w+=", word)]
    if wrong:
        raise McpLoraError(f"not of the form key=value: {' '.join(wrong)}: mcp-lora train lora_rank=32")
    from omegaconf import OmegaConf

    quoted = "quote it, as in mcp-lora train 'key=\"value\"'"
    return _plain(lambda: OmegaConf.from_dotlist(list(words)), "a value is not YAML", quoted)


def resolve(
    file: Path,
    environment: Mapping[str, str],
    overrides: Sequence[str],
    flags: Mapping[str, Any],
    machine: Machine,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Merge the four sources of a configuration and fit the result to the machine.

    Later ones take precedence: `file`, MODEL_PATH in `environment`, `overrides` (key=value), `flags` (None is
    not set). Paths are made absolute. Returns the configuration in LLaMA-Factory's keys; `say` logs what was
    fitted.

    Raises McpLoraError if the file or an override cannot be read.
    """
    config = read_config(find(file))
    given = parse_overrides(overrides) | {key: value for key, value in flags.items() if value is not None}
    if (model := environment.get("MODEL_PATH")) and "model_name_or_path" not in given:
        config["model_name_or_path"] = model
        say(f"the model is {model}, from MODEL_PATH in the environment")
    config |= given
    for changes, note in fitted(config, machine, given.keys()):
        config |= changes
        say(note)
    zero = config.get("deepspeed")
    if zero is None:
        config.pop("deepspeed", None)
    elif isinstance(zero, str) and zero and not zero.lstrip().startswith("{"):
        config["deepspeed"] = str(find(Path(zero)))
    for key in _PATHS:
        # A hub id looks like a path; what does not exist stays unchanged.
        place = os.path.expanduser(str(config.get(key) or ""))
        if place and (key.endswith("_dir") or os.path.exists(place)):
            config[key] = os.path.abspath(place)
    return config


def missing_model(model: str, config_only: bool = False) -> str | None:
    """Return what is wrong with a model that looks like a path but is not a model's folder, else None.

    With `config_only` its config.json is enough.
    """
    folder = Path(os.path.expanduser(model))
    looks_like_path = model.startswith((".", "~")) or "\\" in model or model.count("/") > 1
    if not (looks_like_path or folder.is_absolute() or os.path.exists(folder)):
        return None
    if not (folder / "config.json").is_file():
        return f"there is no model in {model} (no config.json)"
    # With only a config.json, transformers silently makes an empty tokenizer.
    if not config_only and not any(any(folder.glob(name)) for name in _TOKENIZERS):
        return f"there is no tokenizer in {model} ({', '.join(_TOKENIZERS)})"
    return None


def _plain(read: Callable[[], Any], problem: str, command: str) -> dict[str, Any]:
    """Return what OmegaConf reads, as the engine reads it; an empty mapping if it is none.

    YAML 1.1 reads `no`, the name of a strategy, as false.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        content = OmegaConf.to_container(read(), resolve=True)
    except (ValueError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise McpLoraError(f"{problem} ({one_line(error)}): {command}") from None
    if not isinstance(content, dict):
        return {}
    named = {str(key): value for key, value in content.items()}
    return {
        key: "no" if value is False and key.endswith("_strategy") else value for key, value in named.items()
    }
