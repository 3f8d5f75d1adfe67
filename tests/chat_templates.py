"""Official chat templates, fetched from PyPI, and how each is trained.

As a command it prints the table of docs/training.md:

python tests/chat_templates.py
"""

import json
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import platformdirs

from mcp_lora.data.records import RowError, ToolCall
from mcp_lora.errors import McpLoraError
from mcp_lora.prompts.chat_template import ChatTemplate

LLAMA_CPP = "llama-cpp-python==0.3.36"  # its sdist carries vendor/llama.cpp/models/templates
TRL = "trl==1.16.0"  # trl/chat_templates, without those that are changed for training
# What real tokenizers know as one token; a template file alone does not say.
SPECIAL = re.compile(
    r"<\|[^|<>\n ]{1,40}\|>|<｜[^｜<>\n]{1,40}｜>|\[/?[A-Z_]{3,20}\]|\[e~\[|\]~!?b\[?\]?|</?s>|<[be]os>"
    r"|<(?:start|end)_of_\w+>|<turn\|>|<\|turn>|<\|tool\w*>|<tool\w*\|>|<\|channel>|<channel\|>"
    r"|<seed:[be]os>|</assistant>|<SPECIAL_\d+>|<sep>"
)
EOS = (
    "<|im_end|>",
    "<|eot_id|>",
    "<turn|>",
    "<end_of_turn>",
    "<|end_of_text|>",
    "<｜end▁of▁sentence｜>",
    "<|END_OF_TURN_TOKEN|>",
    "[e~[",
    "<seed:eos>",
    "<|return|>",
    "<|assistant_end|>",
    "<|endoftext|>",
    "<|end|>",
    "</s>",
)


def _tool(name: str, **types: Any) -> dict[str, Any]:
    properties = {key: kind | {"description": "A value."} for key, kind in types.items()}
    parameters = {"type": "object", "properties": properties, "required": []}
    return {
        "type": "function",
        "function": {"name": name, "description": "Does it.", "parameters": parameters},
    }


TOOLS = [
    _tool("get-sum.v2/x", a={"type": "integer"}, b={"type": "string"}),
    _tool(
        "add",
        n={"type": "integer"},
        o={"type": "object"},
        t={"type": "boolean"},
        x={"anyOf": [{"type": "string"}, {"type": "null"}]},  # as MCP servers in Python write it
        f={"type": "number"},
        s={"type": "string"},
    ),
    _tool("none"),
]
# Hard ones, by what is hard about them.
CALLS = {
    "one call": [ToolCall("get-sum.v2/x", {"a": 3, "b": "four"})],
    "types": [ToolCall("add", {"n": 3, "o": {"k": [1, "two", None]}, "t": True, "x": None, "f": 1.5})],
    "quotes, lines": [ToolCall("add", {"s": 'He said "hi"\nnext <b> & c\'s \\ {x}'})],
    "digits as text": [ToolCall("add", {"s": "123"})],
    "no arguments": [ToolCall("none", {})],
    "marks as text": [ToolCall("add", {"s": "a </tool_call> } b"})],
    "parallel calls": [ToolCall("add", {"s": "one"}), ToolCall("get-sum.v2/x", {"a": 4, "b": "b"})],
}
SYSTEM = {"role": "system", "content": "Be good."}
QUESTION = {"role": "user", "content": "What is it?"}
RESULT = {"role": "tool", "tool_call_id": "000000001", "content": "7"}
ANSWER = {"role": "assistant", "content": "It is 7."}


def calling(calls: list[ToolCall], content: str | None = None) -> dict[str, Any]:
    """A message with calls, with the ids that every prompt has."""
    made = [
        {
            "id": f"{number:09d}",
            "type": "function",
            "function": {"name": call.name, "arguments": json.dumps(call.arguments)},
        }
        for number, call in enumerate(calls, 1)
    ]
    return {"role": "assistant", "content": content, "tool_calls": made}


def fetched(package: str, *options: str) -> Path:
    """A package's file from PyPI, unpacked into the user's cache."""
    folder = Path(platformdirs.user_cache_dir("mcp-lora")) / "tests" / package
    if not folder.is_dir():
        new = folder.with_name(f"{folder.name}.new")
        shutil.rmtree(new, ignore_errors=True)  # what an interrupted download has left
        argv = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(new), package]
        subprocess.run([*argv, *options], check=True, capture_output=True)
        (file,) = new.iterdir()
        if file.suffix == ".whl":
            with zipfile.ZipFile(file) as wheel:
                wheel.extractall(new)
        else:
            with tarfile.open(file) as archive:
                members = [
                    member for member in archive if "/vendor/llama.cpp/models/templates/" in member.name
                ]
                archive.extractall(new, members, filter="data")
        file.unlink()
        new.rename(folder)
    return folder


def templates() -> Iterator[tuple[str, str]]:
    """Name and text of each template; TRL's are named trl/…"""
    for file in sorted(fetched(LLAMA_CPP, "--no-binary", ":all:").rglob("*.jinja")):
        yield file.stem, file.read_text(encoding="utf-8")
    for file in sorted(fetched(TRL).glob("trl/chat_templates/*.jinja")):
        if not file.stem.endswith("_training"):
            yield f"trl/{file.stem}", file.read_text(encoding="utf-8")


def tokenizer_of(template: str) -> Any:
    """A byte-level tokenizer that knows the special tokens of a template."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    eos = next((token for token in EOS if token in template), "</s>")
    special = sorted({*SPECIAL.findall(template), eos, "<s>"})
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE({letter: place for place, letter in enumerate(letters)}, []))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token=eos, bos_token="<s>", pad_token=eos, chat_template=template
    )


@dataclass
class Outcome:
    """How a template is trained, or why not; what of CALLS and of an answer is left out."""

    template: ChatTemplate | None = None
    refused: str = ""
    left_out: list[str] = field(default_factory=list)
    samples: int = 0  # of a conversation with a call, its result and an answer; 0 if it is left out

    @property
    def words(self) -> str:
        if not self.template:
            return "refused"
        return "its own" if self.template.is_own else "mcp-lora's"


def outcome_of(template: str) -> Outcome:
    """Try everything on a template."""
    try:
        found = Outcome(ChatTemplate(tokenizer_of(template)))
    except McpLoraError as error:
        return Outcome(refused=str(error))
    assert found.template
    for name, calls in CALLS.items():
        try:
            found.template.turn([SYSTEM, QUESTION], calling(calls), TOOLS)
        except RowError:
            found.left_out.append(name)
    messages = [SYSTEM, QUESTION, calling(CALLS["one call"]), RESULT, ANSWER]
    try:
        found.samples = len(found.template.encode({"messages": messages, "tools": TOOLS}))
    except RowError:
        found.left_out.append("an answer after a result")
    return found


def table(outcomes: Mapping[str, Outcome]) -> Iterator[str]:
    """The table of docs/training.md, a line each."""
    yield "| chat template | rendered by | call, result, answer | left out, and counted |"
    yield "| --- | --- | --- | --- |"
    for name, found in outcomes.items():
        shape = {0: "–", 1: "one sample"}.get(found.samples, "one sample per turn")
        yield f"| {name} | {found.words} | {shape} | {', '.join(found.left_out) or '–'} |"


if __name__ == "__main__":
    print("\n".join(table({name: outcome_of(text) for name, text in templates()})))
