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
import shutil
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import BIN, ROOT, SAMPLE, environment, write_json

from mcp_lora import demo_model

CONVERSION = ("--candidates", "2", "--test", "0")
BATCH = 16
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
    "report_to": "none",
    # The nearest that the engine has to what the model is served with.
    "template": "smollm2",
    "tool_format": "qwen",
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
    from datasets import load_from_disk

    from mcp_lora.data import dataset
    from mcp_lora.prompts import chat_template, render

    model = demo_model.ensure()
    (tmp_path / "train_configs").symlink_to(ROOT / "train_configs")
    rows = json.loads(SAMPLE.read_text(encoding="utf-8"))
    data, others = tmp_path / "data/llama_factory", tmp_path / "data/held_out"
    for part, folder in ((rows[::3][:84], data), (rows[1::6], others)):
        source = write_json(folder.with_suffix(".json"), part)
        _run(tmp_path, BIN / "mcp-lora", "convert", source, *CONVERSION, "--output", folder)

    template = chat_template.load({"model_name_or_path": str(model)})
    settings = {"cutoff_len": 4096, "val_size": 0.1}  # as LLaMA-Factory holds rows out: all train on the same
    folder, _ = render.render(template, dataset.file_of(data, "train"), tmp_path / "rendered", settings)
    encoded = load_from_disk(str(folder))["train"]
    tokens = sum(map(len, encoded["input_ids"]))
    write_json(tmp_path / "trl.json", [_prompt_and_answer(template.tokenizer, sample) for sample in encoded])
    held_out = [sample for row in dataset.samples(others, "train") for sample in template.encode(row)]
    questions = [
        (one.input_ids, [label != chat_template.IGNORED for label in one.labels]) for one in held_out
    ]
    write_json(tmp_path / "held_out.json", questions)

    guide = GUIDE | {"model_name_or_path": str(model), "dataset_dir": str(data)}
    guide |= {"use_cpu": True, "output_dir": str(tmp_path / "guide")}
    guide["deepspeed"] = str(ROOT / "train_configs/ds_z0_config.json")
    (tmp_path / "guide.yaml").write_text(yaml.safe_dump(guide), encoding="utf-8")
    commands: dict[str, list[Any]] = {
        "guide": [BIN / "llamafactory-cli", "train", tmp_path / "guide.yaml"],
        "trl": [sys.executable, "-c", TRL, tmp_path / "trl.json", model, tmp_path / "trl"],
        "ours": [BIN / "mcp-lora", "train", "--model", model, "--global-batch", BATCH]
        + ["--output", tmp_path / "ours"],
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
    # 1.92 and 2.02 on one machine, 2.14 and 2.15 on another; 1.39 and 1.61 with AMX, by which the guide's
    # padded batches gain most
    assert min(ratios.values()) >= 1.3


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


def _prompt_and_answer(tokenizer: Any, sample: dict[str, list[int]]) -> dict[str, str]:
    """The texts of a sample; tokenised again they are the same tokens."""
    pairs = list(zip(sample["input_ids"], sample["labels"], strict=True))
    prompt, answer = ([token for token, label in pairs if (label >= 0) is side] for side in (False, True))
    return {"prompt": tokenizer.decode(prompt), "completion": tokenizer.decode(answer)}


@pytest.mark.bench
def test_the_first_step_comes_as_soon_as_the_engines_own(tmp_path: Path) -> None:
    """From raw rows: mcp-lora train against llamafactory-cli with the same rows, candidates and workers."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    model, count = tmp_path / "model", 4000
    tokenizer = AutoTokenizer.from_pretrained(demo_model.ensure())
    tokenizer.save_pretrained(model)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape)).save_pretrained(model)
    rows = json.loads(SAMPLE.read_text(encoding="utf-8"))
    raw = [
        rows[number % len(rows)] | {"instruction": f"{rows[number % len(rows)]['instruction']} ({number})"}
        for number in range(count)
    ]
    source = write_json(tmp_path / "raw.json", raw)
    (tmp_path / "train_configs").symlink_to(ROOT / "train_configs")
    words = ["max_steps=1", "preprocessing_num_workers=2", "eval_strategy=no", "val_size=0"]
    start = time.perf_counter()
    _run(tmp_path, BIN / "mcp-lora", "convert", source)  # what somebody without mcp-lora has to write himself
    converted = time.perf_counter() - start
    data = tmp_path / "data/llama_factory"
    plain = GUIDE | {"model_name_or_path": str(model), "dataset_dir": str(data)}
    plain |= {"use_cpu": True, "bf16": False}
    plain |= {"max_steps": 1, "preprocessing_num_workers": 2, "eval_strategy": "no", "val_size": 0.0}
    plain |= {"per_device_train_batch_size": 1, "output_dir": str(tmp_path / "plain")}
    (tmp_path / "plain.yaml").write_text(yaml.safe_dump(plain), encoding="utf-8")
    start = time.perf_counter()
    _run(tmp_path, BIN / "llamafactory-cli", "train", tmp_path / "plain.yaml")
    theirs = converted + time.perf_counter() - start
    shutil.rmtree(data)
    start = time.perf_counter()
    options = ["--model", model, "--data", source, "--global-batch", 1, "--output", tmp_path / "ours"]
    _run(tmp_path, BIN / "mcp-lora", "train", *options, *words)
    ours = time.perf_counter() - start
    print(f"\n{count} rows: the engine's first step ended after {theirs:.0f} s, ours after {ours:.0f} s")
    assert ours <= 1.05 * theirs
