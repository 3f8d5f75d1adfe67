r"""Put questions to a model: with LLaMA-Factory's prediction, or at an OpenAI-compatible server.

The engine writes generated_predictions.jsonl, in the order of the questions; one line:

    {"prompt": "…", "predict": "<tool_call>\n{\"name\": \"get-sum\", …}\n</tool_call>", "label": "…"}
"""

import json
import os
import shlex
import tempfile
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

from mcp_lora.data import files
from mcp_lora.engine import launch
from mcp_lora.engine.topology import find as find_topology
from mcp_lora.errors import McpLoraError, one_line
from mcp_lora.evaluate.answers import Response
from mcp_lora.evaluate.questions import Question
from mcp_lora.prompts import render
from mcp_lora.prompts.chat_template import ChatTemplate
from mcp_lora.train.machine import detect_machine

# Starting the engine takes up to a minute, and an interruption loses the answers of the current chunk.
CHUNK = 1000
KEY = "OPENAI_API_KEY"
_AT_ONCE = 8  # concurrent requests to a server
_BATCH = "per_device_eval_batch_size"
RETRIES = 5  # after temporary failures of a server, with exponential backoff


class NoRoomError(McpLoraError):
    """The model does not fit into memory."""


def by_engine(
    questions: Sequence[Question],
    template: ChatTemplate,
    settings: dict[str, Any],
    gpus: int | None,
    command: str,
) -> Generator[tuple[Question, Response]]:
    """Let LLaMA-Factory answer greedily, in batches of questions of similar length.

    It receives the token ids of each prompt, as in training (see mcp_lora.prompts.render).

    Args:
        questions: rendered, in any order.
        template: the model's chat template.
        settings: its keys: the model's settings, adapter, max_new_tokens, batch size.
        gpus: number of GPUs that the questions are sharded across; by default all.
        command: the command to run again after a failure.

    Raises NoRoomError if memory runs out for a single question, McpLoraError if the engine fails otherwise.
    """
    visible = detect_machine().gpus
    # what a shell has left (NPROC_PER_NODE) counts only on a CPU, where it is the one way to say so
    topology = find_topology(
        {} if visible else os.environ, visible, gpus, nodes=1, node_rank=0, command=command
    )
    encoded = [(one, template.ids(one.prompt), template.ids(one.target)) for one in questions]
    longest_first = sorted(encoded, key=lambda one: -len(one[1]))
    for start in range(0, len(questions), CHUNK):
        chunk = longest_first[start : start + CHUNK]
        with tempfile.TemporaryDirectory(prefix="mcp-lora-") as place:
            folder = Path(place)
            render.write(folder / "prompts", [(prompt, target) for _, prompt, target in chunk])
            config = settings | {
                "model_name_or_path": template.stopping_model(settings, folder / "model"),
                "stage": "sft",
                "do_predict": True,
                "predict_with_generate": True,
                "do_sample": False,  # the engine samples at temperature 0.95 by default
                "skip_special_tokens": False,  # keeps [TOOL_CALLS] and the like in the output
                "template": render.TEMPLATE,
                "eval_dataset": "questions",  # the engine requires a name, and reads tokenized_path
                "tokenized_path": str(folder / "prompts"),
                "use_cpu": not visible,
                "report_to": "none",
                "output_dir": str(folder / "answers"),
            }
            environment = launch.engine_environment(settings, topology, visible, os.environ)
            environment["LLAMAFACTORY_VERBOSITY"] = "WARN"  # the tables are the output that matters
            # a log also takes the engine's stdout, which would be between our results
            log = folder / "engine.log"
            predicted = folder / "answers" / "generated_predictions.jsonl"
            while (outcome := launch.run_engine("train", config, environment, log=log)).code:
                if outcome.aborted_at_exit and predicted.is_file():
                    break
                if not outcome.out_of_memory:
                    raise outcome.error(command)
                if (size := config[_BATCH]) == 1:
                    raise NoRoomError(str(outcome.error(command)), outcome.code)
                config[_BATCH] = settings[_BATCH] = size // 2
            rows: list[Any] = list(files.read(predicted))
        for (question, *_), row in zip(chunk, rows, strict=True):
            text = template.without_end(row["predict"])
            # the end and padding tokens may be the same, so only the length shows truncation
            cut = len(template.ids(text)) >= settings["max_new_tokens"]
            yield question, Response(question.prompt, text, [], "cut off" if cut else None)


