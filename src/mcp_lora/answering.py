r"""Put questions to a model: through LLaMA-Factory's prediction, or to a server of OpenAI's protocol.

The engine writes generated_predictions.jsonl, in the order of the questions; one line:

    {"prompt": "…", "predict": "<tool_call>\n{\"name\": \"get-sum\", …}\n</tool_call>", "label": "…"}
"""

import json
import os
import queue
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mcp_lora import dataset, files, launch, runs
from mcp_lora.answers import Said
from mcp_lora.config import Machine
from mcp_lora.errors import McpLoraError
from mcp_lora.questions import Question
from mcp_lora.world import World

# An engine's start costs up to a minute, and what it has not written down is lost when it is interrupted.
CHUNK = 1000
KEY = "OPENAI_API_KEY"
_RETRIES = 5  # of a server that fails for the moment; the pauses grow
_DATASET = "questions"


def by_engine(
    questions: Sequence[Question], settings: dict[str, Any], machine: Machine, command: str
) -> Iterator[tuple[Question, Said]]:
    """Let LLaMA-Factory answer, greedily, in batches of questions of like length.

    Args:
        questions: in any order.
        settings: its keys: model, adapter, template, max_new_tokens, batch.
        machine: where it runs.
        command: what to run again after a failure.

    Raises:
        McpLoraError: the engine fails.
    """
    longest_first = sorted(questions, key=lambda question: -len(json.dumps(question.sample)))
    for start in range(0, len(questions), CHUNK):
        chunk = longest_first[start : start + CHUNK]
        with tempfile.TemporaryDirectory(prefix="mcp-lora-") as place:
            folder = Path(place)
            dataset.write(folder, _DATASET, [question.sample for question in chunk])
            output = folder / "answers"
            file = runs.write_config(
                folder,
                settings
                | {
                    "stage": "sft",
                    "do_predict": True,
                    "predict_with_generate": True,
                    "do_sample": False,  # the engine samples at temperature 0.95 by default
                    "dataset_dir": str(folder),
                    "eval_dataset": _DATASET,
                    "use_cpu": not machine.gpus,
                    "report_to": "none",
                    "output_dir": str(output),
                },
            )
            # One process: ranks would share the questions out and put the answers in another order.
            environment = launch.engine_environment(settings, World(), machine.gpus, os.environ)
            environment["LLAMAFACTORY_VERBOSITY"] = "WARN"  # the tables are what counts here
            outcome = launch.run(launch.engine_argv("train", file), environment)
            if outcome.code:
                raise outcome.error(command)
            rows: list[Any] = list(files.read(output / "generated_predictions.jsonl"))
        for question, row in zip(chunk, rows, strict=True):
            yield question, Said(row["prompt"], row["predict"], [])


def by_endpoint(
    questions: Sequence[Question], url: str, model: str, max_tokens: int, at_once: int = 8
) -> Iterator[tuple[Question, Said]]:
    """Ask a server that speaks OpenAI's chat protocol, several questions at once, in the order of answers.

    The key is OPENAI_API_KEY of the environment, if the server wants one. What fails for the moment is
    tried again.

    Args:
        url: up to and with /v1.
        model: its name there.
        max_tokens: that an answer may have.
        at_once: questions under way.

    Raises:
        McpLoraError: the server cannot be reached, or refuses.
    """
    from openai import APIError, OpenAI

    client = OpenAI(base_url=url, api_key=os.environ.get(KEY, "none"), max_retries=_RETRIES)
    answers: queue.SimpleQueue[tuple[Question, Said] | None] = queue.SimpleQueue()
    failures: list[Exception] = []
    over = threading.Event()
    left = iter(questions)

    def ask(question: Question) -> Said:
        messages = _messages(question)
        answer = client.chat.completions.create(
            model=model, messages=messages, tools=_tools(question), temperature=0, max_tokens=max_tokens
        )
        message = answer.choices[0].message
        calls = [
            {"name": _whole(call.function.name), "arguments": _whole(call.function.arguments)}
            for call in message.tool_calls or []
            if call.type == "function"
        ]
        return Said(json.dumps(messages, ensure_ascii=False), _whole(message.content or ""), calls)

    def work() -> None:
        """Ask one question after another, until there is none left or one has failed."""
        try:
            for question in left:
                if over.is_set():
                    break
                answers.put((question, ask(question)))
        except Exception as error:
            failures.append(error)
            over.set()  # what the others are asking is waited for, and kept
        finally:
            answers.put(None)

    # Daemons, as nobody who interrupts wants to wait for a server that does not answer.
    for _ in range(at_once):
        threading.Thread(target=work, daemon=True).start()
    working = at_once
    try:
        while working:
            if answer := answers.get():
                yield answer
            else:
                working -= 1
    finally:
        over.set()
    client.close()
    if failures and not isinstance(failures[0], APIError):
        raise failures[0]
    if failures:
        raise McpLoraError(
            f"{url} does not answer ({' '.join(str(failures[0]).split())}): is it running, is {model} its "
            f"model, is the key in {KEY}? What it has answered is kept: mcp-lora eval --endpoint {url} "
            f"--model {model}"
        )


def _whole(text: str) -> str:
    """Return a text without half surrogate pairs, which JSON can hold and a file cannot."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _messages(question: Question) -> Any:
    roles = {"human": "user", "gpt": "assistant"}
    turns = [
        {"role": roles[turn["from"]], "content": turn["value"]}
        for turn in question.sample["conversations"][:-1]
    ]
    return [{"role": "system", "content": question.sample["system"]}, *turns]


def _tools(question: Question) -> Any:
    return [
        {
            "type": "function",
            "function": {"name": tool.name, "description": tool.description, "parameters": tool.parameters},
        }
        for tool in question.tools.values()
    ]
