r"""Parse the tool calls in a model's output, in the format in which its chat template writes them.

No model family is listed here. The template renders one call and two, with marker names, keys and values,
and the result shows how it writes any call. Four formats cover all published templates:

    an object with the name           <tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>
    a name, then an object            [TOOL_CALLS]add[ARGS]{"a": 1}
    keys and values between tags      <function=add>\n<parameter=a>\n1\n</parameter>\n</function>
    calls in Python's syntax          <|tool_call_start|>[add(a=1)]<|tool_call_end|>
"""

import ast
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from mcp_lora.data.records import ARGUMENTS, NAMES, ToolCall, first, literal, value_of
from mcp_lora.data.tools import types_of

# How models delimit their reasoning: DeepSeek, Qwen and most others; Gemma 4; Mistral; Seed; Cohere.
THOUGHTS = (
    ("<think>", "</think>"),
    ("<|channel>thought", "<channel|>"),
    ("[THINK]", "[/THINK]"),
    ("<seed:think>", "</seed:think>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|channel|>analysis<|message|>", "<|end|>"),
)
_ENDS_TURNS = "<|end|>"  # other models end every turn with it, so that it closes only what is opened

NAME, KEYS, VALUES = "probe_name", ("probe_key_a", "probe_key_b"), ("probe value c", "probe value d")
PROBE = ToolCall(NAME, dict(zip(KEYS, VALUES, strict=True)))
OTHER = ToolCall("other-tool", {KEYS[0]: VALUES[1]})
_NUMBER = 1234567
TYPED = ToolCall(NAME, {KEYS[0]: _NUMBER, KEYS[1]: VALUES[1]})
CALL_ID = "000000001"  # the id of the first call in every prompt: nine characters, as Mistral requires

Schemas = Mapping[str, Mapping[str, Any]]
_JSON = json.JSONDecoder()
_GLUE = r"[\s,;\[\]`]"  # what may separate two calls besides the literals
_TAG = re.compile(r"<[^<>]*>|\[/?[A-Z_]+\]")
_WORD = re.compile(rf"{_TAG.pattern}|<[^\s<>]*|[^\s<\[]+")  # a tag, a tag cut short by a name, anything else


@dataclass(frozen=True)
class Reading:
    """The content of an answer.

    Attributes:
        calls: the calls that could be parsed, in order.
        content: the text before the first call.
        broken: whether something starts like a call and cannot be parsed.
    """

    calls: list[ToolCall]
    content: str
    broken: bool


