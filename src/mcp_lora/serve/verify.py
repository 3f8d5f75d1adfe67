"""How an export is checked: its logits, its prompts, and its answers to held-out questions."""

import gc
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mcp_lora.data import calls
from mcp_lora.data.rows import Progress
from mcp_lora.errors import McpLoraError
from mcp_lora.evaluate import evaluation, predict
from mcp_lora.evaluate.answers import Judge, Response
from mcp_lora.evaluate.evaluation import Request
from mcp_lora.evaluate.parity import parity
from mcp_lora.evaluate.questions import Question
from mcp_lora.prompts.chat_template import ChatTemplate
from mcp_lora.serve import llama_cpp
from mcp_lora.train import runs
from mcp_lora.train.machine import detect_machine, too_big

# The largest difference of a logit that merging may cause, relative to the largest logit: merged weights are
# rounded to the model's dtype, while a separate adapter is not.
TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2, "float16": 1e-2}
PROMPT = "Which tools can you call, and what time is it in Tokyo?"
# The fraction of the questions, at least one, that may be answered by other calls: where two tokens are about
# equally likely, rounding decides between them.
OTHER_CALLS = {"f32": 0.1, "f16": 0.1, "bf16": 0.1, "q8_0": 0.25}
_BATCH = 5  # questions that are asked at once on a CPU

_Ask = Callable[[Sequence[Question], int], Iterable[tuple[Question, Response]]]


@dataclass(frozen=True)
class Comparison:
    """The largest difference between logits, the tolerance for rounding, and the dtype."""

    difference: float
    tolerance: float
    dtype: str

    def __str__(self) -> str:
        what = f"in {self.dtype}: the largest difference of a logit is {self.difference:.2g}"
        return f"against base + adapter, {what} (tolerance {self.tolerance:.2g})"


def check_answers(
    request: Request, template: ChatTemplate, expected: _Ask, exported: _Ask, command: str, tolerance: float
) -> str:
    """Compare the calls of what is exported with those of base + adapter.

    Args:
        request: which held-out questions are asked.
        template: of the prompts, by which answers are parsed.
        expected: yields the answers of base + adapter, which the engine merges in memory, to questions, of a
            maximum number of tokens.
        exported: the same of what is exported.
        command: the command to run if they are not the same.
        tolerance: the fraction that may differ.

    Returns a message. Raises McpLoraError, with exit code 1, if more of them differ.
    """
    asked: list[Question] = []
    length, problem, right = 0, "", {}
    judge = Judge(template)
    try:
        prepared = evaluation.prepare(request)
        asked, length = prepared.asked, prepared.length
    except McpLoraError as error:
        problem = str(error)
    try:
        for question, response in expected(asked, length):
            right[question.key] = judge(question, response).calls
    except predict.NoRoomError:
        asked, problem = [], "the model does not fit into memory"
    made = {question.key: judge(question, response).calls for question, response in exported(asked, length)}
    if not asked:
        return f"warning: its answers are not compared ({problem})"
    other = sum(not calls.same_calls(made[key], one) for key, one in right.items())
    most = max(int(len(asked) > 1), int(tolerance * len(asked)))
    what = f"{other} of {len(asked)} held-out questions have other calls than base + adapter"
    if other > most:
        raise McpLoraError(f"{what}, at most {most} may, nothing is exported: {command}", 1)
    return f"{what} (tolerance {most})"


def is_slow(model: str, dtype: str) -> bool:
    """Tell whether asking a model would take hours: PyTorch emulates bf16 on a CPU that lacks it."""
    machine = detect_machine()
    emulated = dtype == "bfloat16" and not machine.bf16
    return not machine.gpus and (emulated or bool(too_big(model, machine)))


def by_engine(
    run: Path,
    template: ChatTemplate,
    adapter: Path | None,
    command: str,
    dtype: str = "",
    merged: Path | None = None,
) -> _Ask:
    """Let LLaMA-Factory answer on one GPU: base + adapter, or a merged model; in bf16 if `dtype` is that.

    `command` is the next command to run if it fails.
    """

    def answers(asked: Sequence[Question], length: int) -> Iterable[tuple[Question, Response]]:
        if not asked:
            return []
        settings = runs.serving_config(run, adapter) | {"bf16_full_eval": dtype == "bfloat16"}
        settings |= {"model_name_or_path": str(merged)} if merged else {}
        gpus = 1 if detect_machine().gpus else None
        settings |= {"max_new_tokens": length, "per_device_eval_batch_size": gpus or _BATCH}
        return predict.by_engine(asked, template, settings, gpus, command)

    return answers


def by_llama_cpp(
    template: ChatTemplate, served: tuple[Path, Path | None, str | None], progress: Progress
) -> _Ask:
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
