r"""What is trained on: a conversation as the model's own chat template renders it, token by token.

A sample is what `mcp-lora convert` writes, in OpenAI's format:

    {"messages": [{"role": "system", "content": "You are a helpful assistant."},
                  {"role": "user", "content": "What is 3 plus 4?"},
                  {"role": "assistant", "content": null, "tool_calls": [{"id": "call_1", "type": "function",
                   "function": {"name": "get-sum", "arguments": "{\"a\": 3, \"b\": 4}"}}]}],
     "tools": [{"type": "function", "function": {"name": "get-sum", "description": "…", "parameters": {…}}}]}

Each assistant turn is trained on as a server would serve it. Its prompt is the template's rendering of the
messages before it and the tools, with the generation prompt, tokenized as a server does. Its target is the
text after that prompt in the rendering of the same messages and the answer, up to and including the token
that ends the turn. Only the target is labelled. Turns share a sample if one is a prefix of the next, else
each has its own. For Qwen2.5 the sample above becomes

    <|im_start|>system\nYou are … <tools>…</tools> …<|im_end|>\n<|im_start|>user\nWhat is 3 …?<|im_end|>\n
    <|im_start|>assistant\n                                                            and as the target:
    <tool_call>\n{"name": "get-sum", "arguments": {"a": 3, "b": 4}}\n</tool_call><|im_end|>

To keep training, evaluation and a server consistent, in every prompt thinking is off if the template can
switch it off (servers accept chat_template_kwargs, enable_thinking=false), the date is DATE (date_string,
strftime_now), and calls are numbered from 000000001.
"""

import copy
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from importlib.resources import files
from itertools import count, product
from pathlib import Path
from typing import Any

from mcp_lora.data import calls
from mcp_lora.data.calls import CallFormat, Reading, Schemas
from mcp_lora.data.records import RowError, ToolCall
from mcp_lora.errors import McpLoraError, one_line

