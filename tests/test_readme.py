"""What README says is so: its figures, its files, its commands."""

import json
import re
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT, SAMPLE

READMES = [ROOT / "README.md", ROOT / "README_zh.md"]


@pytest.fixture(params=READMES, ids=lambda path: path.name)
def text(request: pytest.FixtureRequest) -> str:
    return Path(request.param).read_text(encoding="utf-8")


def test_the_adapters_size_for_qwen(text: str) -> None:
    """PEFT on the real modules, without their weights (shapes from the model's config.json)."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import Qwen2Config, Qwen2ForCausalLM

    shape = Qwen2Config(
        vocab_size=152064,
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        model = get_peft_model(
            Qwen2ForCausalLM(shape), LoraConfig(r=64, lora_alpha=128, target_modules="all-linear")
        )
    trained, total = model.get_nb_trainable_parameters()
    assert f"{trained:,}" in text
    assert f"{trained / total:.1%}".replace("%", " %") in text
    assert f"{trained * 4 / 1e6:.0f} MB" in text
    assert f"{(total - trained) * 2 / 1e9:.1f} GB" in text
    assert f"{trained * 16 / 1e9:.1f} GB" in text


def test_the_tree_names_every_file(text: str) -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    shown = text.split("pyproject.toml  ")[-1]
    missing = [
        name for name in listed if not name.startswith((".", "tests/")) and Path(name).name not in text
    ]
    assert missing == ["src/mcp_lora/__init__.py"] and shown


def test_the_samples_size(text: str) -> None:
    records = json.loads(SAMPLE.read_text(encoding="utf-8"))
    tools = {record["tool_info"]["tool_name"] for record in records}
    assert re.search(rf"\b{len(records)}\b", text) and re.search(rf"\b{len(tools)}\b", text)


def test_both_languages_hold_the_same_commands() -> None:
    blocks = [
        [
            re.sub(r"\s*#.*", "", block)
            for block in re.findall(r"```bash\n(.*?)```", path.read_text("utf-8"), re.S)
        ]
        for path in READMES
    ]
    assert blocks[0] == blocks[1]
