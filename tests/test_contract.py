"""All that is used of LLaMA-Factory: what a new version breaks shows here."""

import ast
import importlib
import subprocess

from conftest import BIN, ROOT

from mcp_lora.engine import api
from mcp_lora.prompts.render import TEMPLATE

API = ROOT / "src" / "mcp_lora" / "engine" / "api.py"
FUNCTIONS = {
    "llamafactory.extras.misc.try_download_model_from_other_hub",
    "llamafactory.hparams.ModelArguments",
    "llamafactory.hparams.get_infer_args",
    "llamafactory.model.load_model",
    "llamafactory.model.load_tokenizer",
}
# What mcp-lora sets or reads by itself; recipes are checked by tests/test_recipe.py.
KEYS = """
adapter_name_or_path bf16 cutoff_len dataset dataset_dir deepspeed disable_gradient_checkpointing
do_predict do_sample do_train enable_liger_kernel enable_thinking eval_dataset eval_steps eval_strategy
export_dir export_size finetuning_type flash_attn fp16 gradient_accumulation_steps learning_rate
logging_steps lora_alpha
lora_dropout lora_rank lora_target mask_history max_new_tokens max_samples max_steps model_name_or_path
num_train_epochs output_dir per_device_eval_batch_size per_device_train_batch_size predict_with_generate
preprocessing_num_workers quantization_bit resume_from_checkpoint save_only_model seed skip_special_tokens
stage template tokenized_path train_on_prompt trust_remote_code use_cpu val_size warmup_steps
"""


def test_the_functions_that_are_imported() -> None:
    found = {
        f"{node.module}.{name.name}"
        for node in ast.walk(ast.parse(API.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("llamafactory")
        for name in node.names
    }
    assert found == FUNCTIONS
    for function in FUNCTIONS:
        module, _, name = function.rpartition(".")
        assert hasattr(importlib.import_module(module), name)


def test_the_keys_that_are_set() -> None:
    assert set(KEYS.split()) <= {key for module in api.ARGUMENTS for key, _ in api.keys(module)}


def test_the_commands_and_the_template() -> None:
    from llamafactory.data.template import TEMPLATES

    done = subprocess.run([BIN / "llamafactory-cli", "help"], capture_output=True, text=True)
    assert all(f"llamafactory-cli {verb}" in done.stdout for verb in ("train", "export"))
    assert TEMPLATE in TEMPLATES


def test_the_tags_of_the_converted_data_are_the_default_ones() -> None:
    from llamafactory.data.parser import DatasetAttr

    names = ("user", "assistant", "observation", "function", "system")
    tags = [getattr(DatasetAttr("file", "x"), f"{name}_tag") for name in ("role", "content", *names)]
    assert tags == ["from", "value", "human", "gpt", "observation", "function_call", "system"]