class CallFormat:
    """How a chat template writes calls.

    Args:
        write: returns what the template writes for an answer with these calls, without the token that ends
            the turn; raises if it cannot.
        answer: what it writes for an answer without a call.
        lenient: also read calls with other keys than the template's, as data has them.

    Raises ValueError if the template writes no call that can be parsed.
    """

    def __init__(self, write: Callable[[list[ToolCall]], str], answer: str, lenient: bool = False) -> None:
        self._answer = answer
        self._quote = ""
        self._one = one = split_thought(write([PROBE]))[0]
        try:
            self._two = split_thought(write([PROBE, PROBE]))[0]
        except Exception:  # some templates reject parallel calls, with any exception
            self._two = ""
        if NAME not in one:
            raise ValueError("the template leaves calls out")
        for place in (match.start() for match in re.finditer(r"\{", one)):
            value, end = _decoded(one, place)
            if value is not None and NAME in json.dumps(value):
                self._literals(place, end)
                self._keys = (NAMES, ARGUMENTS) if lenient else _keys(value)
                self._read_one = self._object
                return
        start = one.index(NAME)
        after = start + len(NAME)
        brace, key = one.find("{", after), one.find(KEYS[0], after)
        if key < 0:
            raise ValueError("the template leaves arguments out")
        if re.match(r"\(\s*" + KEYS[0], one[after:]):
            self._literals(start, one.rindex(VALUES[1]) + len(VALUES[1]) + 2)
            self._read_one = self._python
        elif 0 <= brace < key:
            value, end = _decoded(one, brace)
            if value is None:
                # Gemma 4 uses its own quotation mark, and unquoted keys
                self._quote = one[key + len(KEYS[0]) : one.index(VALUES[0])].lstrip(": ")
                end = len(self._quote) and one.index("}", one.index(VALUES[1])) + 1
                if not end:
                    raise ValueError("the template writes arguments in an unknown format")
            self._literals(start, end)
            self._middle = one[after:brace].strip()
            self._read_one = self._named
        else:
            places = [one.find(word, after) for word in (KEYS[0], VALUES[0], KEYS[1], VALUES[1])]
            if -1 in places or places != sorted(places):
                raise ValueError("the template writes calls in an unknown format")
            self._learn_tags(start, places, split_thought(write([TYPED]))[0])
            self._read_one = self._tagged

    def _learn_tags(self, start: int, places: list[int], typed: str) -> None:
        """Learn what separates keys and values, as in Qwen3-Coder, GLM, MiniMax and DeepSeek V3.2."""
        one = self._one
        key_a, value_a, key_b, value_b = places
        before_value = one[key_a + len(KEYS[0]) : value_a]
        between, rest = one[value_a + len(VALUES[0]) : key_b], one[value_b + len(VALUES[1]) :]
        after_value = os.path.commonprefix([between, rest])
        after_value = after_value[: max(map(after_value.rfind, ">]}")) + 1]  # whole tags
        if not after_value:
            raise ValueError("the template does not mark the end of an argument")
        before_key = between[len(after_value) :].strip()
        after_name = one[start + len(NAME) : key_a].strip().removesuffix(before_key).strip()
        # Some templates write the type beside the key: text or not (DeepSeek), or which (Kimi K3).
        before_other = typed[typed.index(KEYS[0]) + len(KEYS[0]) : typed.index(str(_NUMBER))]
        same = os.path.commonprefix([before_value, before_other])
        end = os.path.commonprefix([before_value[len(same) :][::-1], before_other[len(same) :][::-1]])[::-1]
        self._is_typed = before_value == before_other
        found = _WORD.match(rest[len(after_value) :].strip())
        after_call = found.group() if found else ""
        self._literals(start, value_b + len(VALUES[1]) + len(after_value))
        self._after_call = re.compile(rf"\s*{_loose(after_call)}") if after_call else re.compile("")
        self._name = re.compile(
            rf"\s*([^\s<>]+?)(?:{_loose(after_name)}|\s*(?={_loose(before_key)}))"
            if after_name
            else rf"\s*([^\s<>]+?)\s*(?={_loose(before_key)}|{_loose(after_call)})"
        )
        self._parameter = re.compile(
            rf"\s*{_loose(before_key)}(?P<key>[^<>\n]*?)"
            rf"(?:(?P<text>{_loose(before_value)})|{_loose(same)}[^\"<>]*{_loose(end)})"
            rf"(?P<value>.*?){_loose(after_value)}(?=\s*(?:{_loose(before_key)}|{_loose(after_call)}))",
            re.DOTALL,
        )

    def _literals(self, start: int, end: int) -> None:
        """Keep the literals around a call: before all calls, before each, after each."""
        one, two = self._one, self._two
        opening, closing = one[:start], one[end:]
        if two.startswith(opening) and (again := two.find(one[start:end], end)) >= 0:
            between = two[end:again]
            each = os.path.commonprefix([opening[::-1], between[::-1]])[::-1]
            tag = re.search(r"[<\[]", each)
            each = each[tag.start() :] if tag else each.lstrip()
            closing = os.path.commonprefix([closing, between])
        else:
            each = opening
        words = sorted({*_WORD.findall(f"{opening} {one[end:]} {closing} {each}")}, key=len, reverse=True)
        self._between = re.compile("|".join([*map(re.escape, words), _GLUE]))
        # What starts a call: any of its tags, as models sometimes leave out the first, else the whole text.
        begins = [word for word in _WORD.findall(opening) if word[0] in "<[" and word not in self._answer]
        begins = begins or [opening.strip()]
        self._mark = re.compile("|".join(map(re.escape, begins)))

    def read(self, text: str, schemas: Schemas | None = None) -> Reading:
        """Return the calls in an answer.

        Args:
            text: what the model wrote after its prompt, with or without reasoning.
            schemas: the parameters' JSON Schema of each candidate tool, by name; it types the values that a
                format writes as bare text.
        """
        text, _ = split_thought(text)
        if self._mark.pattern:
            mark = self._mark.search(text)
            start = mark.start() if mark else -1
        else:  # Llama 3 writes a bare object, which is the whole answer and never a part of it
            bare = re.sub(r"^(?:\s|<\|[a-z_]+\|>)+", "", text)
            start = len(text) - len(bare) if bare.startswith("{") else -1
        if start < 0:
            return Reading([], text.strip(), False)
        content, place = text[:start].strip(), start
        if self._quote:
            text = text[:start] + _as_json(text[start:], self._quote)
        calls: list[ToolCall] = []
        while found := self._read_one(text, self._skip(text, place), schemas or {}):
            calls.append(found[0])
            place = found[1]
        # nothing after the last call may start like a call
        again = bool(self._mark.pattern and self._mark.search(text, place))
        return Reading(calls, content, not calls or again)

    def _skip(self, text: str, place: int) -> int:
        """Return the position after the literals between two calls."""
        while (glue := self._between.match(text, place)) and glue.end() > place:
            place = glue.end()
        return place

    def _object(self, text: str, place: int, schemas: Schemas) -> tuple[ToolCall, int] | None:
        value, end = _decoded(text, place)
        if not isinstance(value, dict):
            return None
        inner: dict[str, Any] = value["function"] if isinstance(value.get("function"), dict) else value
        names, arguments = self._keys
        call = call_of(first(inner, names), first(inner, arguments))
        return (call, end) if call else None

    def _named(self, text: str, place: int, schemas: Schemas) -> tuple[ToolCall, int] | None:
        if (brace := text.find("{", place)) < 0:
            return None
        start = text[place:brace].strip()
        candidates = [name for name in schemas if start.startswith(name)]
        # else all up to what follows a name
        name = max(candidates, key=len, default=re.split(rf"[\s<\[{re.escape(self._middle[:1])}]", start)[0])
        value, end = _decoded(text, brace)
        call = call_of(name, value) if isinstance(value, dict) else None
        return (call, end) if call else None

    def _tagged(self, text: str, place: int, schemas: Schemas) -> tuple[ToolCall, int] | None:
        named = self._name.match(text, place)
        if not named:
            return None
        name, place = named.group(1), named.end()
        properties = schemas.get(name, {}).get("properties", {})
        arguments: dict[str, Any] = {}
        while found := self._parameter.match(text, place):
            key, value, is_text = found["key"].strip(), found["value"], found["text"] is not None
            if self._is_typed:  # as its schema has it
                kinds = types_of(properties.get(key))
                is_text = "string" in kinds and not ("null" in kinds and value in ("null", "None"))
            arguments[key] = value
            if not is_text:
                with suppress(ValueError):  # some templates write Python literals
                    arguments[key] = literal(value)
            place = found.end()
        closed = self._after_call.match(text, place)
        return (ToolCall(name, arguments), closed.end()) if closed else None

    def _python(self, text: str, place: int, schemas: Schemas) -> tuple[ToolCall, int] | None:
        bracket = text.find("(", place)
        name = text[place:bracket].strip()
        if bracket < 0 or not re.fullmatch(r"[^\s()\[\]<>{}\"'=,]+", name):
            return None
        for end in (match.end() for match in re.compile(r"\)").finditer(text, bracket)):
            try:
                call = ast.parse(f"f{text[bracket:end]}", mode="eval").body
                if not isinstance(call, ast.Call) or call.args:
                    return None
                arguments = {str(word.arg): value_of(word.value) for word in call.keywords}
            except (SyntaxError, ValueError, RecursionError, MemoryError):
                continue
            return ToolCall(name, arguments), end
        return None


