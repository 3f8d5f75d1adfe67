from dataclasses import fields
from pathlib import Path

import pytest

from mcp_lora.engine import api
from mcp_lora.errors import McpLoraError


def test_unknown_keys_are_all_named() -> None:
    config = {"lora_rang": 3, "learning_rate": 1.0, "zzz": 1, "new_special_tokens": "a"}
    assert api.problems(config) == [
        "LLaMA-Factory has no key lora_rang (did you mean lora_rank?)",
        "LLaMA-Factory has no key zzz",
        "LLaMA-Factory has no key new_special_tokens (did you mean add_special_tokens?)",
    ]


def test_values_of_another_type_are_named() -> None:
    good = {"lora_rank": 8, "learning_rate": 1, "bf16": True, "max_samples": None, "save_steps": 0.5}
    assert api.problems(good) == []
    bad = {"lora_rank": 10.0, "learning_rate": "1e-4x", "bf16": "maybe", "max_samples": True}
    assert api.problems(bad) == [
        "lora_rank=10.0 is not an int",
        "learning_rate=1e-4x is not a float",
        "bf16=maybe is not a bool",
        "max_samples=True is not an int",
    ]


def test_the_keys_are_those_of_the_installed_engine() -> None:
    from llamafactory import hparams

    names = ("Model", "Data", "Training", "Finetuning", "Generating")
    groups = [fields(getattr(hparams, f"{name}Arguments")) for name in names]
    known = {field.name for group in groups for field in group if field.init}
    assert api.problems(dict.fromkeys(known)) == []
    assert known == {key for module in api.ARGUMENTS for key, _ in api.keys(module)}
    model = {field.name for field in groups[0] if field.init} | {"additional_target"}
    assert model - api.model_settings(dict.fromkeys(known)).keys() == {
        "adapter_name_or_path",
        "disable_gradient_checkpointing",
        "enable_liger_kernel",
        "use_unsloth",
    }


def test_a_missing_engine_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    api.require()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(McpLoraError, match="pip install"):
        api.require()


def test_a_model_of_modelscope_is_fetched_by_the_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched = []

    def snapshot_download(name: str, revision: str, cache_dir: str | None) -> str:
        if fetched:
            raise ConnectionError("Max retries exceeded")
        fetched.append((name, revision))
        return "/models/org/model"

    monkeypatch.setattr("modelscope.snapshot_download", snapshot_download)
    monkeypatch.setenv("HOME", str(tmp_path))  # the engine keeps a lock there
    config = {"model_name_or_path": "org/model", "model_revision": "v1", "lora_rank": 8}
    monkeypatch.delenv("USE_MODELSCOPE_HUB", raising=False)
    assert api.fetched(config) == "org/model" and not fetched
    monkeypatch.setenv("USE_MODELSCOPE_HUB", "1")
    assert api.fetched(config) == "/models/org/model" and fetched == [("org/model", "v1")]
    assert api.fetched({"model_name_or_path": str(tmp_path)}) == str(tmp_path)
    with pytest.raises(McpLoraError, match="USE_MODELSCOPE_HUB is set .Max retries exceeded.*or unset"):
        api.fetched(config)
