"""Export a run's adapter: merged into its base, by itself, or as GGUF, and check what is exported."""

import gc
import json
import shlex
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mcp_lora.data import calls, files
from mcp_lora.engine import api
from mcp_lora.errors import McpLoraError, explained
from mcp_lora.evaluate import evaluation
from mcp_lora.evaluate.answers import Judge, Response
from mcp_lora.prompts import chat_template, render
from mcp_lora.prompts.chat_template import ChatTemplate, hub_arguments
from mcp_lora.serve import llama_cpp
from mcp_lora.serve.chat import run_engine
from mcp_lora.serve.parity import parity
from mcp_lora.train import manifest, runs

# The largest difference of a logit that merging may cause, relative to the largest logit: merged weights are
# rounded to the model's dtype, while a separate adapter is not.
TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2, "float16": 1e-2}
PROMPT = "Which tools can you call, and what time is it in Tokyo?"
# The fraction of the questions, at least one, that a GGUF file may answer by other calls: where two tokens
# are about equally likely, rounding decides between them.
OTHER_CALLS = {"f32": 0.1, "f16": 0.1, "bf16": 0.1, "q8_0": 0.25}
_QUESTIONS = 5  # of each split, to check a GGUF file with
_ADAPTER = ("adapter_*", "tokenizer*", "*.jinja", "special_tokens_map.json", "vocab.*", "merges.txt")


@dataclass(frozen=True)
class Comparison:
    """The largest difference between logits, the tolerance for rounding, and the dtype."""

    difference: float
    tolerance: float
    dtype: str

    def __str__(self) -> str:
        what = f"in {self.dtype}: the largest difference of a logit is {self.difference:.2g}"
        return f"against base + adapter, {what} (tolerance {self.tolerance:.2g})"


def export(
    run: Path,
    output: Path,
    checkpoint: str | None = None,
    gguf: str | None = None,
    adapter_only: bool = False,
    progress: Callable[[str, float], None] = lambda step, fraction: None,
) -> str:
    """Export a run's adapter into `output`, which appears only once it is complete and checked.

    Args:
        run: the run's folder.
        output: a folder, or with `gguf` a file.
        checkpoint: the checkpoint of the adapter; by default the newest.
        gguf: one of OTHER_CALLS, to write a GGUF file.
        adapter_only: without the base.
        progress: receives the fraction of the questions that a GGUF file has answered.

    Returns:
        A message on how it was checked.

    Raises McpLoraError if the run has no adapter, its base was quantized and is to be merged, `output`
    exists, or the engine or a converter fails; with exit code 1 if what is exported is not equivalent.
    """
    api.require()
    adapter = runs.adapter(run, checkpoint)
    again = shlex.join(["mcp-lora", "export", str(run), "--output", "OTHER"])
    if runs.is_quantized(run) and not adapter_only:
        why = "was trained on a quantized base, and merging into it loses precision"
        raise McpLoraError(f"{run} {why}: mcp-lora export {run} --adapter-only")
    if output.exists():
        raise McpLoraError(f"{output} exists: {again}")
    config = runs.read_run(run)
    template = chat_template.load(config)
    with explained(f"{output.parent} cannot be written", again):
        output.parent.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.")
    with scratch as place:
        folder, file = Path(place, "model"), Path(place, output.name)
        if adapter_only:
            copy_adapter(adapter, folder)
            note = "the adapter as it was trained"
        else:
            note = _merge(run, adapter, folder)
        _complete(folder, run, template)
        if gguf:
            base = None
            if adapter_only:
                found = manifest.cached(config, "config.json")
                assert found  # the template has been loaded from there
                llama_cpp.convert_adapter(folder, found.parent, file, gguf)
                base = Path(place, "base.gguf")
                llama_cpp.convert(found.parent, base, gguf)
            else:
                llama_cpp.convert(folder, file, gguf)
            note = _check_answers(run, checkpoint, template, file, base, gguf, progress)
        (file if gguf else folder).rename(output)
    return note


