import pytest

from mcp_lora import engine


def test_unknown_keys_are_all_named() -> None:
    config = {"lora_rang": 3, "learning_rate": 1.0, "zzz": 1}
    assert engine.problems(config) == [
        "LLaMA-Factory knows no key lora_rang (did you mean lora_rank?)",
        "LLaMA-Factory knows no key zzz",
    ]


def test_a_missing_engine_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    from mcp_lora.errors import McpLoraError

    engine.require()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(McpLoraError, match="pip install"):
        engine.require()


def test_what_shapes_a_model_is_told_from_how_it_is_trained() -> None:
    shape = {"model_name_or_path": "m", "resize_vocab": True, "add_tokens": "a", "quantization_bit": 4}
    other = {"adapter_name_or_path": "a", "learning_rate": 1.0, "template": "empty", "tokenized_path": "t"}
    assert engine.shaping(shape | other) == shape
