"""Export a run's adapter: merged, by itself, as GGUF or for Ollama, and check what is exported."""

import gc
import json
import os
import shlex
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mcp_lora.data import calls, files
from mcp_lora.engine import api, launch
from mcp_lora.engine.topology import Topology
from mcp_lora.errors import McpLoraError, explained
from mcp_lora.evaluate import evaluation, predict
from mcp_lora.evaluate.answers import Judge, Response
from mcp_lora.evaluate.parity import parity
from mcp_lora.evaluate.questions import Question
from mcp_lora.prompts import chat_template, render
from mcp_lora.prompts.chat_template import ChatTemplate
from mcp_lora.serve import llama_cpp
from mcp_lora.train import manifest, runs
from mcp_lora.train.machine import detect_machine, too_big

# The largest difference of a logit that merging may cause, relative to the largest logit: merged weights are
# rounded to the model's dtype, while a separate adapter is not.
TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2, "float16": 1e-2}
PROMPT = "Which tools can you call, and what time is it in Tokyo?"
# The fraction of the questions, at least one, that may be answered by other calls: where two tokens are about
# equally likely, rounding decides between them.
OTHER_CALLS = {"f32": 0.1, "f16": 0.1, "bf16": 0.1, "q8_0": 0.25}
# Model types whose chat template Ollama ignores (its server/create.go).
_RENDERED_BY_OLLAMA = ("gemma4", "laguna", "nemotron_h")
_QUESTIONS = 5  # of each split, to check an export with
_ADAPTER = ("adapter_*", "tokenizer*", "*.jinja", "special_tokens_map.json", "vocab.*", "merges.txt")

_Answers = Callable[[Sequence[Question], int], Iterable[tuple[Question, Response]]]


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
    ollama: bool = False,
    progress: Callable[[str, float], None] = lambda step, fraction: None,
) -> str:
    """Export a run's adapter into `output`, which appears only once it is complete and checked.

    Args:
        run: the run's folder.
        output: a folder, or with `gguf` alone a file.
        checkpoint: the checkpoint of the adapter; by default the newest.
        gguf: one of OTHER_CALLS, to write a GGUF file.
        adapter_only: without the base.
        ollama: write a folder with a GGUF file (by default f16) and a Modelfile for Ollama.
        progress: receives the fraction of the questions that a GGUF file has answered.

    Returns:
        A message on how it was checked.

    Raises McpLoraError if the run has no adapter, its base was quantized and is to be merged, `output`
    exists, or the engine or a converter fails; with exit code 1 if what is exported is not equivalent.
    """
    api.require()
    adapter = runs.adapter(run, checkpoint)
    words = ["--ollama"] * ollama
    again = shlex.join(["mcp-lora", "export", str(run), *words, "--output", "OTHER"])
    if runs.is_quantized(run) and not adapter_only:
        why = "was trained on a quantized base, and merging into it loses precision"
        raise McpLoraError(f"{run} {why}: mcp-lora export {run} --adapter-only")
    if output.exists():
        raise McpLoraError(f"{output} exists: {again}")
    config = runs.read_run(run)
    if ollama:
        check_ollama(run, adapter_only)
    template = chat_template.load(config)
    gguf = gguf or ("f16" if ollama else None)
    if gguf:
        llama_cpp.require()
        llama_cpp.converters()
    new = output.with_name(f".{output.name}.new")
    shutil.rmtree(new, ignore_errors=True)  # left by an export that was killed
    try:
        with explained(f"{output.parent} cannot be written", again):
            new.mkdir(parents=True)
        folder, file, base = new / "model", new / "model.gguf", new / "base.gguf"
        dtype = ""
        if adapter_only:
            copy_adapter(adapter, folder)
            note = "the adapter as it was trained"
        else:
            found = _merge(run, adapter, folder)
            note, dtype = str(found), found.dtype
        complete(folder, template, ollama)
        (folder / "README.md").write_text(model_card(run, adapter), encoding="utf-8")
        if gguf:
            if adapter_only:
                source = chat_template.model_folder(config)
                llama_cpp.convert_adapter(folder, source, file, gguf)
                llama_cpp.convert(source, base, gguf)
            else:
                llama_cpp.convert(folder, file, gguf)
            served = (base, file, template.frozen()) if adapter_only else (file, None, None)
            answers = _by_llama_cpp(template, served, progress)
            exact = f"mcp-lora export {run} --gguf f32"
            compared = _check_answers(run, adapter, template, answers, exact, OTHER_CALLS[gguf])
            note = f"the same prompts as in training; {compared}"
        elif not adapter_only and _is_slow(str(config["model_name_or_path"]), dtype):
            note += "; warning: its answers are not compared, as that would take long without a GPU"
        elif not adapter_only:
            note += f"; {_check_merged(run, adapter, template, folder, dtype)}"
        made = file if gguf else folder
        if ollama:
            made = new / "ollama"
            made.mkdir()
            file.rename(made / "model.gguf")
            (folder / "README.md").rename(made / "README.md")
            (made / "Modelfile").write_text(modelfile(template), encoding="utf-8")
        made.rename(output)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    return note


