r"""A model's answers to held-out questions, in a file that survives an interruption.

RUN/eval/MODEL.jsonl has one line per question; a question that the same model has answered is not asked
again:

    {"key": "0b9f…", "question": "77ae…", "split": "seen", "server": "everything",
     "instruction": "What is 3 plus 4?",
     "prompt": "<|im_start|>system\n…", "expected": [{"name": "get-sum", "arguments": {"a": 3, "b": 4}}],
     "text": "<tool_call>\n…", "tool_calls": [], "failed": null,
     "calls": [{"name": "get-sum", "arguments": {"a": 3, "b": 4}}],
     "verdict": {"valid": true, "schema": true, "tool": true, "param": true, "ast": true, "exact": true,
                 "abstained": false, "error": null}}
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from mcp_lora.data import files
from mcp_lora.data.calls import call_of
from mcp_lora.data.catalogue import Catalogue
from mcp_lora.data.records import ToolCall
from mcp_lora.evaluate import benchmark
from mcp_lora.evaluate.questions import Question
from mcp_lora.evaluate.score import Verdict, judge
from mcp_lora.prompts.chat_template import ChatTemplate


class Response(NamedTuple):
    """A model's response to a prompt: its text, and the calls that a server has parsed: {name, arguments}.

    `failed` is "cut off" if the answer is truncated, "no reply" if a server sent none.
    """

    prompt: str
    text: str
    tool_calls: list[dict[str, Any]]
    failed: str | None = None


@dataclass(frozen=True)
class Answer:
    """One model's answer to one question, the calls in it, and its verdict.

    `question` is the question's key, the same for every model. The rest of the question and the Response are
    repeated, so that an answer can be shown without the data.
    """

    question: str
    split: str
    server: str
    instruction: str
    expected: list[ToolCall]
    prompt: str
    text: str
    tool_calls: list[dict[str, Any]]
    failed: str | None
    calls: list[ToolCall]
    verdict: Verdict


_CALLS = ("expected", "calls")  # in a file they are objects, not tuples


class Judge:
    """Parses the calls in answers, in the format of a run's chat template, and scores them."""

    def __init__(self, template: ChatTemplate) -> None:
        self._template = template
        self._catalogue = Catalogue()

    def __call__(self, question: Question, response: Response) -> Answer:
        schemas = {name: tool.parameters for name, tool in question.tools.items()}
        if response.tool_calls:
            read = [call_of(call["name"], call["arguments"]) for call in response.tool_calls]
            calls, broken = [call for call in read if call], None in read
        else:
            reading = self._template.read(response.text, schemas)
            calls, broken = reading.calls, reading.broken
        named = [(question.tools[call.name], call.arguments) for call in calls if call.name in schemas]
        valid = all(self._catalogue.problem(tool, arguments) is None for tool, arguments in named)
        verdict = judge(question.expected, calls, schemas, broken, valid, response.failed)
        verdict = benchmark.judged(question, calls, verdict)
        about = (question.key, question.split, question.server, question.instruction, question.expected)
        return Answer(*about, *response, calls, verdict)


class Notebook:
    """The answers of one model to a run's questions.

    Args:
        file: where they are kept.
        questions: all questions of the run, in order; answers to others are dropped.
        identity: identifies the model, as JSON; answers of another model are dropped.
        length: maximum tokens per answer; answers that were cut off at another length are dropped.
        judge: scores the answers.
    """

    def __init__(
        self, file: Path, questions: Sequence[Question], identity: Any, length: int, judge: Judge
    ) -> None:
        self._file, self._judge, self._length = file, judge, length
        self._identity = json.dumps(identity, sort_keys=True)
        self._answers: dict[str, Answer | None] = {question.key: None for question in questions}
        asked = {self._key(question.key, cut): question for question in questions for cut in (False, True)}
        for key, kept in _rows(file):
            if question := asked.get(key):
                response = Response(kept.prompt, kept.text, kept.tool_calls, kept.failed)
                self._answers[question.key] = judge(question, response)
        self._clean = False  # the file may end with an incomplete line

    def missing(self, questions: Sequence[Question]) -> list[Question]:
        """Return the questions without an answer."""
        return [question for question in questions if not self._answers[question.key]]

    def add(self, question: Question, response: Response) -> None:
        """Add an answer and write it immediately."""
        if not self._clean:
            self._write()
        answer = self._answers[question.key] = self._judge(question, response)
        with self._file.open("a", encoding="utf-8") as stream:
            stream.write(self._line(answer))

    def answers(self, questions: Sequence[Question]) -> list[Answer]:
        """Return the answers to questions that all have one, and sort the file in the run's order."""
        self._write()
        return [answer for question in questions if (answer := self._answers[question.key])]

    def _write(self) -> None:
        self._file.parent.mkdir(parents=True, exist_ok=True)
        new = self._file.with_suffix(".new")
        with new.open("w", encoding="utf-8") as stream:
            stream.writelines(self._line(answer) for answer in self._answers.values() if answer)
        os.replace(new, self._file)
        self._clean = True

    def _line(self, answer: Answer) -> str:
        calls = {field: [call._asdict() for call in getattr(answer, field)] for field in _CALLS}
        row = {"key": self._key(answer.question, answer.failed == "cut off")}
        return json.dumps(row | msgspec.to_builtins(answer) | calls, ensure_ascii=False) + "\n"

    def _key(self, question: str, cut: bool) -> str:
        length = self._length if cut else ""
        return hashlib.sha256(f"{self._identity}\n{question}\n{length}".encode()).hexdigest()[:16]


def read(file: Path) -> list[Answer]:
    """Return the answers in a file; none if it does not exist."""
    return [answer for _, answer in _rows(file)]


def _rows(file: Path) -> Iterator[tuple[str, Answer]]:
    """Yield the keys and answers in a file, without lines that are incomplete or of another version."""
    for row in files.read(file) if file.is_file() else ():
        with suppress(TypeError, LookupError, ValueError):
            calls = {field: [ToolCall(**call) for call in row[field]] for field in _CALLS}
            yield row["key"], files.typed(row | calls, Answer)
