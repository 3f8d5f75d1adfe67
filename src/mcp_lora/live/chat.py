"""Chat with a run's adapter and candidate tools: those of live MCP servers are run, others are shown.

A transcript has one conversation on each line, which `convert` reads as data:

    {"messages": [{"role": "user", "content": "What time is it in Oslo?"}, {"role": "assistant", …}],
     "tools": [{"name": "get_current_time", …}]}
"""

import json
import os
import re
from bisect import bisect_right
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from mcp_lora.data import dataset
from mcp_lora.data.calls import call_of, split_thought
from mcp_lora.data.records import Tool, ToolCall
from mcp_lora.data.rows import SYSTEM_MESSAGE
from mcp_lora.engine import api
from mcp_lora.errors import McpLoraError, explained, one_line
from mcp_lora.evaluate.evaluation import Endpoint
from mcp_lora.evaluate.predict import KEY, asking
from mcp_lora.live.connections import Connection
from mcp_lora.prompts import chat_template
from mcp_lora.prompts.chat_template import ChatTemplate, calling
from mcp_lora.train import runs

Message = dict[str, Any]
# Returns the text and the calls of an answer to the messages so far, with candidate tools.
Answer = Callable[[list[Message], list[Any]], tuple[str, list[ToolCall]]]

_ANSWER = 1024  # tokens
_ROOM = 256  # tokens that tools leave for the answer in cutoff_len
_STEPS = 8  # answers with calls to one message
_RESULT = 4000  # characters


class Chat:
    """Conversations with a run's adapter, one after the other.

    Args:
        run: the run's folder.
        answer: the adapter, `here` or `by_endpoint`.
        servers: whose tools are run.
        tools: those that are only shown.
        confirm: decides whether a call is run, by the server, the tool's name and the arguments.
        show: receives who says something (assistant, call, result, note), and the text.
        transcript: the file that conversations are appended to.
    """

    def __init__(
        self,
        run: Path,
        answer: Answer,
        servers: Sequence[Connection],
        tools: Sequence[Tool],
        confirm: Callable[[Connection, str, dict[str, Any]], bool],
        show: Callable[[str, str], None],
        transcript: Path | None = None,
    ) -> None:
        self._answer, self._confirm, self._show, self._transcript = answer, confirm, show, transcript
        config = runs.read_run(run)
        self._template = chat_template.load(config)
        self._limit = int(api.number(config, "cutoff_len", 2048))
        self._tools = dict[str, tuple[Tool, Connection | None]]()
        live = [(tool, server) for server in servers for tool in server.tools.values()]
        for tool, server in [*live, *((tool, None) for tool in tools)]:
            if tool.name in self._tools:
                show("note", f"{tool.name} of {tool.server} is left out: another tool has its name")
            else:
                self._tools[tool.name] = tool, server
        self._system: list[Message] = [{"role": "system", "content": SYSTEM_MESSAGE}]
        with suppress(McpLoraError, StopIteration):  # the data may be on another machine
            first = next(dataset.samples(Path(config["dataset_dir"]), "train"))["messages"][0]
            self._system = [first] if first["role"] == "system" else []
        self._start = self._end = 0
        self.clear()

    def clear(self) -> None:
        """Start a new conversation."""
        self._messages = list(self._system)
        if self._transcript and self._transcript.is_file():
            self._start = self._end = self._transcript.stat().st_size

    def say(self, text: str) -> None:
        """Put a message to the adapter, and run what it calls until it answers, or a call is not run.

        If it raises, the conversation is as before, unless a tool has been run that may have changed
        something: on an interruption, or a McpLoraError if the model, the template or a server fails.
        """
        before, self._has_changed = list(self._messages), False
        try:
            self._messages.append({"role": "user", "content": text})
            tools = self._fitting(text)
            for _ in range(_STEPS):
                said, calls = self._answer(self._messages, tools)
                message: Message = {"role": "assistant"}
                if calls:
                    message = calling(calls, len(self._messages))
                self._messages.append(message | {"content": said or (None if calls else "")})
                if said or not calls:
                    self._show("assistant", said)
                ids = [one["id"] for one in message.get("tool_calls", ())]
                has_result = [self._run(call, key) for call, key in zip(calls, ids, strict=True)]
                if not (calls and all(has_result)):
                    break
            else:
                self._show("note", f"stopped after {_STEPS} answers with calls")
        except BaseException:
            if not self._has_changed:
                self._messages = before
            raise
        finally:
            if len(self._messages) > len(before):
                self._write()

    def _run(self, call: ToolCall, key: str) -> bool:
        """Run a call, if its tool is live and it is confirmed; tell whether there is a result."""
        self._show("call", f"{call.name} {json.dumps(call.arguments, ensure_ascii=False)}")
        result: Message = {"role": "tool", "tool_call_id": key, "content": "not run"}
        self._messages.append(result)
        _, server = self._tools.get(call.name, (None, None))
        if call.name not in self._tools:
            result |= {"content": f"there is no tool {call.name}", "is_error": True}
        elif not server or not self._confirm(server, call.name, call.arguments):
            self._show("note", "not run")
            return False
        else:
            self._has_changed |= call.name not in server.read_only
            found = server.call(call.name, call.arguments)
            result |= {"content": found.text[:_RESULT]} | ({"is_error": True} if found.is_error else {})
        self._show("result", result["content"])
        return True

    def _fitting(self, text: str) -> list[Any]:
        """Return the tools that fit into a prompt of training: all, or those closest to the message.

        One is returned in any case, as the adapter was always trained with tools.
        """
        ranked = [tool for tool, _ in self._tools.values()]

        def candidates(count: int) -> list[Any]:
            return [{"type": "function", "function": tool.function} for tool in ranked[:count]]

        def tokens(count: int) -> int:
            return len(_rendered(self._template, self._messages, candidates(count)))

        most = self._limit - _ROOM
        if tokens(len(ranked)) <= most:
            return candidates(len(ranked))
        ranked = _ranked(text, ranked)
        count = bisect_right(range(len(ranked) + 1), most, key=tokens) - 1
        if count < 1:
            what = f"no tool fits into cutoff_len {self._limit}, {ranked[0].name} is used alone"
            self._show("note", f"{what}: /clear starts anew")
            return candidates(1)
        names = ", ".join(tool.name for tool in ranked[:count])
        self._show("note", f"{count} of {len(ranked)} tools fit into cutoff_len {self._limit}: {names}")
        return candidates(count)

    def _write(self) -> None:
        """Write the conversation so far as the last line of the transcript, if it is still the last."""
        if not self._transcript:
            return
        tools = [tool.function for tool, _ in self._tools.values()]
        line = json.dumps({"messages": self._messages, "tools": tools}, ensure_ascii=False) + "\n"
        again = "mcp-lora chat --transcript OTHER"
        with explained(f"{self._transcript} cannot be written", again), self._transcript.open("ab+") as file:
            if file.tell() != self._end:  # another chat has written
                self._start = file.tell()
            file.truncate(self._start)
            file.seek(max(0, self._start - 1))
            joined = "" if file.read(1) in (b"", b"\n") else "\n"
            file.write((joined + line).encode("utf-8", "replace"))
            self._end = file.tell()