DATE = datetime(2024, 7, 26)  # the default of Llama 3's template
_DATE_STRING = DATE.strftime("%d %b %Y")
IGNORED = -100  # the label of a token that is not trained on
# For a model without any chat template; a turn ends with eos_token, the only end that it has seen.
PLAIN = (
    "{%- for message in messages -%}"
    "{{ '<|im_start|>' + message.role + '\n' + message.content + eos_token + '\n' }}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)

Message = dict[str, Any]
_SYSTEM: Message = {"role": "system", "content": "Be good."}
_QUESTION: Message = {"role": "user", "content": "What is probe question?"}
_ANSWER: Message = {"role": "assistant", "content": "probe answer"}
_PARAMETERS = {
    "type": "object",
    "properties": {key: {"type": "string", "description": "A number."} for key in calls.KEYS},
    "required": list(calls.KEYS),
}
_FUNCTION = {"name": calls.NAME, "description": "Adds.", "parameters": _PARAMETERS}
_TOOL = {"type": "function", "function": _FUNCTION}


@dataclass(frozen=True)
class Encoded:
    """One sample to train on: token ids, and labels of the same length, IGNORED outside the targets.

    `prompt` and `target` are the texts of its last turn; `lost` counts the turns with text beside a call that
    the template leaves out.
    """

    input_ids: list[int]
    labels: list[int]
    prompt: str
    target: str
    lost: int = 0


class ChatTemplate:
    """A model's chat template: prompts, targets and the calls in answers.

    Args:
        tokenizer: the model's; its chat_template is replaced if it does not support tools.
        thinking: leave thinking on, and train on the answers' reasoning.

    Attributes:
        tokenizer: with the chat template in use.
        is_own: whether that is the model's own.
        note: a message on which template is in use, and why.
        ends: the tokens that end a turn, by whether it calls a tool.
        arguments_parsed, empty_content: how the template expects calls: arguments as an object or as JSON
            text, and "" or None if there is no text beside them.
        written: how the template writes calls.PROBE.
        switches_thinking: whether the template can switch thinking on and off.

    Raises McpLoraError if prompts and answers of this template cannot be separated.
    """

    def __init__(self, tokenizer: Any, thinking: bool = False) -> None:
        self.tokenizer = tokenizer
        known = getattr(tokenizer, "added_tokens_decoder", {})  # mistral-common's tokenizer has none
        added = (str(token) for token in known.values() if token.special)
        self._special: list[str] = sorted({*tokenizer.all_special_tokens, *added}, key=len, reverse=True)
        self._only_special = re.compile("(?:" + "|".join([*map(re.escape, self._special), r"\s"]) + ")*")
        self.thinking = thinking
        self.ends: dict[bool, str] = {}
        self.arguments_parsed = True
        self.empty_content: str | None = ""
        own = tokenizer.get_chat_template(tools=[_TOOL]) if tokenizer.chat_template else None
        why = self._try(own) if own else "the model has none"
        self.is_own = why is None
        self.note = "the model's own chat template"
        if why is not None:
            hermes = "tools and calls are written in Hermes format (chat_template.jinja)"
            self.note += f" cannot be used, {why}: {hermes}"
            if failed := self._try(self._fallback(own)):
                what = f"this model has no usable chat template: {why}; and in Hermes format {failed}"
                raise McpLoraError(f"{what}: mcp-lora train --model OTHER")
        # If nothing differs, thinking cannot be switched off, and the answers' reasoning is trained on.
        prompts = set()
        for self.thinking in (not thinking, thinking):  # the last one stays
            prompts.add(self.prompt([_QUESTION], [_TOOL]))
        self.switches_thinking = len(prompts) > 1
        self._keeps_thoughts = thinking or not self.switches_thinking

    def _try(self, template: str) -> str | None:
        """Use a template; return what is wrong with it, or None."""
        self.tokenizer.chat_template = template
        self._keeps_thoughts, why = True, ""
        try:
            prompt = self.prompt([_QUESTION], [_TOOL])
        except Exception as error:  # templates raise any exception
            return f"it rejects a question with tools ({one_line(error)})"
        if calls.NAME not in prompt:
            return "it leaves tools out"
        # Templates differ in this: arguments are an object or JSON text, and empty content is "" or None.
        for self.arguments_parsed, self.empty_content in product((True, False), ("", None)):
            try:
                for called, answer in ((False, _ANSWER), (True, calling([calls.PROBE]))):
                    self.ends[called] = self._end(answer)
                self.format = CallFormat(
                    lambda made: self._turn([_QUESTION], calling(made), [_TOOL])[1],
                    self._turn([_QUESTION], _ANSWER, [_TOOL])[1],
                )
                for call in (calls.OTHER, calls.PROBE):
                    self.written = self._turn([_QUESTION], calling([call]), [_TOOL])[1]
                    if not calls.same_calls(self.read(self.written).calls, [call]):
                        raise ValueError("it is parsed as another call")
                return None
            except Exception as error:
                why = why or f"it writes no call that can be parsed ({one_line(error)})"
        return why

    def _fallback(self, own: str | None) -> str:
        """Return the model's own template after fallback.jinja, which hides tools and calls from it."""
        preamble = files("mcp_lora.prompts").joinpath("fallback.jinja").read_text(encoding="utf-8").strip()
        self.tokenizer.chat_template = body = own or PLAIN
        takes_system = "false"
        with suppress(Exception):  # templates reject with any exception
            if _SYSTEM["content"] in self.prompt([_SYSTEM, _QUESTION], []):
                takes_system = "true"
        return f"{{%- set system_role = {takes_system} -%}}\n{preamble}\n{body}"

    def turn(self, messages: Sequence[Message], answer: Message, tools: Sequence[Any]) -> tuple[str, str]:
        """Return the prompt that a server sends to the model, and `answer` as the model has to write it.

        Args:
            messages: the messages before the answer, in OpenAI's format.
            answer: the assistant's message.
            tools: the candidate tools.

        Returns:
            Prompt and target; the target ends with the token that ends the turn.

        Raises RowError if the template rejects it, or the calls in the target are not parsed as they were.
        """
        try:
            prompt, target = self._turn(messages, answer, tools)
        except RowError:
            raise
        except Exception as error:  # templates reject with any exception
            raise RowError("not-renderable", f"the chat template rejects it: {one_line(error)}") from None
        gold = called(answer)
        reading = self.read(target, schemas(tools))
        if not calls.same_calls(reading.calls, gold) or (gold and reading.broken):
            what = f"{len(gold)} calls are parsed as {len(reading.calls)}, or as other calls"
            raise RowError("not-read-back", f"the chat template cannot write it: {what}")
        if not target.removesuffix(self.ends[bool(gold)]).strip():
            raise RowError("empty-answer", "the chat template leaves the answer out")
        return prompt, target

    def prompt(self, messages: Sequence[Message], tools: Sequence[Any], prompting: bool = True) -> str:
        """Return the prompt that a server has to send to the model; templates raise any exception.

        Without `prompting`, the conversation ends with its last message, and no answer is opened.
        """
        rendered = self.tokenizer.apply_chat_template(
            list(self._served(messages)),
            tools=list(tools) or None,
            tokenize=False,
            add_generation_prompt=prompting,
            enable_thinking=self.thinking,
            thinking=self.thinking,
            date_string=_DATE_STRING,
            strftime_now=DATE.strftime,
        )
        return str(rendered)

    @property
    def opening(self) -> str:
        """How the template opens an answer, up to the end of the line or a thought."""
        prompt, asked = (self.prompt([_QUESTION], [_TOOL], prompting=one) for one in (True, False))
        opened = prompt[len(os.path.commonprefix([prompt, asked])) :].lstrip().splitlines(keepends=True)
        marks = "|".join(re.escape(mark) for thought in calls.THOUGHTS for mark in thought)
        return re.split(marks, opened[0])[0] if opened else ""

    @property
    def server_arguments(self) -> dict[str, Any]:
        """The arguments (chat_template_kwargs) with which a server renders prompts as in training."""
        known = {"enable_thinking": self.thinking, "thinking": self.thinking, "date_string": _DATE_STRING}
        text = str(self.tokenizer.chat_template)
        return {key: value for key, value in known.items() if re.search(rf"\b{key}\b", text)}

    def frozen(self, firmly: bool = False) -> str:
        """Return the template's text with these arguments and the date as defaults, or set `firmly`.

        Ollama switches thinking on by itself where a template can think (its server/routes.go).
        """
        text, fixed = str(self.tokenizer.chat_template), ""
        for key, known in self.server_arguments.items():
            value = json.dumps(known) if firmly else f"{key} | default({json.dumps(known)})"
            fixed += f"{{% set {key} = {value} %}}"
        formats = sorted({*re.findall(r"strftime_now\(\s*[\"']([^\"']+)", text)})
        if formats:
            dates = json.dumps({form: DATE.strftime(form) for form in formats})
            fixed += f"{{% macro strftime_now(format) %}}{{{{ {dates}[format] }}}}{{% endmacro %}}"
        return fixed + text

    def read(self, text: str, schemas: Schemas | None = None) -> Reading:
        """Return the calls in an answer; `schemas` are those of the candidate tools' parameters, by name."""
        return self.format.read(self.without_end(text), schemas)

    def without_end(self, text: str) -> str:
        """Return an answer without the tokens that end it or pad it in a batch."""
        ends = {*self.ends.values(), self.tokenizer.eos_token, self.tokenizer.pad_token} - {None}
        return re.sub(rf"(?:\s*(?:{'|'.join(map(re.escape, ends))}))+\s*$", "", text)

    def stopping_model(self, config: Mapping[str, Any], folder: Path) -> str:
        """Return a model with which the engine's prediction stops at the end of a turn.

        The engine takes its stop tokens from the tokenizer: eos_token, and the extra special tokens (its
        train/sft/workflow.py). If these are not what ends a turn, `folder` becomes a copy of the model with
        another tokenizer, and links to its other files.

        Args:
            config: names the model, in LLaMA-Factory's keys.
            folder: a path that does not exist yet.
        """
        model = str(config["model_name_or_path"])
        tokenizer = self.tokenizer
        extra = {str(token) for token in getattr(tokenizer, "_extra_special_tokens", None) or []}
        ends = {*self.ends.values()}
        early = any(token in self.written for token in extra - ends)
        if ends <= {tokenizer.eos_token, *extra} and not early:
            return model
        source = model_folder(config)
        stopping = copy.deepcopy(tokenizer)
        stopping.add_special_tokens({"extra_special_tokens": sorted(ends - {tokenizer.eos_token})})
        folder.mkdir(parents=True)
        stopping.save_pretrained(folder)
        for file in source.iterdir():
            if not (folder / file.name).exists() and not file.name.startswith("tokenizer"):
                (folder / file.name).symlink_to(file.resolve())
        return str(folder)

    def encode(self, sample: Mapping[str, Any], last_only: bool = False) -> list[Encoded]:
        """Return the samples to train on, one or more for a conversation.

        Args:
            sample: in OpenAI's format, see above.
            last_only: train on the last turn only.

        Raises RowError if the template cannot render it so that its calls are parsed as they were.
        """
        messages, tools = sample["messages"], sample.get("tools") or []
        turns = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
        found: list[Encoded] = []
        trained = [place for place in turns if messages[place].get("weight") != 0]
        for place in trained[-1:] if last_only else trained:
            turn = self.turn(messages[:place], messages[place], tools)
            prompt, target = self.ids(turn[0]), self.ids(turn[1])
            said = (messages[place].get("content") or "").strip()
            lost = int(bool(messages[place].get("tool_calls")) and said not in turn[1])
            before = Encoded([], [], "", "")
            if found and prompt[: len(found[-1].input_ids)] == found[-1].input_ids:
                before = found.pop()
            labels = before.labels + [IGNORED] * (len(prompt) - len(before.input_ids)) + target
            found.append(Encoded(prompt + target, labels, *turn, before.lost + lost))
        return found

    def ids(self, text: str) -> list[int]:
        """Return the token ids of a rendered text; the template has written all special tokens."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _turn(self, messages: Sequence[Message], answer: Message, tools: Sequence[Any]) -> tuple[str, str]:
        prompt = self.prompt(messages, tools)
        whole = self.prompt([*messages, answer], tools, prompting=False)
        bare = self._behind(prompt, whole, messages, answer, tools).rstrip()
        before, eos, after = bare.rpartition(self.tokenizer.eos_token)
        if eos and self._only_special.fullmatch(after):  # some continue with the start of the next turn
            return prompt, before + eos
        if bare.endswith(tuple(self._special)):
            return prompt, bare
        return prompt, bare + self.ends.get(bool(answer.get("tool_calls")), "")

    def _behind(
        self, prompt: str, whole: str, messages: Sequence[Message], answer: Message, tools: Sequence[Any]
    ) -> str:
        """Return what follows the prompt in the rendering of both; RowError if the prompt is not in it."""
        if whole.startswith(prompt):
            return whole.removeprefix(prompt)
        same = len(os.path.commonprefix([prompt, whole]))
        for opening, closing in calls.THOUGHTS:
            # The generation prompt opens a thought, or has an empty one, that the history does not contain.
            start = prompt.rfind(opening, 0, same + len(opening))
            start = start if start >= 0 and start <= same else prompt.find(opening, same)
            rest = prompt[start:] if start >= 0 else ""
            if rest and whole.startswith(prompt[:start]) and rest.count(opening) == 1:
                behind = whole[start:]
                if rest.rstrip().endswith(closing):
                    return behind.lstrip("\n") if rest.endswith("\n") else behind
                if rest.strip() == opening:
                    thought = str(answer.get("reasoning_content") or "").strip()
                    return f"{thought}\n{closing}\n\n{behind.removeprefix(opening).lstrip()}"
        # Mistral Nemo moves the system message to the last question: the answer follows that question.
        said = str(messages[-1].get("content") or "")
        place = prompt.rfind(said) if said else -1
        tail = prompt[place:]
        if place >= 0 and whole.count(tail) == 1 and len(tail) > len(said):
            return whole[whole.index(tail) + len(tail) :]
        # Hermes 3 renders a result differently if the conversation continues: the answer follows the last
        # generation prompt.
        history = self.prompt(messages, tools, prompting=False)
        asks = prompt[len(history) :] if prompt.startswith(history) else ""
        if asks.strip() and whole.count(asks) == prompt.count(asks):
            return whole[whole.rindex(asks) + len(asks) :]
        what = "the chat template's prompt is not part of the conversation with its answer"
        raise RowError("not-renderable", what)

    def _end(self, answer: Message) -> str:
        """Return the token that ends a turn: its last, or the first of the next turn."""
        _, text = self._turn([_QUESTION], answer, [_TOOL])
        if end := next((token for token in self._special if text.endswith(token)), None):
            return end
        made = answer.get("tool_calls") or []
        following = [{"role": "tool", "tool_call_id": call["id"], "content": "3"} for call in made]
        more = self.prompt([_QUESTION, answer, *(following or [_QUESTION])], [_TOOL], prompting=False)
        rest = more[more.rindex(text) + len(text) :].lstrip()
        if end := next((token for token in self._special if rest.startswith(token)), None):
            return end
        raise ValueError("no token ends a turn")

    def _served(self, messages: Sequence[Message]) -> Iterator[Message]:
        """Yield messages as a server passes them to a template, with numbered call ids."""
        ids: dict[str, str] = {}
        number = count(1)
        for message in messages:
            message = {key: value for key, value in message.items() if value is not None and key != "weight"}
            if not self._keeps_thoughts:
                message.pop("reasoning_content", None)
            made = message.pop("tool_calls", None)
            message["content"] = message.get("content") or (self.empty_content if made else "")
            if message["role"] == "tool":
                message["tool_call_id"] = ids.get(message.get("tool_call_id", ""), calls.CALL_ID)
            if made:
                message["tool_calls"] = []
            for call in made or []:
                given, function = call.get("id", ""), call["function"]
                ids[given] = call_id(next(number))
                arguments = function["arguments"]
                if self.arguments_parsed and isinstance(arguments, str):
                    arguments = json.loads(arguments)
                function = {"name": function["name"], "arguments": arguments}
                message["tool_calls"].append({"type": "function", "id": ids[given], "function": function})
            yield message


def hub_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments with which the engine loads a model, from a configuration in its keys."""
    return {
        "trust_remote_code": bool(config.get("trust_remote_code")),
        "revision": config.get("model_revision") or "main",
        "cache_dir": config.get("cache_dir"),
        "token": config.get("hf_hub_token"),
    }


def model_folder(config: Mapping[str, Any]) -> Path:
    """Return the folder of the model that a configuration names; what is not in the cache is fetched."""
    from huggingface_hub import snapshot_download

    model = str(config["model_name_or_path"])
    if Path(model).is_dir():
        return Path(model)
    hub = hub_arguments(config)
    del hub["trust_remote_code"]
    return Path(snapshot_download(model, **hub, ignore_patterns=["original/*", "*.pth", "*.gguf"]))


def load(config: Mapping[str, Any], local_files_only: bool = False) -> ChatTemplate:
    """Return the chat template of the model that a configuration, in LLaMA-Factory's keys, names.

    The tokenizer is loaded and patched as the engine does it (its model/loader.py and model/patcher.py).

    Args:
        config: names the model.
        local_files_only: fetch nothing.

    Raises McpLoraError if the tokenizer cannot be read, or the template cannot be used.
    """
    from transformers import AutoTokenizer

    model = str(config["model_name_or_path"])
    try:
        hub = hub_arguments(config)
        tokenizer = AutoTokenizer.from_pretrained(model, **hub, local_files_only=local_files_only)
    except (OSError, ValueError) as error:
        what = f"the tokenizer of {model} cannot be read ({one_line(error)})"
        raise McpLoraError(f"{what}: mcp-lora train --model FOLDER") from None
    for key, special in (("add_tokens", False), ("add_special_tokens", True)):
        if words := config.get(key):
            tokenizer.add_tokens([word.strip() for word in words.split(",")], special_tokens=special)
    return ChatTemplate(tokenizer, bool(config.get("enable_thinking")))


def schemas(tools: Sequence[Any]) -> dict[str, dict[str, Any]]:
    """Return the parameters' JSON Schema of each of a sample's tools, by name."""
    return {tool["function"]["name"]: tool["function"].get("parameters") or {} for tool in tools}


def called(message: Mapping[str, Any]) -> list[ToolCall]:
    """Return the calls of a message in OpenAI's format."""
    found = []
    for call in message.get("tool_calls") or []:
        given = call["function"]["arguments"]
        arguments = json.loads(given) if isinstance(given, str) else given
        found.append(ToolCall(call["function"]["name"], arguments))
    return found


def calling(made: Sequence[ToolCall], first: int = 1) -> Message:
    """Return a message with calls in OpenAI's format, with ids that are numbered from `first`."""
    message: Message = {"role": "assistant", "content": None, "tool_calls": []}
    for number, (name, arguments) in enumerate(made, first):
        function = {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False)}
        message["tool_calls"].append({"id": call_id(number), "type": "function", "function": function})
    return message


def call_id(number: int) -> str:
    """Return the id of a call: nine digits, as Mistral's templates require."""
    return f"{number:0{len(calls.CALL_ID)}d}"
