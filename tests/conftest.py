"""What the tests share: a tiny model that is real in all but size, and a project folder."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared" / "data"
SAMPLE = ROOT / "data" / "filtered" / "filtered_sample.json"
MCP_LORA = str(Path(sys.executable).parent / "mcp-lora")


def record(instruction: str = "Add 1 and 2.", tool: str = "get-sum", **changes: Any) -> dict[str, Any]:
    """One filtered record; `changes` replace its fields."""
    return {
        "instruction": instruction,
        "server_info": {"server_name": "everything", "server_description": ""},
        "tool_info": {
            "tool_name": tool,
            "tool_description": f"Does {tool}",
            "input_schema": {"type": "object", "properties": {"a": {"type": "number"}}},
        },
        "function_call": {"name": tool, "arguments": {"a": 1}},
        "tool_response": {"content": "{}"},
        "final_response": "3",
    } | changes


def write_json(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of 60 thousand parameters, with a byte-level BPE of 600 entries."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("models") / "tiny"
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    bpe.train_from_iterator(SAMPLE.read_text(encoding="utf-8").splitlines(), trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=600,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    LlamaForCausalLM(shape).save_pretrained(folder)
    return folder


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A fresh project folder: the shipped presets, and 24 rows of the sample."""
    shutil.copytree(ROOT / "train_configs", tmp_path / "train_configs")
    rows = json.loads(SAMPLE.read_text(encoding="utf-8"))
    write_json(tmp_path / "data/filtered/filtered_20250101_000000.json", rows[::12])
    return tmp_path


Cli = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def cli(project: Path) -> Cli:
    """Run mcp-lora in the project folder, as a user would."""

    def run(*words: str, stdin: str = "", env: dict[str, str] | None = None) -> Any:
        import os

        clean = {key: value for key, value in os.environ.items() if key != "MODEL_PATH"}
        return subprocess.run(
            [MCP_LORA, *words],
            cwd=project,
            input=stdin,
            capture_output=True,
            text=True,
            env=clean | (env or {}),
            timeout=300,
        )

    return run
