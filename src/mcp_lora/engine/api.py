"""LLaMA-Factory's API, as far as it is used in this process, and its configuration keys."""

import ast
import difflib
import importlib.util
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from mcp_lora.errors import McpLoraError, one_line

_MODEL = "llamafactory/hparams/model_args.py"
ARGUMENTS = (  # HfArgumentParser's dataclasses
    _MODEL,
    "llamafactory/hparams/data_args.py",
    "llamafactory/hparams/training_args.py",
    "llamafactory/hparams/finetuning_args.py",
    "llamafactory/hparams/generating_args.py",
    "transformers/training_args.py",
    "transformers/training_args_seq2seq.py",
)
_PLAIN = re.compile(r"(?:Optional\[)?(int|float|bool)\]?(?: \| None)?")
_RENAMED = {"new_special_tokens": ["add_special_tokens"]}  # in 0.9.4
_STEP_ONLY = {"adapter_name_or_path", "disable_gradient_checkpointing", "use_unsloth", "enable_liger_kernel"}


def require() -> None:
    """Raise McpLoraError if LLaMA-Factory is not installed."""
    if importlib.util.find_spec("llamafactory") is None:
        raise McpLoraError("LLaMA-Factory is not installed in this environment: pip install -e .")


def problems(config: Mapping[str, Any]) -> list[str]:
    """Return what LLaMA-Factory would reject: unknown keys, values of another type."""
    known = {key: kind for module in ARGUMENTS for key, kind in keys(module)}
    found = []
    for key, value in config.items():
        if key not in known:
            close = _RENAMED.get(key) or difflib.get_close_matches(key, known, n=1)
            meant = f" (did you mean {close[0]}?)" if close else ""
            found.append(f"LLaMA-Factory has no key {key}{meant}")
        elif (named := _PLAIN.fullmatch(known[key])) and value is not None:
            types = {"int": int, "float": int | float, "bool": bool}[named[1]]
            if not isinstance(value, types) or (isinstance(value, bool) and named[1] != "bool"):
                found.append(f"{key}={value} is not {'an' if named[1] == 'int' else 'a'} {named[1]}")
    return found


def model_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that define the model, which must be the same in training, prediction and export.

    They are LLaMA-Factory's model arguments (the base, its vocabulary, quantization, attention, custom code),
    except those that concern only one of these steps.
    """
    names = {"additional_target", *dict(keys(_MODEL))} - _STEP_ONLY
    return {key: value for key, value in config.items() if key in names}


def fetched(config: Mapping[str, Any]) -> str:
    """Return the path or hub id of the base model, after fetching it if its hub is not Hugging Face's.

    The engine uses ModelScope or openMind if USE_MODELSCOPE_HUB or USE_OPENMIND_HUB is set.

    Raises McpLoraError if it cannot be fetched.
    """
    model = str(config.get("model_name_or_path"))
    hubs = {"USE_MODELSCOPE_HUB": "modelscope", "USE_OPENMIND_HUB": "openmind"}
    on = [name for name in hubs if os.environ.get(name, "").lower() in ("1", "y", "true")]
    if not on or Path(model).exists():
        return model
    from llamafactory.extras.misc import try_download_model_from_other_hub
    from llamafactory.hparams import ModelArguments

    known = {key: value for key, value in config.items() if key in dict(keys(_MODEL))}
    try:
        return str(try_download_model_from_other_hub(ModelArguments(**known)))
    except Exception as error:  # the hubs' packages raise any exception
        what = f"{model} cannot be fetched, {on[0]} is set ({one_line(error)})"
        again = f"check the network and pip show {hubs[on[0]]}, or unset {on[0]}"
        raise McpLoraError(f"{what}: {again}") from None


def number(config: Mapping[str, Any], key: str, default: float) -> float:
    """Return a number of a configuration, or `default`; raise a McpLoraError if it is not a number."""
    value = config.get(key)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise McpLoraError(f"{key}={value} is not a number: mcp-lora train {key}={default:g}")
    return value


def dump(config: Mapping[str, Any]) -> str:
    """Return a configuration as the YAML that LLaMA-Factory reads."""
    return yaml.safe_dump(dict(config), allow_unicode=True, sort_keys=False)


def loaded(settings: Mapping[str, Any]) -> Any:
    """Return the model and adapter of settings (see mcp_lora.train.runs.serving_config), to generate with."""
    from llamafactory.hparams import get_infer_args
    from llamafactory.model import load_model, load_tokenizer

    # the template is not used, but required
    model_args, _, finetuning_args, _ = get_infer_args(dict(settings) | {"template": "empty"})
    tokenizer = load_tokenizer(model_args)["tokenizer"]
    return load_model(tokenizer, model_args, finetuning_args, is_trainable=False)


def keys(module: str) -> Iterator[tuple[str, str]]:
    """Yield the fields of a module's dataclasses, and their types, from its source, as imports are slow."""
    package, _, file = module.partition("/")
    spec = importlib.util.find_spec(package)
    assert spec and spec.submodule_search_locations
    source = Path(spec.submodule_search_locations[0], file).read_text(encoding="utf-8")
    for group in ast.parse(source).body:
        for field in group.body if isinstance(group, ast.ClassDef) else []:
            if isinstance(field, ast.AnnAssign) and "init=False" not in ast.unparse(field):
                yield ast.unparse(field.target), ast.unparse(field.annotation)