def _decoded(text: str, place: int) -> tuple[Any, int]:
    try:
        return _JSON.raw_decode(text, place)
    except (ValueError, RecursionError):
        return None, place


def arguments_of(value: Any, decode: Callable[[str], Any]) -> Any:
    """Return the arguments of a call, decoded if they are text, where `""` and None mean none."""
    for _ in range(2):  # encoded twice, as by models that have seen OpenAI's format
        if isinstance(value, str):
            value = decode(value) if value.strip() else {}
    return {} if value is None else value


def call_of(name: Any, arguments: Any) -> ToolCall | None:
    """Return a call, None if it is invalid; arguments are an object or JSON text, where `""` means none."""
    try:
        arguments = arguments_of(arguments, json.loads)
        json.dumps([name, arguments], allow_nan=False, ensure_ascii=False).encode()
    except (ValueError, RecursionError):  # NaN, a lone surrogate, not JSON
        return None
    is_valid = isinstance(name, str) and name and isinstance(arguments, dict)
    return ToolCall(name, arguments) if is_valid else None


def split_thought(text: str) -> tuple[str, str]:
    """Return an answer without its reasoning, which may have started in the prompt, and the reasoning.

    Marks that are only mentioned, in a sentence, in code or in an argument, are a part of the answer.
    """
    thought = ""
    for opening, closing in THOUGHTS:
        before, closed, after = text.partition(closing)
        said, opened, inside = before.partition(opening)
        in_call = said.count("{") > said.count("}") or said.count("[") > said.count("]")
        if not closed or (not opened and closing == _ENDS_TURNS) or in_call:
            continue
        beside = re.search(r"\S[ \t]+$|[\"'(]$", said)
        in_sentence = beside and (opened or re.match(r"[ \t.,;:!?)\"']", after))
        if in_sentence or said.count("`") % 2:
            continue
        text, thought = (said + after, inside) if opened else (after, said)
    return text, thought.strip()


