"""One training three ways, in turn: pytest -m bench -s tests/bench/test_train.py (half an hour, no GPU).

The same samples of the shipped sample, SmolLM2-135M-Instruct, LoRA, learning rate and batch of 16:

    guide   the user guide's configuration by llamafactory-cli, made runnable on a CPU
    trl     TRL's SFTTrainer with its defaults, on the same prompts and answers
    ours    mcp-lora train with the recipe

Useful tokens are those of the samples, padding left out; their rate is by the trainer's own clock
(train_runtime). The held-out loss is computed for all by one program, in fp32, over the tokens of the
right answers. The guide accumulates 8 times; here nobody does it on purpose, so that there are steps to
learn in.
"""

import json
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import BIN, ROOT, SAMPLE, environment, write_json

from mcp_lora import embedded

CONVERSION = ("--candidates", "2", "--test", "0")
BATCH, SHARED_KEYS = 16, {"template": "smollm2", "tool_format": "qwen", "report_to": "none"}
GUIDE = {
    "stage": "sft",
    "do_train": True,
    "finetuning_type": "lora",
    "lora_rank": 64,
    "lora_alpha": 128,
    "lora_dropout": 0.1,
    "lora_target": "all",
    "dataset": "mcp_train",
    "cutoff_len": 4096,
    "val_size": 0.1,
    "preprocessing_num_workers": 4,
    "per_device_train_batch_size": 16,
    "gradient_accumulation_steps": 1,
    "learning_rate": 2.0e-4,
    "num_train_epochs": 1.0,
    "lr_scheduler_type": "cosine",
    "warmup_ratio": 0.1,
    "optim": "adamw_torch",
    "bf16": True,
    "eval_strategy": "steps",
    "eval_steps": 50,
    "logging_steps": 10,
    "save_steps": 100,
    "plot_loss": True,
}

TRL = """
import json, sys
from datasets import load_dataset
from peft import LoraConfig
from transformers import set_seed
from trl import SFTConfig, SFTTrainer
data, model, out = sys.argv[1:]
set_seed(42)  # the adapter's first weights are drawn before the trainer does it
rows = load_dataset("json", data_files=data, split="train")
lora = LoraConfig(r=64, lora_alpha=128, lora_dropout=0.1, target_modules="all-linear", task_type="CAUSAL_LM")
config = SFTConfig(out, use_cpu=True, num_train_epochs=1, per_device_train_batch_size=8,
                   gradient_accumulation_steps=2, learning_rate=2e-4, lr_scheduler_type="cosine",
                   warmup_ratio=0.1, report_to="none")
trainer = SFTTrainer(model, args=config, train_dataset=rows, peft_config=lora)
assert len(trainer.train_dataset) == len(rows)
result = trainer.train()
trainer.save_model(out)
trainer.save_metrics("train", result.metrics)
"""

HELD_OUT_LOSS = """
import json, sys
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
questions, base, *adapters = sys.argv[1:]
questions = json.load(open(questions))
for adapter in adapters:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, adapter)
    total = count = 0
    with torch.no_grad():
        for ids, trained in questions:
            logits = model.eval()(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
            said = torch.tensor(ids[1:])
            losses = -logits[torch.arange(len(said)), said][torch.tensor(trained[1:])]
            total, count = total + losses.sum().item(), count + len(losses)
    print(total / count)
"""