def push(name: str, exported: Path | None = None, card: str = "") -> str:
    """Create a private repository on the Hugging Face hub, or use one's own, and upload what was exported.

    Args:
        name: OWNER/NAME.
        exported: a folder, or a file that `card` describes; without it nothing is uploaded yet.
        card: the model card of a file.

    Returns:
        The repository's address. Raises McpLoraError if the hub rejects it or cannot be reached.
    """
    import httpx
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    hub = HfApi()
    try:
        address = str(hub.create_repo(name, private=True, exist_ok=True))
        if exported and exported.is_dir():
            hub.upload_folder(repo_id=name, folder_path=exported)
        elif exported:
            hub.upload_file(repo_id=name, path_or_fileobj=exported, path_in_repo=exported.name)
            hub.upload_file(repo_id=name, path_or_fileobj=card.encode(), path_in_repo="README.md")
    except (HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OSError, httpx.HTTPError) as error:
        what = f"{name} cannot be written on the hub ({' '.join(str(error).split())[:200]})"
        again = f"hf upload {name} {exported}" if exported else "mcp-lora export --push OWNER/NAME"
        raise McpLoraError(f"{what}: hf auth login, and {again}") from None
    return address


def copy_adapter(adapter: Path, folder: Path) -> None:
    """Copy an adapter and its tokenizer, without checkpoints and optimizer states, into a new folder."""
    folder.mkdir()
    for name in _ADAPTER:
        for file in adapter.glob(name):
            shutil.copy(file, folder)


def _merge(run: Path, adapter: Path, folder: Path) -> Comparison:
    """Let the engine merge an adapter into its base; return how the two compare."""
    settings = runs.serving_config(run, adapter) | {"export_dir": str(folder), "export_size": 1}
    settings |= {"template": render.TEMPLATE}  # which keeps the tokenizer's chat template
    gpus = detect_machine().gpus
    environment = launch.engine_environment(settings, Topology(gpus or 1), gpus, os.environ)
    outcome = launch.run_engine("export", settings, environment)
    if outcome.code:
        raise outcome.error(f"mcp-lora export {run}")
    # the engine's supports no tools, and uses the engine's template
    (folder / "Modelfile").unlink(missing_ok=True)
    found = compare(settings, adapter, folder)
    if found.difference > found.tolerance:
        raise McpLoraError(f"the merged model is not equivalent, nothing is exported ({found})", code=1)
    return found


