"""Compare the prompts that a server makes of conversations with those of training.

A server is asked in the most exact way that it has: for token ids (vLLM and SGLang by /tokenize, llama.cpp
by /apply-template and /tokenize), or for the number of prompt tokens in an answer's `usage`. As from most
clients, it gets no arguments for its chat template.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mcp_lora.data.records import ToolCall
from mcp_lora.errors import McpLoraError, one_line
from mcp_lora.prompts.chat_template import ChatTemplate, call_id, calling

NAME = "mcp-lora"  # of the model on the servers that mcp-lora starts or prints a command for
_CONTEXT = 60  # characters before and after the first difference that are shown


@dataclass(frozen=True)
class Parity:
    """What was compared (token ids, numbers of tokens) of which model, and of how many conversations.

    Each difference is a message with its context. `left_out` counts the conversations that the chat template
    rejects.
    """

    model: str
    compared: str
    count: int
    differences: list[str]
    left_out: int


def _tool(name: str, properties: dict[str, Any]) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties, "required": sorted(properties)}
    function = {"name": name, "description": f"Calls {name}.", "parameters": parameters}
    return {"type": "function", "function": function}


def _called(*numbers: int) -> dict[str, Any]:
    return calling([ToolCall("get-sum", {"a": number, "b": 2}) for number in numbers]) | {"content": ""}


def _result(number: int) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": call_id(number), "content": '{"sum": 3}'}


_SYSTEM = {"role": "system", "content": "You are a helpful assistant."}
_QUESTION = {"role": "user", "content": "What is 1 plus 2?"}
_SUM = _tool("get-sum", {"a": {"type": "number"}, "b": {"type": "number", "description": "The other."}})
_NESTED = {"type": "object", "properties": {"tags": {"type": "array", "items": {"type": "string"}}}}
_TEN = [_SUM, _tool("search_notes", {"filter": _NESTED, "query": {"type": "string", "enum": ["a", "b"]}})]
_TEN += [_tool(f"tool-{number}", {"text": {"type": "string"}}) for number in range(8)]
# By name: the messages and the tools.
PROBES: dict[str, tuple[Sequence[dict[str, Any]], Sequence[dict[str, Any]]]] = {
    "a question and one tool": ([_QUESTION], [_SUM]),
    "a system message and ten tools": ([_SYSTEM, _QUESTION], _TEN),
    "no tool": ([_SYSTEM, _QUESTION], []),
    "text that is not ASCII": ([_SYSTEM, {"role": "user", "content": '東京の天気は？ <ü & "é">\n'}], [_SUM]),
    "a call and its result": ([_SYSTEM, _QUESTION, _called(1), _result(1)], [_SUM]),
    "parallel calls": ([_QUESTION, _called(1, 2), _result(1), _result(2)], [_SUM]),
    "a second question": (
        [_QUESTION, _called(1), _result(1), {"role": "assistant", "content": "It is 3."}, _QUESTION],
        _TEN[:2],
    ),
}


def parity(url: str, template: ChatTemplate, model: str | None = None) -> Parity:
    """Compare a server's prompts with those of a chat template.

    Args:
        url: the server's base URL, with /v1; its key is OPENAI_API_KEY in the environment.
        template: the chat template of the run that it serves.
        model: its name on the server; by default NAME, else the only one.

    Raises McpLoraError if the server does not answer, or has several models and none of them is NAME.
    """
    import httpx

    url, key = url.rstrip("/"), os.environ.get("OPENAI_API_KEY", "none")
    compared, differences, left_out = "", [], 0
    try:
        with httpx.Client(headers={"Authorization": f"Bearer {key}"}, timeout=60) as http:
            model = model or _served(http, url)
            for name, (messages, tools) in PROBES.items():
                try:
                    expected = template.prompt(messages, tools)
                except Exception:  # templates reject with any exception
                    left_out += 1
                    continue
                body = {"model": model, "messages": messages} | ({"tools": tools} if tools else {})
                compared, found = _prompt(http, url, body)
                ids = template.ids(expected)
                if isinstance(found, int):
                    difference = f"{found} tokens instead of {len(ids)}" if found != len(ids) else ""
                elif difference := "other token ids" if found != ids else "":
                    difference = _difference(expected, template.tokenizer.decode(found)) or difference
                if difference:
                    differences.append(f"{name}: {difference}")
    except (httpx.HTTPError, httpx.InvalidURL, LookupError, TypeError, ValueError) as error:
        if isinstance(error, httpx.HTTPStatusError):  # whose own message leaves out the server's reason
            error = ValueError(f"{error.response.status_code}: {error.response.text}")
        what = f"{url} does not answer as OpenAI's protocol has it ({one_line(error)})"
        again = "is it running, does the URL end with /v1, is the key in OPENAI_API_KEY? mcp-lora serve"
        raise McpLoraError(f"{what}: {again}") from None
    return Parity(model, compared, len(PROBES) - left_out, differences, left_out)


def _served(http: Any, url: str) -> str:
    """Return the name of the model to ask; a server may list its base, or others, too."""
    reply = http.get(f"{url}/models").raise_for_status().json()
    names: list[str] = [one["id"] for one in reply["data"]]
    ours = [name for name in names if name in (NAME, f"{NAME}:latest")] or names  # Ollama's has a tag
    if len(ours) != 1:
        there = ", ".join(names) or "none"
        raise McpLoraError(f"which of its models? {there}: mcp-lora parity {url} --endpoint-model NAME")
    return ours[0]


def _prompt(http: Any, url: str, body: dict[str, Any]) -> tuple[str, list[int] | int]:
    """Return what a server reports about the prompt of a request: its token ids, or their number."""
    root, asked = url.removesuffix("/v1"), body
    if (reply := http.post(f"{root}/apply-template", json=body)).is_success:  # without its first token
        asked = {"content": reply.json()["prompt"], "add_special": True, "parse_special": True}
    if (reply := http.post(f"{root}/tokenize", json=asked)).is_success:
        return "token ids", list(reply.json()["tokens"])
    reply = http.post(f"{url}/chat/completions", json=body | {"max_tokens": 1}).raise_for_status()
    return "numbers of tokens", int(reply.json()["usage"]["prompt_tokens"])


def _difference(expected: str, made: str) -> str:
    """Return the first difference of two texts with its context, or ""."""
    if expected == made:
        return ""
    place = len(os.path.commonprefix([expected, made]))
    start = max(0, place - _CONTEXT)
    shown = (text[start : place + _CONTEXT] for text in (expected, made))
    return "at character {}, {!r} in training, {!r} on the server".format(place, *shown)