def by_endpoint(
    questions: Sequence[Question],
    url: str,
    model: str,
    max_tokens: int,
    template: ChatTemplate,
    command: str,
    say: Callable[[str], None] = lambda text: None,
) -> Generator[tuple[Question, Response]]:
    """Ask an OpenAI-compatible server several questions at once; yield answers in the order of arrival.

    The API key is OPENAI_API_KEY in the environment, if the server requires one. Temporary failures are
    retried.

    Args:
        url: the base URL, including /v1.
        model: its name on the server.
        max_tokens: tokens per answer.
        template: the model's chat template (see `asking`).
        command: the command to run again after a failure, without the server's options.
        say: logs a warning.

    Raises McpLoraError if the server cannot be reached, or rejects a request.
    """
    from openai import OpenAI

    client = OpenAI(base_url=url, api_key=os.environ.get(KEY, "none"), max_retries=RETRIES)
    reply = asking(client, model, template, say)
    failures: list[Exception] = []

    def ask(question: Question) -> tuple[Question, Response] | None:
        if failures:  # requests in flight are completed and kept, but no new ones are sent
            return None
        messages, tools = question.sample["messages"][:-1], question.sample["tools"]
        try:
            return question, reply(messages, tools, max_tokens=max_tokens)
        except Exception as error:  # any exception is possible
            failures.append(error)
            return None

    # Its threads are daemons, so that an interruption does not wait for a hanging server.
    with client, ThreadPool(_AT_ONCE) as pool:
        yield from filter(None, pool.imap_unordered(ask, questions))
    if failures:
        what = f"{url} does not answer ({one_line(failures[0])}): is it running, is {model} its "
        what += f"model, is the key in {KEY}? Its answers so far are kept"
        raise McpLoraError(f"{what}: {command} {shlex.join(['--endpoint', url, '--endpoint-model', model])}")


def asking(
    client: Any, model: str, template: ChatTemplate, say: Callable[[str], None]
) -> Callable[..., Response]:
    """Return a function that asks a server as `asked` does, greedily and with a chat template's arguments.

    A hosted model may reject the arguments: `say` logs a warning, and they are left out from then on.
    """
    from openai import BadRequestError, UnprocessableEntityError

    arguments = [{"chat_template_kwargs": template.server_arguments}] if template.server_arguments else []

    def ask(*words: Sequence[Any], **more: Any) -> Response:
        sent = next(iter(arguments), None)
        try:
            return asked(client, model, *words, temperature=0, extra_body=sent, **more)[0]
        except (BadRequestError, UnprocessableEntityError):
            if not sent:
                raise
            found = asked(client, model, *words, temperature=0, **more)[0]
            with suppress(IndexError):  # another thread has noticed it, too
                arguments.pop()
                say(f"warning: {client.base_url} rejects chat_template_kwargs: prompts differ from training")
            return found

    return ask


def asked(
    client: Any, model: str, messages: Sequence[Any], tools: Sequence[Any] = (), **more: Any
) -> tuple[Response, list[int]]:
    """Ask a server once; return its reply, which may be malformed, and the tokens of prompt and answer.

    Raises any exception of the openai client, or of an unusual reply.
    """
    from openai import omit

    reply = client.chat.completions.with_raw_response.create(
        model=model, messages=messages, tools=tools or omit, **more
    )
    used = [0, 0]
    with suppress(LookupError, TypeError, ValueError, RecursionError):
        usage = json.loads(reply.text)["usage"]
        used = [int(usage[key]) for key in ("prompt_tokens", "completion_tokens")]
    return _parsed(json.dumps(messages, ensure_ascii=False), reply.text), used


def _parsed(prompt: str, body: str) -> Response:
    """Parse a chat completion, which may be malformed."""
    try:
        # A lone surrogate, which is valid in JSON but not in a file, becomes a question mark.
        reply = json.loads(json.dumps(json.loads(body), ensure_ascii=False).encode("utf-8", "replace"))
        (choice, *_) = reply["choices"]
        message = choice["message"]
        made = [call["function"] for call in message.get("tool_calls") or [] if call.get("function")]
        calls = [{"name": str(call["name"]), "arguments": call.get("arguments") or {}} for call in made]
        text = message.get("content") or ""
        if isinstance(text, list):
            text = "".join(str(part.get("text", "")) for part in text)
        thought = message.get("reasoning_content") or message.get("reasoning") or ""
        cut = choice.get("finish_reason") == "length"
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError):
        return Response(prompt, body[:1000], [], "no reply")
    if thought:  # without an answer, it may contain a call
        text = f"<think>\n{thought}\n</think>\n\n{text}" if text or calls else thought
    return Response(prompt, str(text), calls, "cut off" if cut else None)