def complete(folder: Path, template: ChatTemplate, firmly: bool = False) -> None:
    """Add what a server requires: the chat template, the tokens that end an answer, how calls are parsed.

    With `firmly` no request can change the arguments that the chat template was trained with.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / runs.CHAT_TEMPLATE).write_text(template.frozen(firmly), encoding="utf-8")
    ends = {*template.ends.values(), template.tokenizer.eos_token}
    ids = sorted(map(template.tokenizer.convert_tokens_to_ids, ends))
    _update(folder / "generation_config.json", {"eos_token_id": ids})
    if parsed := response_template(template):
        _update(folder / "tokenizer_config.json", {"response_template": parsed})


def _update(file: Path, changes: dict[str, Any]) -> None:
    content = files.load(file, "mcp-lora export") | changes
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def check_ollama(run: Path, adapter_only: bool) -> None:
    """Raise McpLoraError if Ollama would not serve a run's model as it was trained."""
    if adapter_only:
        raise McpLoraError(f"Ollama serves a merged model: mcp-lora export {run} --ollama")
    source = chat_template.model_folder(runs.read_run(run))
    kind = str(files.load(source / "config.json", "copy the model again").get("model_type"))
    if kind.startswith(_RENDERED_BY_OLLAMA):
        what = f"Ollama has prompts of its own for {kind}, which are not those of training"
        raise McpLoraError(f"{what}: mcp-lora export {run} --gguf f16, and mcp-lora serve FILE.gguf")


def modelfile(template: ChatTemplate) -> str:
    """Return the Modelfile for `model.gguf` in the same folder.

    It has no TEMPLATE, which is written in Go: without one Ollama, from 0.30, renders prompts by the file's
    own chat template (its llm/llama_server.go).
    """
    values = ["temperature 0", "repeat_penalty 1", f"num_ctx {llama_cpp.CONTEXT}"]
    values += [f'stop "{end}"' for end in sorted({*template.ends.values()})]
    lines = ["FROM ./model.gguf", "REQUIRES 0.30.0", *(f"PARAMETER {value}" for value in values)]
    return "\n".join(lines) + "\n"


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


def model_card(run: Path, adapter: Path) -> str:
    """Return a model card: the base, the data, the recipe, and the evaluation of this adapter of a run."""
    config, record = runs.read_run(run), manifest.read(run)
    base = str(config["model_name_or_path"])
    name = Path(base).name if Path(base).is_absolute() else base
    data = record.get("conversion") or {}
    evaluated, metrics = run / "eval" / evaluation.ASKED, {}
    if evaluated.is_file() and evaluated.read_text("utf-8") == runs.adapter_hash(adapter):
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
    lines.append("The prompt must contain the candidate tools, rendered by the chat template.")
    return "\n".join(lines) + "\n"


def _percent(found: Mapping[str, float]) -> str:
    return f"{100 * found['share']:.1f} ({100 * found['low']:.0f}…{100 * found['high']:.0f})"


def _check_answers(
    run: Path,
    adapter: Path,
    template: ChatTemplate,
    answers: _Answers,
    command: str,
    tolerance: float,
    dtype: str = "",
) -> str:
    """Compare the calls of what is exported with those of base + adapter, which the engine merges in memory.

    Args:
        answers: yields the answers to questions, of a maximum number of tokens, of what is exported.
        command: the command to run if they are not the same.
        tolerance: the fraction that may differ.
        dtype: see `_by_engine`.
    """
    request = evaluation.Request(run, limit=_QUESTIONS)
    asked: list[Question] = []
    length, problem, expected = 0, "", {}
    judge = Judge(template)
    try:
        prepared = evaluation.prepare(request)
        asked, length = prepared.asked, prepared.length
    except McpLoraError as error:
        problem = str(error)
    try:
        for question, response in _by_engine(run, template, adapter, dtype)(asked, length):
            expected[question.key] = judge(question, response).calls
    except predict.NoRoomError:
        asked, problem = [], "the model does not fit into memory"
    made = {question.key: judge(question, response).calls for question, response in answers(asked, length)}
    if not asked:
        return f"warning: its answers are not compared ({problem})"
    other = sum(not calls.same_calls(made[key], right) for key, right in expected.items())
    most = max(int(len(asked) > 1), int(tolerance * len(asked)))
    what = f"{other} of {len(asked)} held-out questions have other calls than base + adapter"
    if other > most:
        raise McpLoraError(f"{what}, at most {most} may, nothing is exported: {command}", 1)
    return f"{what} (tolerance {most})"


