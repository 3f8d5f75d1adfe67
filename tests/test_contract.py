"""All that is used of LLaMA-Factory: what a new version breaks shows here."""

import ast
import importlib
import subprocess

from conftest import BIN, ROOT

from mcp_lora.engine import api
from mcp_lora.prompts.render import TEMPLATE

SOURCE = ROOT / "src" / "mcp_lora"
API = SOURCE / "engine" / "api.py"
FUNCTIONS = {
    "llamafactory.extras.misc.try_download_model_from_other_hub",
    "llamafactory.hparams.ModelArguments",
    "llamafactory.hparams.get_infer_args",
    "llamafactory.model.load_model",
    "llamafactory.model.load_tokenizer",
}
# Each of LLaMA-Factory's keys that src names; recipes are checked by tests/test_recipe.py.
KEYS = """
adapter_name_or_path add_special_tokens add_tokens additional_target bf16 bf16_full_eval cache_dir
cutoff_len dataloader_drop_last dataset dataset_dir deepspeed default_system disable_gradient_checkpointing
disable_shuffling do_predict do_sample do_train double_quantization enable_liger_kernel enable_thinking
eval_dataset eval_steps eval_strategy export_dir export_size finetuning_type flash_attn fp16 fsdp
gradient_accumulation_steps hf_hub_token interleave_probs learning_rate load_best_model_at_end logging_steps
lora_alpha lora_dropout lora_rank lora_target mask_history max_new_tokens max_samples max_steps mix_strategy
model_name_or_path model_revision neat_packing num_train_epochs optim output_dir overwrite_cache packing
pissa_init per_device_eval_batch_size per_device_train_batch_size predict_with_generate
preprocessing_num_workers preserve_thinking pure_bf16 quantization_bit quantization_type report_to
resize_vocab resume_from_checkpoint save_only_model save_total_limit seed skip_special_tokens
split_special_tokens stage streaming temperature template tokenized_path tool_format train_on_prompt
train_sampling_strategy trust_remote_code use_cpu use_dora use_unsloth val_size warmup_ratio warmup_steps
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


def test_the_keys_that_are_set_or_read() -> None:
    known = {key for module in api.ARGUMENTS for key, _ in api.keys(module)}
    assert set(KEYS.split()) <= known
    files = (file.read_text(encoding="utf-8") for file in SOURCE.rglob("*.py"))
    nodes = (node for file in files for node in ast.walk(ast.parse(file)))
    named = {str(node.value) for node in nodes if isinstance(node, ast.Constant)}
    assert named & known <= set(KEYS.split())


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
