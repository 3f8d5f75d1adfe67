"""What README and docs/ say is so: their numbers, files, commands and links."""

import json
import re
import subprocess
from pathlib import Path

import pytest
from conftest import BIN, ROOT, SAMPLE, run, write_json

from mcp_lora.data.conversion import Settings, convert
from mcp_lora.train import memory
from mcp_lora.train.recipe import RECIPE, read_config

READMES = [ROOT / "README.md", ROOT / "README_zh.md"]
TRAINING = ROOT / "docs" / "training.md"
PAGES = [*READMES, *(ROOT / "docs").glob("*.md"), ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md"]


@pytest.fixture(params=READMES, ids=lambda path: path.name)
def text(request: pytest.FixtureRequest) -> str:
    return Path(request.param).read_text(encoding="utf-8")


# Shapes from the models' config.json: words, hidden, intermediate, layers, heads, key-value heads.
SHAPES = {
    "Qwen2.5-7B": ("qwen2", 152064, 3584, 18944, 28, 28, 4),
    "Qwen2.5-14B": ("qwen2", 152064, 5120, 13824, 48, 40, 8),
    "Llama-3.1-70B": ("llama", 128256, 8192, 28672, 80, 64, 8),
    "Qwen3-30B-A3B": ("qwen3_moe", 151936, 2048, 6144, 48, 32, 4),
}


def folder_of(name: str, place: Path) -> Path:
    """A folder with the config.json of a model, and nothing else."""
    keys = ("model_type", "vocab_size", "hidden_size", "intermediate_size")
    keys += ("num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    config = dict(zip(keys, SHAPES[name], strict=True)) | {"tie_word_embeddings": False}
    if config["model_type"] == "qwen3_moe":
        config |= {
            "moe_intermediate_size": 768,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "head_dim": 128,
        }
    write_json(place / name / "config.json", config)
    return place / name


def test_the_hardware_table_is_what_a_plan_says(tmp_path: Path) -> None:
    text = TRAINING.read_text(encoding="utf-8")
    lines = re.findall(r"^\| \S+-\w+B \| (?:\S+[.]yaml|`--zero).*", text, re.M)
    rows = [line.strip("| ").split(" | ") for line in lines]
    assert len(rows) == 9
    for name, recipe, gpus, batch, cutoff, *shown, _ in rows:
        zero = "3" if "zero" in recipe else "0"
        config = read_config(ROOT / "train_configs" / ("qlora.yaml" if "qlora" in recipe else RECIPE.name))
        config |= {
            "model_name_or_path": str(folder_of(name, tmp_path)),
            "per_device_train_batch_size": int(batch),
            "cutoff_len": int(cutoff.replace(",", "")),
            "deepspeed": str(ROOT / f"train_configs/ds_z{zero}_config.json"),
        }
        found = memory.estimate(config, int(gpus))
        assert found
        parts = (found.weights, found.adapter, found.activations, found.logits, found.total)
        assert shown == [f"{part / 1e9:.1f}" for part in parts]


def test_the_adapters_size_for_qwen(tmp_path: Path) -> None:
    text = TRAINING.read_text(encoding="utf-8")
    config = read_config(ROOT / RECIPE) | {"model_name_or_path": str(folder_of("Qwen2.5-7B", tmp_path))}
    found = memory.estimate(config, 1)
    assert found and f"{found.trained:,}" in text
    assert f"{found.trained / (found.base + found.trained):.1%}".replace("%", " %") in text
    assert f"{4 * found.trained / 1e6:.0f} MB" in text


def test_a_plan_needs_a_config_alone(tmp_path: Path, project: Path) -> None:
    model = folder_of("Qwen2.5-7B", tmp_path)
    done = run([BIN / "mcp-lora", "train", "--model", model, "--gpus", "8", "--dry-run"], project)
    assert done.returncode == 0, done.stderr
    plan = done.stdout.split("# plan\n")[1].splitlines()
    assert plan == [
        "global batch size 128 = 16 per device × 1 accumulated × 8 processes",
        "DeepSpeed: stage 0 shards nothing, computes with the adapter in bf16, and starts with a step "
        "without gradients; to train without it: deepspeed=null",
        "trained: 161,480,704 parameters, 2.1% of the model; adapter on disk: about 646 MB",
        "memory per GPU, estimated in GB: weights 15.2 + adapter 2.6 + activations 34.9 + logits 119.6 = "
        "about 172.3, for samples of cutoff_len",
        "steps: not known, the data is not converted: mcp-lora convert",
    ]


def test_the_tree_names_every_file() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    text = (ROOT / "docs" / "development.md").read_text(encoding="utf-8")
    shipped = (name for name in listed if not name.startswith((".", "tests/")) and "__" not in name)
    assert [name for name in shipped if Path(name).name not in text] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_lead_to_files(page: Path) -> None:
    links = re.findall(r"\]\((?!https?://)([^)#]+)", page.read_text(encoding="utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_the_input_record_is_read(text: str, tmp_path: Path) -> None:
    (block,) = re.findall(r"```json\n(.*?)```", text, re.S)
    source = write_json(tmp_path / "one.json", [json.loads(block)])
    statistics = convert(Settings([str(source)], test=0.0), tmp_path / "out")
    assert statistics.written == {"train": 1}


def test_the_samples_size(text: str) -> None:
    records = json.loads(SAMPLE.read_text(encoding="utf-8"))
    tools = {record["tool_info"]["tool_name"] for record in records}
    assert re.search(rf"\b{len(records)}\b", text) and re.search(rf"\b{len(tools)}\b", text)


def test_both_languages_hold_the_same_commands() -> None:
    texts = (re.findall(r"```bash\n(.*?)```", path.read_text("utf-8"), re.S) for path in READMES)
    english, chinese = ([re.sub(r"\s*#.*", "", block) for block in blocks] for blocks in texts)
    assert english == chinese


def test_both_languages_show_the_same_records() -> None:
    texts = ((ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("data.md", "data_zh.md"))
    english, chinese = (re.findall(r"```json\n.*?```", text, re.S) for text in texts)
    assert len(english) > 38 and english == chinese
