r"""Ask the base model and the adapter the held-out questions, with LLaMA-Factory's prediction.

The engine writes generated_predictions.jsonl, in the order of the questions; one line:

    {"prompt": "…", "predict": "<tool_call>\n{\"name\": \"get-sum\", …}\n</tool_call>", "label": "…"}
"""

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mcp_lora import dataset, engine, files, launch, runs
from mcp_lora.config import Machine
from mcp_lora.errors import McpLoraError
from mcp_lora.records import ToolCall
from mcp_lora.scoring import Figures, judge, summarise
from mcp_lora.world import World


@dataclass(frozen=True)
class Answer:
    """One held-out question with the right call and what each model said ("base", "adapter")."""

    instruction: str
    expected: list[ToolCall]
    said: dict[str, str]
    exact: dict[str, bool]


@dataclass(frozen=True)
class Evaluation:
    """Figures per model and every answer."""

    figures: dict[str, Figures]
    answers: list[Answer]


def evaluate(run: Path, checkpoint: str | None, machine: Machine, batch: int = 16) -> Evaluation:
    """Answer a run's held-out questions greedily, with the base model and with the adapter.

    Writes RUN/eval/metrics.json and, per model, the engine's files.

    Raises:
        McpLoraError: there is no adapter or nothing is held out, or the engine fails.
    """
    config = runs.read_run(run)
    folder = Path(config["dataset_dir"])
    questions = dataset.questions(folder)
    if not questions:
        raise McpLoraError(
            f"{folder} holds no held-out questions: mcp-lora convert --test 0.1 --out {folder}"
        )
    models = {
        "base": runs.serving_config(run, None),
        "adapter": runs.serving_config(run, runs.adapter(run, checkpoint)),
    }
    settings = {
        "stage": "sft",
        "do_predict": True,
        "predict_with_generate": True,
        "do_sample": False,  # the engine samples at temperature 0.95 by default
        "max_new_tokens": _answer_length(models["base"], [calls for _, calls in questions]),
        "dataset_dir": str(folder),
        "eval_dataset": dataset.TEST,
        "cutoff_len": config.get("cutoff_len", 4096),
        "per_device_eval_batch_size": batch,
        "use_cpu": not machine.gpus,
        "report_to": "none",
    }
    said = {
        name: _predict(serving | settings, run / "eval" / name, machine) for name, serving in models.items()
    }
    verdicts: dict[str, list[Any]] = {
        name: [
            judge(expected, engine.extract_calls(text, config["template"], config.get("tool_format")))
            for (_, expected), text in zip(questions, texts, strict=True)
        ]
        for name, texts in said.items()
    }
    figures = {name: summarise(found) for name, found in verdicts.items()}
    answers = [
        Answer(
            instruction,
            expected,
            {name: texts[i] for name, texts in said.items()},
            {name: found[i].exact for name, found in verdicts.items()},
        )
        for i, (instruction, expected) in enumerate(questions)
    ]
    metrics = json.dumps({name: asdict(found) for name, found in figures.items()}, indent=2)
    (run / "eval" / "metrics.json").write_text(metrics + "\n", encoding="utf-8")
    return Evaluation(figures, answers)


def _answer_length(serving: dict[str, Any], answers: list[list[ToolCall]]) -> int:
    """Return how many tokens an answer may have: those of the longest right one, and room for its
    markup. A model that does not stop need not be waited for any longer.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(
        serving["model_name_or_path"], trust_remote_code=serving.get("trust_remote_code", False)
    )
    lengths = [
        sum(len(tokenizer.encode(json.dumps(call._asdict(), ensure_ascii=False))) + 32 for call in calls)
        for calls in answers
    ]
    return max(lengths)


def _predict(settings: dict[str, Any], output: Path, machine: Machine) -> list[str]:
    """Let the engine answer the held-out questions and return its answers in their order."""
    shutil.rmtree(output, ignore_errors=True)
    file = runs.write_config(output, settings | {"output_dir": str(output)})
    # One process: ranks would share the questions out and put the answers in another order.
    environment = launch.engine_environment(settings, World(), machine.gpus, os.environ)
    environment["LLAMAFACTORY_VERBOSITY"] = "WARN"  # the table is what counts here
    outcome = launch.run(launch.engine_argv("train", file), environment)
    if outcome.code:
        raise outcome.error(f"mcp-lora eval {output.parent.parent}")
    return [row["predict"] for row in files.read(output / "generated_predictions.jsonl")]