def _keys(value: Any) -> tuple[Sequence[str], Sequence[str]]:
    """Return the keys that have the name and the arguments in an object, or in one inside it."""
    inner = next((item for item in value.values() if isinstance(item, dict) and NAME in item.values()), value)
    name = next((key for key, item in inner.items() if item == NAME), None)
    if name is None:
        raise ValueError("the template writes calls in an unknown format")
    arguments = next((key for key, item in inner.items() if KEYS[0] in json.dumps(item)), "arguments")
    return (name, "name"), (arguments, "arguments", "parameters")


def _loose(literal: str) -> str:
    """Return a pattern for a literal that ignores white space between tags."""
    words = r"\s*".join(map(re.escape, literal.split()))
    return r"\n?" * literal[:1].isspace() + words + r"\n?" * literal[-1:].isspace()


def _as_json(text: str, quote: str) -> str:
    """Return objects with unusual quotation marks and unquoted keys as JSON."""
    parts = text.split(quote)
    for place, part in enumerate(parts):
        if place % 2:
            parts[place] = json.dumps(part, ensure_ascii=False)
        else:
            parts[place] = re.sub(r'([{,]\s*)([^\s:"{}\[\],<>|][^:"{}\[\],<>|]*?)\s*:', r'\1"\2":', part)
    return "".join(parts)


def same_calls(one: Sequence[ToolCall], other: Sequence[ToolCall]) -> bool:
    """Tell whether calls are equal as JSON, in the same order: 1 is not true."""
    return json.dumps(list(one), sort_keys=True) == json.dumps(list(other), sort_keys=True)
