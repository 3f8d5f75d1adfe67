"""Compare the prompts that a server makes of conversations with those of training.

A server is asked in the most exact way that it has: the text (/apply-template, llama.cpp), the token ids
(/tokenize, vLLM and SGLang), or the number of prompt tokens in an answer's `usage`.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mcp_lora.data.calls import CALL_ID
from mcp_lora.errors import McpLoraError
from mcp_lora.prompts.chat_template import ChatTemplate

_CONTEXT = 60  # characters before and after the first difference that are shown


@dataclass(frozen=True)
class Parity:
    """What was compared (text, token ids, number of tokens), of how many conversations, and differences.

    Each difference is a message with its context. `left_out` counts the conversations that the chat template
    rejects.
    """

    compared: str
    count: int
    differences: list[str]
    left_out: int


def _tool(name: str, properties: dict[str, Any]) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties, "required": sorted(properties)}
    function = {"name": name, "description": f"Calls {name}.", "parameters": parameters}
    return {"type": "function", "function": function}


def _called(*numbers: int) -> dict[str, Any]:
    made = [
        {
            "id": f"{number:0{len(CALL_ID)}d}",
            "type": "function",
            "function": {"name": "get-sum", "arguments": f'{{"a": {number}, "b": 2}}'},
        }
        for number in numbers
    ]
    return {"role": "assistant", "content": "", "tool_calls": made}


def _result(number: int) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": f"{number:0{len(CALL_ID)}d}", "content": '{"sum": 3}'}


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


def parity(url: str, template: ChatTemplate) -> Parity:
    """Compare a server's prompts with those of a chat template.

    Args:
        url: the server's base URL, with /v1; its key is OPENAI_API_KEY in the environment.
        template: the chat template of the run that it serves.

    Raises McpLoraError if the server does not answer.
    """
    import httpx
    from openai import OpenAI, OpenAIError

    key = os.environ.get("OPENAI_API_KEY", "none")
    root = url.rstrip("/").removesuffix("/v1")
    compared, differences, left_out = "", [], 0
    try:
        with (
            OpenAI(base_url=url, api_key=key) as client,
            httpx.Client(headers={"Authorization": f"Bearer {key}"}, timeout=60) as http,
        ):
            model = client.models.list().data[-1].id
            for name, (messages, tools) in PROBES.items():
                try:
                    expected = template.prompt(messages, tools)
                except Exception:  # templates reject with any exception
                    left_out += 1
                    continue
                body: dict[str, Any] = {"model": model, "messages": messages}
                body |= {"tools": tools} if tools else {}
                body |= {"chat_template_kwargs": template.server_arguments}
                if (reply := http.post(f"{root}/apply-template", json=body)).is_success:
                    compared, made = "text", reply.json()["prompt"]
                    difference = _difference(expected, made)
                elif (reply := http.post(f"{root}/tokenize", json=body)).is_success:
                    compared, ids = "token ids", reply.json()["tokens"]
                    difference = ""
                    if ids != template.ids(expected):
                        difference = (
                            _difference(expected, template.tokenizer.decode(ids)) or "other token ids"
                        )
                else:
                    compared = "number of tokens"
                    used: Any = client.post(
                        "/chat/completions", body=body | {"max_tokens": 1}, cast_to=object
                    )
                    made, count = used["usage"]["prompt_tokens"], len(template.ids(expected))
                    difference = f"{made} tokens instead of {count}" if made != count else ""
                if difference:
                    differences.append(f"{name}: {difference}")
    except (OpenAIError, httpx.HTTPError, LookupError, TypeError, ValueError) as error:
        what = (
            f"{url} does not answer as a server of OpenAI's protocol ({' '.join(str(error).split())[:200]})"
        )
        raise McpLoraError(f"{what}: is it running, does the URL end with /v1? mcp-lora serve") from None
    return Parity(compared, len(PROBES) - left_out, differences, left_out)


def _difference(expected: str, made: str) -> str:
    """Return the first difference of two texts with its context, or ""."""
    if expected == made:
        return ""
    pairs = zip(expected, made, strict=False)
    place = next((at for at, pair in enumerate(pairs) if pair[0] != pair[1]), min(len(expected), len(made)))
    start = max(0, place - _CONTEXT)
    shown = (text[start : place + _CONTEXT] for text in (expected, made))
    return "at character {}, {!r} in training, {!r} on the server".format(place, *shown)