def push(exported: Path, name: str) -> str:
    """Upload what was exported to the Hugging Face hub, into a new private repository or one's own.

    Args:
        exported: a folder or a file.
        name: OWNER/NAME.

    Returns:
        The repository's address. Raises McpLoraError if the hub rejects it or cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    hub = HfApi()
    try:
        address = str(hub.create_repo(name, private=True, exist_ok=True))
        if exported.is_dir():
            hub.upload_folder(repo_id=name, folder_path=exported)
        else:
            hub.upload_file(repo_id=name, path_or_fileobj=exported, path_in_repo=exported.name)
    except (HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OSError) as error:
        what = (
            f"{exported} is complete, but cannot be pushed to {name} ({' '.join(str(error).split())[:200]})"
        )
        raise McpLoraError(f"{what}: hf auth login, and hf upload {name} {exported}") from None
    return address


def copy_adapter(adapter: Path, folder: Path) -> None:
    folder.mkdir()
    for name in _ADAPTER:
        for file in adapter.glob(name):
            shutil.copy(file, folder)


def _merge(run: Path, adapter: Path, folder: Path) -> str:
    """Let the engine merge an adapter into its base; return how the two compare."""
    settings = runs.serving_config(run, adapter) | {"export_dir": str(folder), "export_size": 1}
    settings |= {"template": render.TEMPLATE}  # which keeps the tokenizer's chat template
    outcome = run_engine("export", settings)
    if outcome.code:
        raise outcome.error(f"mcp-lora export {run}")
    # the engine's supports no tools, and uses the engine's template
    (folder / "Modelfile").unlink(missing_ok=True)
    found = compare(settings, adapter, folder)
    if found.difference > found.tolerance:
        raise McpLoraError(f"the merged model is not equivalent, nothing is exported ({found})", code=1)
    return str(found)


def _complete(folder: Path, run: Path, template: ChatTemplate) -> None:
    """Add what a server requires: the chat template that was trained, and the tokens that end an answer."""
    tokenizer = template.tokenizer
    (folder / runs.CHAT_TEMPLATE).write_text(str(tokenizer.chat_template), encoding="utf-8")
    ends = {*template.ends.values(), tokenizer.eos_token}
    file = folder / "generation_config.json"
    content = files.load(file, f"mcp-lora export {run}")
    content["eos_token_id"] = sorted(map(tokenizer.convert_tokens_to_ids, ends))
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    if parsed := response_template(template):
        file = folder / "tokenizer_config.json"
        known = files.load(file, f"mcp-lora export {run}") | {"response_template": parsed}
        file.write_text(json.dumps(known, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(model_card(run), encoding="utf-8")


def response_template(template: ChatTemplate) -> dict[str, Any] | None:
    """Return how to parse answers in Hermes format, None for other formats.

    transformers (from 5.13, utils/chat_parsing), vLLM (--tool-call-parser hf) and SGLang (auto) read it from
    tokenizer_config.json.
    """
    if not template.written.startswith("<tool_call>\n{"):
        return None
    calls = {"open": "<tool_call>", "close_pattern": r"</tool_call>\s*", "content": "json", "repeats": True}
    return {
        "start_anchor": template.opening,
        "defaults": {"role": "assistant"},
        "fields": {
            "thinking": {"open": "<think>", "close_pattern": r"</think>\s*"},
            "tool_calls": calls | {"transform": {"type": "function", "function": "{content}"}},
            "content": {"close": sorted({*template.ends.values()})},
        },
    }


def model_card(run: Path) -> str:
    """Return a model card: the base, the data, the recipe and the last evaluation of a run."""
    config, record = runs.read_run(run), manifest.read(run)
    base = str(config["model_name_or_path"])
    name = Path(base).name if Path(base).is_absolute() else base
    data = record.get("conversion") or {}
    metrics = files.load(run / "eval" / "metrics.json", f"mcp-lora eval {run}")
    keys = ("lora_rank", "lora_alpha", "lora_dropout", "learning_rate", "num_train_epochs", "cutoff_len")
    lines = ["---", "tags: [lora, tool-calling, mcp]", "pipeline_tag: text-generation"]
    lines += [] if Path(base).is_absolute() else [f"base_model: {base}"]
    lines += ["---", "", f"# {name}, tuned to call MCP tools", ""]
    lines += ["The licence is that of the base model, and of the data.", "", "## Training", ""]
    if data:
        rejected = sum(data["rejected"].values())
        tools = f"{data['tools']} tools of {data['servers']} servers"
        lines.append(
            f"- {data['read']} rows, {rejected} of them rejected; {tools}; written: {data['written']}"
        )
    lines.append("- " + ", ".join(f"{key} {config[key]}" for key in keys if key in config))
    lines += ["", "## Evaluation", ""]
    if not metrics:
        lines.append("None.")
    for split, found in metrics.get("splits", {}).items():
        for model, each in found["figures"].items():
            values = (f"{key} {_percent(one)}" for key, one in each.items())
            lines.append(f"- {split}, {found['count']} questions, {model}: {', '.join(values)}")
    lines += ["", "In % with 95 % intervals." if metrics else "", "", "## Use", ""]
    lines.append("The prompt must contain the candidate tools, rendered by `chat_template.jinja`.")
    return "\n".join(lines) + "\n"


def _percent(found: Mapping[str, float]) -> str:
    return f"{100 * found['share']:.1f} ({100 * found['low']:.0f}…{100 * found['high']:.0f})"


def _check_answers(
    run: Path,
    checkpoint: str | None,
    template: ChatTemplate,
    file: Path,
    base: Path | None,
    dtype: str,
    progress: Callable[[str, float], None],
) -> str:
    """Compare a served GGUF file with base + adapter: its prompts, and its calls on held-out questions.

    With `base`, the base model's GGUF file, `file` is an adapter for it. It answers freely, token by token,
    while llama.cpp binds the answer to a request with tools to their schemas.
    """
    request = evaluation.Request(run, checkpoint, limit=_QUESTIONS, models=[evaluation.ADAPTER])
    try:
        prepared = evaluation.prepare(request)
    except McpLoraError as error:
        return f"not checked ({error})"
    expected = evaluation.evaluate(request, progress).answers[evaluation.ADAPTER]
    by_question = {answer.question: answer.calls for answer in expected}
    judge, other = Judge(template), 0
    model, adapter = (base, file) if base else (file, None)
    own = str(template.tokenizer.chat_template) if base else None
    with llama_cpp.running(model, adapter, own, template.server_arguments) as url:
        if differences := parity(url, template).differences:
            raise McpLoraError(
                f"the GGUF file's prompts are not those of training: {'; '.join(differences)}", 1
            )
        for done, question in enumerate(prepared.asked, 1):
            tokens = llama_cpp.complete(url, template.ids(question.prompt), prepared.length)
            answer = template.without_end(template.tokenizer.decode(tokens))
            made = judge(question, Response(question.prompt, answer, [])).calls
            other += not calls.same_calls(made, by_question[question.key])
            progress("asking llama.cpp", done / len(prepared.asked))
    most = max(1, int(OTHER_CALLS[dtype] * len(prepared.asked)))
    what = f"{other} of {len(prepared.asked)} held-out questions have other calls than base + adapter"
    if other > most:
        raise McpLoraError(f"as {dtype} {what}, at most {most} may: mcp-lora export {run} --gguf f32", 1)
    return f"{what} (tolerance {most})"


def compare(config: Mapping[str, Any], adapter: Path, merged: Path) -> Comparison:
    """Compare the logits of base (named by `config`) + adapter with those of the merged model on PROMPT.

    Both are loaded in the merged model's dtype, one after the other, on the CPU, which needs no more memory
    than the export and takes seconds for one prompt.
    """
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    trusted = bool(config.get("trust_remote_code"))
    tokenizer = AutoTokenizer.from_pretrained(merged, trust_remote_code=trusted)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids

    def logits(model: Any) -> Any:
        with torch.inference_mode():
            return model.eval()(ids).logits.float()

    exported = AutoModelForCausalLM.from_pretrained(merged, dtype="auto", trust_remote_code=trusted)
    dtype, vocabulary = exported.dtype, exported.get_input_embeddings().weight.shape[0]
    after = logits(exported)
    del exported
    gc.collect()
    model = AutoModelForCausalLM.from_pretrained(
        str(config["model_name_or_path"]), dtype=dtype, **hub_arguments(config)
    )
    if vocabulary != model.get_input_embeddings().weight.shape[0]:  # resize_vocab
        model.resize_token_embeddings(vocabulary, mean_resizing=False)
    before = logits(PeftModel.from_pretrained(model, adapter))
    name = str(dtype).removeprefix("torch.")
    tolerance = TOLERANCE[name] * before.abs().max().item()
    return Comparison((before - after).abs().max().item(), tolerance, name)