def _is_slow(model: str, dtype: str) -> bool:
    """Tell whether asking a model would take hours: PyTorch emulates bf16 on a CPU that lacks it."""
    machine = detect_machine()
    emulated = dtype == "bfloat16" and not machine.bf16
    return not machine.gpus and (emulated or bool(too_big(model, machine)))


def _check_merged(run: Path, adapter: Path, template: ChatTemplate, folder: Path, dtype: str) -> str:
    """Compare the calls of a merged model, whose dtype is `dtype`, in a folder."""
    answers = _by_engine(run, template, None, dtype, folder)
    again = f"mcp-lora export {run} --adapter-only"
    return _check_answers(run, adapter, template, answers, again, OTHER_CALLS["bf16"], dtype)


def _by_engine(
    run: Path, template: ChatTemplate, adapter: Path | None, dtype: str, merged: Path | None = None
) -> _Answers:
    """Let LLaMA-Factory answer on one GPU: base + adapter, or a merged model; in bf16 if `dtype` is that."""

    def answers(asked: Sequence[Question], length: int) -> Iterable[tuple[Question, Response]]:
        if not asked:
            return []
        settings = runs.serving_config(run, adapter) | {"bf16_full_eval": dtype == "bfloat16"}
        settings |= {"model_name_or_path": str(merged)} if merged else {}
        gpus = 1 if detect_machine().gpus else None
        settings |= {"max_new_tokens": length, "per_device_eval_batch_size": gpus or _QUESTIONS}
        return predict.by_engine(asked, template, settings, gpus, f"mcp-lora export {run}")

    return answers


def _by_llama_cpp(
    template: ChatTemplate,
    served: tuple[Path, Path | None, str | None],
    progress: Callable[[str, float], None],
) -> _Answers:
    """Let llama.cpp answer, once its prompts are those of training.

    `served` are the model, and an adapter and a chat template that are not in it. It answers freely, token by
    token, while llama.cpp binds the answer to a request with tools to their schemas.
    """

    def answers(asked: Sequence[Question], length: int) -> Iterable[tuple[Question, Response]]:
        longest = max((len(template.ids(question.prompt)) for question in asked), default=0)
        with llama_cpp.running(*served, context=max(llama_cpp.CONTEXT, longest + length)) as url:
            if differences := parity(url, template).differences:
                what = "the GGUF file's prompts are not those of training, nothing is exported"
                raise McpLoraError(f"{what}: {'; '.join(differences)}", 1)
            for done, question in enumerate(asked, 1):
                tokens = llama_cpp.complete(url, template.ids(question.prompt), length)
                answer = template.without_end(template.tokenizer.decode(tokens))
                yield question, Response(question.prompt, answer, [])
                progress("asking llama.cpp", done / len(asked))

    return answers


def compare(config: Mapping[str, Any], adapter: Path, merged: Path) -> Comparison:
    """Compare the logits of base (named by `config`) + adapter with those of the merged model on PROMPT.

    Both are loaded in the merged model's dtype, one after the other, on the CPU, which needs no more memory
    than the export and takes seconds for one prompt.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    trusted = bool(config.get("trust_remote_code"))
    tokenizer = AutoTokenizer.from_pretrained(merged, trust_remote_code=trusted)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids

    def logits(model: Any) -> Any:
        with torch.inference_mode():
            return model(ids).logits.float()

    exported = AutoModelForCausalLM.from_pretrained(merged, dtype="auto", trust_remote_code=trusted)
    dtype, vocabulary = exported.dtype, exported.get_input_embeddings().weight.shape[0]
    after = logits(exported)
    del exported
    gc.collect()
    before = logits(runs.loaded(config, adapter, vocabulary, dtype=dtype))
    name = str(dtype).removeprefix("torch.")
    tolerance = TOLERANCE[name] * before.abs().max().item()
    return Comparison((before - after).abs().max().item(), tolerance, name)
