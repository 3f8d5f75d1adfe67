"""Chat with a run's adapter, which is offered tools: those of live MCP servers are run, others are shown.

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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mcp_lora.data import dataset
from mcp_lora.data.records import Tool
from mcp_lora.data.rows import SYSTEM_MESSAGE
from mcp_lora.engine import api
from mcp_lora.errors import McpLoraError, explained
from mcp_lora.evaluate.evaluation import Endpoint
from mcp_lora.evaluate.predict import KEY
from mcp_lora.live.connections import Connection, reason
from mcp_lora.prompts import chat_template
from mcp_lora.prompts.chat_template import ChatTemplate
from mcp_lora.train import runs

Message = dict[str, Any]
Answer = Callable[[list[Message], list[Any]], Message]  # to the messages so far and the candidate tools

_ANSWER = 1024  # tokens
_ROOM = 256  # tokens that tools leave for the answer in cutoff_len
_STEPS = 8  # answers with calls to one message
_RESULT = 4000  # characters


@dataclass(frozen=True)
class Request:
    """What is chatted with, and how.

    Attributes:
        run: the run's folder.
        checkpoint: the checkpoint of the adapter; by default the newest.
        endpoint: a server that has the adapter; by default it is loaded here.
        tools: those that are only shown.
        transcript: the file that conversations are appended to.
    """

    run: Path
    checkpoint: str | None = None
    endpoint: Endpoint | None = None
    tools: Sequence[Tool] = ()
    transcript: Path | None = None


class Chat:
    """Conversations with a run's adapter, one after the other.

    Args:
        request: what is chatted with.
        servers: whose tools are run.
        confirm: decides whether a call is run, by the server, the tool's name and the arguments.
        show: receives who says something (assistant, call, result, note), and the text.

    Raises McpLoraError if the run has no adapter, or the engine fails.
    """

    def __init__(
        self,
        request: Request,
        servers: Sequence[Connection],
        confirm: Callable[[Connection, str, dict[str, Any]], bool],
        show: Callable[[str, str], None],
    ) -> None:
        self._confirm, self._show, self._transcript = confirm, show, request.transcript
        config = runs.read_run(request.run)
        self._template = chat_template.load(config)
        self._limit = int(api.number(config, "cutoff_len", 2048))
        live = [(tool, server) for server in servers for tool in server.tools.values()]
        self._tools = dict[str, Tool]()
        self._servers = dict[str, Connection | None]()
        for tool, server in [*live, *((tool, None) for tool in request.tools)]:
            if tool.name in self._tools:
                show("note", f"{tool.name} of {tool.server} is left out: another tool has its name")
            else:
                self._tools[tool.name], self._servers[tool.name] = tool, server
        self._system: list[Message] = [{"role": "system", "content": SYSTEM_MESSAGE}]
        with suppress(McpLoraError, StopIteration):  # the data may be on another machine
            first = next(dataset.samples(Path(config["dataset_dir"]), "train"))["messages"][0]
            self._system = [first] if first["role"] == "system" else []
        if request.endpoint:
            self._answer = _by_endpoint(request.endpoint, self._template)
        else:
            settings = runs.serving_config(request.run, runs.adapter(request.run, request.checkpoint))
            self._answer = _here(settings, self._template)
        self.clear()

    def clear(self) -> None:
        """Start a new conversation."""
        self._messages = list(self._system)
        there = self._transcript and self._transcript.is_file()
        self._start = self._transcript.stat().st_size if self._transcript and there else 0

    def say(self, text: str) -> None:
        """Put a message to the adapter, and run what it calls until it answers, or a call is not run.

        If it raises, the conversation is as before: on an interruption, or a McpLoraError if the model, the
        template or the server fails.
        """
        before = list(self._messages)
        try:
            self._messages.append({"role": "user", "content": text})
            tools = self._fitting(text)
            for _ in range(_STEPS):
                reply = self._answer(self._messages, tools)
                self._messages.append(reply)
                if reply.get("content"):
                    self._show("assistant", reply["content"])
                if not all([self._run(call) for call in reply.get("tool_calls", ())] or [False]):
                    break
            else:
                self._show("note", f"stopped after {_STEPS} answers with calls")
        except BaseException:
            self._messages = before
            raise
        self._write()

    def _run(self, call: Message) -> bool:
        """Run a call, if its tool is live and it is confirmed; tell whether there is a result."""
        name, text = call["function"]["name"], call["function"]["arguments"]
        self._show("call", f"{name} {text}")
        server, arguments = self._servers.get(name), json.loads(text)
        if name not in self._tools:
            result = f"there is no tool {name}"
        elif not server or not self._confirm(server, name, arguments):
            self._show("note", "not run")
            return False
        else:
            result = server.call(name, arguments).text
        self._show("result", result)
        self._messages.append({"role": "tool", "tool_call_id": call["id"], "content": result[:_RESULT]})
        return True

    def _fitting(self, text: str) -> list[Any]:
        """Return the tools that fit into a prompt of training: all, or those closest to the message."""
        ranked = list(self._tools.values())
        openai = {tool.name: {"type": "function", "function": tool.function} for tool in ranked}
        asked = [*self._system, {"role": "user", "content": text}]

        def tokens(count: int) -> int:
            return len(_rendered(self._template, asked, [openai[tool.name] for tool in ranked[:count]]))

        most = self._limit - _ROOM
        if tokens(len(ranked)) <= most:
            return list(openai.values())
        ranked = _ranked(text, ranked)
        count = max(1, bisect_right(range(len(ranked) + 1), most, key=tokens) - 1)
        names = ", ".join(tool.name for tool in ranked[:count])
        self._show("note", f"{count} of {len(ranked)} tools fit into cutoff_len {self._limit}: {names}")
        return [openai[tool.name] for tool in ranked[:count]]

    def _write(self) -> None:
        """Write the conversation so far as the last line of the transcript."""
        if self._transcript:
            tools = [tool.function for tool in self._tools.values()]
            line = json.dumps({"messages": self._messages, "tools": tools}, ensure_ascii=False)
            with (
                explained(f"{self._transcript} cannot be written", "mcp-lora chat --transcript OTHER"),
                self._transcript.open("a", encoding="utf-8") as stream,
            ):
                stream.truncate(self._start)
                stream.write(line + "\n")


def _ranked(text: str, tools: Sequence[Tool]) -> list[Tool]:
    """Return tools with those first whose names and descriptions are closest to a text, by BM25."""
    import bm25s

    def words(text: str) -> list[str]:
        return re.findall(r"[a-z]+|\d+|[^\W\d_]", text.lower())

    index = bm25s.BM25()
    index.index([words(f"{tool.name} {tool.description}") or [""] for tool in tools], show_progress=False)
    scores = index.get_scores(words(text) or [""])
    return [tools[place] for place in sorted(range(len(tools)), key=lambda place: -scores[place])]


def _rendered(template: ChatTemplate, messages: Sequence[Message], tools: Sequence[Any]) -> list[int]:
    """Return the token ids of a prompt; raise a McpLoraError if the template rejects it."""
    try:
        return template.ids(template.prompt(messages, tools))
    except Exception as error:  # templates raise any exception
        raise McpLoraError(f"the chat template rejects this ({reason(error)}): /clear starts anew") from None


def _here(settings: dict[str, Any], template: ChatTemplate) -> Answer:
    """Return a function that lets the adapter answer greedily in this process."""
    import torch

    os.environ["LLAMAFACTORY_VERBOSITY"] = "WARN"  # the conversation is what matters
    model = api.loaded(settings)
    context = getattr(model.config, "max_position_embeddings", 1 << 20)
    ends = template.tokenizer.convert_tokens_to_ids([*template.ends.values(), template.tokenizer.eos_token])

    def answer(messages: list[Message], tools: list[Any]) -> Message:
        prompt = _rendered(template, messages, tools)
        if (room := context - len(prompt)) < 1:
            raise McpLoraError(f"the model's context of {context} tokens is full: /clear starts anew")
        ids = torch.tensor([prompt], device=model.device)
        options = {"do_sample": False, "max_new_tokens": min(_ANSWER, room), "eos_token_id": ends}
        with torch.inference_mode():
            output = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
        text = template.tokenizer.decode(output[0, len(prompt) :])
        found = template.read(text, chat_template.schemas(tools))
        if not found.calls:
            return {"role": "assistant", "content": template.without_end(text).strip()}
        number = len(messages)
        made = [
            {"id": f"call_{number}_{place}", "type": "function", "function": function}
            for place, function in enumerate(map(_function, found.calls))
        ]
        return {"role": "assistant", "content": found.content.strip() or None, "tool_calls": made}

    return answer


def _function(call: Any) -> dict[str, str]:
    return {"name": call.name, "arguments": json.dumps(call.arguments, ensure_ascii=False)}


def _by_endpoint(endpoint: Endpoint, template: ChatTemplate) -> Answer:
    """Return a function that asks an OpenAI-compatible server."""
    from openai import OpenAI, OpenAIError, omit

    client = OpenAI(base_url=endpoint.url, api_key=os.environ.get(KEY, "none"))
    more = {"chat_template_kwargs": template.server_arguments} if template.server_arguments else None

    def answer(messages: list[Message], tools: list[Any]) -> Message:
        sent: Any = messages
        try:
            reply = client.chat.completions.create(
                model=endpoint.model, messages=sent, tools=tools or omit, temperature=0, extra_body=more
            )
            said = reply.choices[0].message
            made = [call for call in said.tool_calls or [] if call.type == "function"]
            for call in made:
                json.loads(call.function.arguments)
        except (OpenAIError, LookupError, TypeError, ValueError) as error:
            what = f"{endpoint.url} does not answer as it should ({reason(error)})"
            raise McpLoraError(f"{what}: is it running, is the key in {KEY}?") from None
        message: Message = {"role": "assistant", "content": said.content}
        if made:
            message["tool_calls"] = [call.model_dump(include={"id", "type", "function"}) for call in made]
        return message

    return answer