@pytest.mark.bench
def test_training_is_faster_than_the_guides_and_trls(tmp_path: Path) -> None:
    from datasets import Dataset

    from mcp_lora import dataset
    from mcp_lora.lengths import Lengths

    model = embedded.ensure()
    (tmp_path / "train_configs").symlink_to(ROOT / "train_configs")
    rows = json.loads(SAMPLE.read_text(encoding="utf-8"))
    data, others = tmp_path / "data/llama_factory", tmp_path / "data/held_out"
    for part, folder in ((rows[::3][:84], data), (rows[1::6], others)):
        source = write_json(folder.with_suffix(".json"), part)
        _run(tmp_path, BIN / "mcp-lora", "convert", source, *CONVERSION, "--out", folder)

    counter = Lengths({"model_name_or_path": str(model), "cutoff_len": 4096} | SHARED_KEYS)
    encoded = [counter.encode(sample) for sample in dataset.samples(data, "mcp_train")]
    # As LLaMA-Factory does it (its data/data_utils.py), so that all train on the same.
    kept = Dataset.from_list([{"row": row} for row in range(len(encoded))]).train_test_split(0.1, seed=42)
    encoded = [encoded[row] for row in kept["train"]["row"]]
    tokens = sum(map(len, encoded))
    write_json(tmp_path / "trl.json", [_prompt_and_answer(counter.tokenizer, sample) for sample in encoded])
    held_out = [counter.encode(sample) for sample in dataset.samples(others, "mcp_train")]
    write_json(tmp_path / "held_out.json", [list(zip(*sample, strict=True)) for sample in held_out])

    guide = GUIDE | SHARED_KEYS | {"model_name_or_path": str(model), "dataset_dir": str(data)}
    guide |= {"use_cpu": True, "output_dir": str(tmp_path / "guide")}
    guide["deepspeed"] = str(ROOT / "train_configs/ds_z0_config.json")
    (tmp_path / "guide.yaml").write_text(yaml.safe_dump(guide), encoding="utf-8")
    words = [f"{key}={value}" for key, value in SHARED_KEYS.items()]
    commands: dict[str, list[Any]] = {
        "guide": [BIN / "llamafactory-cli", "train", tmp_path / "guide.yaml"],
        "trl": [sys.executable, "-c", TRL, tmp_path / "trl.json", model, tmp_path / "trl"],
        "ours": [BIN / "mcp-lora", "train", "--model", model, "--global-batch", BATCH]
        + ["--output", tmp_path / "ours", *words],
    }
    figures = {}
    for name, command in commands.items():
        start = time.perf_counter()
        # A recipe that names DeepSpeed wants a distributed launch.
        variables = {"FORCE_TORCHRUN": "1", "NPROC_PER_NODE": "1"} if name == "guide" else {}
        _run(tmp_path, *command, variables=variables)
        wall = time.perf_counter() - start
        result = json.loads((tmp_path / name / "train_results.json").read_text(encoding="utf-8"))
        figures[name] = {"seconds": result["train_runtime"], "wall": wall}
    argv = [sys.executable, "-c", HELD_OUT_LOSS, tmp_path / "held_out.json", model]
    losses = _run(tmp_path, *argv, *(tmp_path / name for name in commands)).split()
    print(f"\n{len(encoded)} samples, {tokens} useful tokens, batch {BATCH}; {len(held_out)} held out")
    for name, loss in zip(commands, map(float, losses), strict=True):
        found = figures[name] | {"loss": loss}
        figures[name] = found
        print(
            f"{name:6} {tokens / found['seconds']:6.0f} useful tokens/s, {found['seconds']:4.0f} s "
            f"(command {found['wall']:4.0f} s), held-out loss {loss:.4f}"
        )
    ours = figures["ours"]
    record = json.loads((tmp_path / "ours/manifest.json").read_text(encoding="utf-8"))
    began, ended = (datetime.fromisoformat(record[key]) for key in ("started", "ended"))
    own = ours["wall"] - (ended - began).total_seconds()
    print(
        f"mcp-lora itself, before and after the engine: {own:.0f} s, {own / ours['wall']:.1%} of the command"
    )
    ratios = {name: figures[name]["seconds"] / ours["seconds"] for name in ("guide", "trl")}
    print(f"ours is {ratios['guide']:.2f} times as fast as the guide's, {ratios['trl']:.2f} times as TRL")
    assert ours["loss"] <= 1.02 * figures["guide"]["loss"]
    assert ours["loss"] <= 1.02 * figures["trl"]["loss"]
    assert ratios["guide"] >= 2 and ratios["trl"] >= 1.3


def _run(folder: Path, *argv: Any, variables: dict[str, str] | None = None) -> str:
    done = subprocess.run(
        list(map(str, argv)),
        cwd=folder,
        capture_output=True,
        text=True,
        env=environment(PATH=f"{BIN}:/usr/bin:/bin", CUDA_VISIBLE_DEVICES="") | (variables or {}),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def _prompt_and_answer(tokenizer: Any, sample: list[tuple[int, bool]]) -> dict[str, str]:
    """The texts of a sample; tokenised again they are the same tokens."""
    prompt, answer = ([token for token, trained in sample if trained is side] for side in (False, True))
    return {"prompt": tokenizer.decode(prompt), "completion": tokenizer.decode(answer)}