def _ranked(text: str, tools: Sequence[Tool]) -> list[Tool]:
    """Return tools with those first whose names and descriptions are closest to a text, by BM25."""
    import bm25s

    def words(text: str) -> list[str]:
        return re.findall(r"[a-z]+|\d+|[^\W\d_]", text.lower()) or [""]

    index = bm25s.BM25()
    index.index([words(f"{tool.name} {tool.description}") for tool in tools], show_progress=False)
    scores = index.get_scores(words(text))
    return [tools[place] for place in sorted(range(len(tools)), key=lambda place: -scores[place])]


def _rendered(template: ChatTemplate, messages: Sequence[Message], tools: Sequence[Any]) -> list[int]:
    """Return the token ids of a prompt; raise a McpLoraError if the template rejects it."""
    try:
        return template.ids(template.prompt(messages, tools))
    except Exception as error:  # templates raise any exception
        raise McpLoraError(
            f"the chat template rejects this ({one_line(error)}): /clear starts anew"
        ) from None


def here(run: Path, checkpoint: str | None) -> Answer:
    """Load a run's adapter; return a function that lets it answer greedily.

    Raises McpLoraError if there is no adapter, and any exception of the engine if it cannot be loaded.
    """
    import torch

    os.environ["LLAMAFACTORY_VERBOSITY"] = "WARN"  # the conversation is what matters
    template = chat_template.load(runs.read_run(run))
    model = api.loaded(runs.serving_config(run, runs.adapter(run, checkpoint)))
    context = getattr(model.config, "max_position_embeddings", 1 << 20)
    ends = template.tokenizer.convert_tokens_to_ids([*template.ends.values(), template.tokenizer.eos_token])

    def answer(messages: list[Message], tools: list[Any]) -> tuple[str, list[ToolCall]]:
        prompt = _rendered(template, messages, tools)
        if (room := context - len(prompt)) < 1:
            raise McpLoraError(f"the model's context of {context} tokens is full: /clear starts anew")
        ids = torch.tensor([prompt], device=model.device)
        options = {"do_sample": False, "max_new_tokens": min(_ANSWER, room), "eos_token_id": ends}
        try:
            with torch.inference_mode():
                output = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
        except RuntimeError as error:  # out of memory
            raise McpLoraError(f"the model cannot answer ({one_line(error)}): /clear starts anew") from None
        text = template.tokenizer.decode(output[0, len(prompt) :])
        found = template.read(text, chat_template.schemas(tools))
        return (found.content if found.calls else template.without_end(text)).strip(), found.calls

    return answer


def by_endpoint(run: Path, endpoint: Endpoint, say: Callable[[str], None] = lambda text: None) -> Answer:
    """Return a function that asks an OpenAI-compatible server, which has a run's adapter."""
    from openai import OpenAI

    client = OpenAI(base_url=endpoint.url, api_key=os.environ.get(KEY, "none"))
    ask = asking(client, endpoint.model, chat_template.load(runs.read_run(run)), say)

    def answer(messages: list[Message], tools: list[Any]) -> tuple[str, list[ToolCall]]:
        try:
            found = ask(messages, tools)
            if found.failed == "no reply":
                raise ValueError(found.text)
            calls = [read for call in found.tool_calls if (read := call_of(call["name"], call["arguments"]))]
            if len(calls) < len(found.tool_calls):
                raise ValueError("a call has no name, or its arguments are not a JSON object")
        except Exception as error:  # any exception is possible
            what = f"{endpoint.url} does not answer as it should ({one_line(error)})"
            raise McpLoraError(f"{what}: is it running, is the key in {KEY}?") from None
        return split_thought(found.text)[0].strip(), calls

    return answer
