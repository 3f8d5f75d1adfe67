"""The Berkeley Function Calling Leaderboard's single-turn questions, judged by its own checker.

Both come with the package bfcl-eval (Apache-2.0; Patil et al., gorilla.cs.berkeley.edu), which is read as the
zip file that it is: installed, it would bring the SDKs of every provider. One question and its answer:

    {"id": "parallel_0", "question": [[{"role": "user", "content": "Play songs from …"}]],
     "function": [{"name": "spotify.play", "description": "Play specific tracks …",
                   "parameters": {"type": "dict", "properties": {"artist": {"type": "string", …}, …}}}]}
    {"id": "parallel_0", "ground_truth": [{"spotify.play": {"artist": ["Taylor Swift"], "duration": [20]}}]}
"""

import json
import sys
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from mcp_lora.data.records import ToolCall
from mcp_lora.data.rows import SYSTEM_MESSAGE
from mcp_lora.engine import launch
from mcp_lora.evaluate.questions import Question
from mcp_lora.evaluate.score import Verdict

NAME = "bfcl"
PACKAGE = "bfcl-eval==2026.3.23"
SHA256 = "3bb6dfa5f0c68ad403c9ec50b00db2bb3b4cc9b38ab1ff33f48fe30d853d3a0a"
# The leaderboard's names. Java and JavaScript are left out: their values are code in strings.
CATEGORIES = {
    "simple": "simple_python",
    **{name: name for name in ("multiple", "parallel", "parallel_multiple", "irrelevance")},
    **{f"live_{name}": f"live_{name}" for name in ("simple", "multiple", "parallel", "parallel_multiple")},
    "live_irrelevance": "live_irrelevance",
}
_TYPES = {"dict": "object", "float": "number", "tuple": "array", "any": "string"}
_HINT = " Note that the provided function is in Python 3 syntax."  # the leaderboard adds it, too


@cache
def wheel() -> Path:
    """Return the package's file, in the user's cache folder; fetch it if it is missing.

    Raises McpLoraError if it cannot be fetched, or is not the pinned file.
    """
    target = launch.cache(f"{PACKAGE}.whl")
    return launch.cached(target, lambda scratch: launch.download(PACKAGE, scratch, SHA256, "mcp-lora eval"))


def is_asked_in(split: str) -> bool:
    """Tell whether a split is a category of the benchmark, not one of held-out questions."""
    return split.startswith(f"{NAME}.")


def questions() -> list[Question]:
    """Return the questions of all categories, each of which is a split.

    A sample has the leaderboard's id, functions and accepted answers beside messages and tools. Its last
    message makes the first of the accepted calls.
    """
    found = []
    with zipfile.ZipFile(wheel()) as packed:

        def rows(name: str) -> Iterator[Any]:
            return map(json.loads, packed.read(f"bfcl_eval/data/{name}.json").splitlines())

        for category, name in CATEGORIES.items():
            asked = rows(f"BFCL_v4_{name}")
            truths = {}
            if "irrelevance" not in name:
                truths = {row["id"]: row["ground_truth"] for row in rows(f"possible_answer/BFCL_v4_{name}")}
            found += [
                Question(f"{NAME}.{category}", _sample(row, truths.get(row["id"], []))) for row in asked
            ]
    return found


def judged(question: Question, calls: Sequence[ToolCall], verdict: Verdict) -> Verdict:
    """Return our verdict on an answer, corrected by the leaderboard's if it is to one of its questions.

    `ast` becomes what its checker says, while ours compares with the first of the accepted calls, and finds
    the kind of error. Where no call is right, text that is cut off is none.
    """
    if not is_asked_in(question.split):
        return verdict
    if not (accepted := question.sample["accepted"]):
        return replace(verdict, abstained=True, error=None) if verdict.error == "cut off" else verdict
    answer = [{call.name: call.arguments} for call in calls]
    try:
        right = checker()(question.sample["functions"], answer, accepted, question.split)
    except OverflowError:  # a number of hundreds of digits
        right = False
    return replace(verdict, ast=right, error=None if right else verdict.error or "wrong value")


@cache
def checker() -> Callable[[list[Any], list[Any], list[Any], str], bool]:
    """Return the leaderboard's checker, of functions, the calls of an answer, accepted calls and category."""
    # of the table of models, which imports every provider's SDK, only this is used: names are as they are
    models = ModuleType("bfcl_eval.constants.model_config")
    vars(models)["MODEL_CONFIG_MAPPING"] = defaultdict(lambda: SimpleNamespace(underscore_to_dot=False))
    sys.modules[models.__name__] = models
    sys.path.insert(0, str(wheel()))
    try:
        python = import_module("bfcl_eval.constants.enums").Language.PYTHON
        ast_checker = import_module("bfcl_eval.eval_checker.ast_eval.ast_checker").ast_checker
    finally:
        sys.path.remove(str(wheel()))

    def check(functions: list[Any], answer: list[Any], accepted: list[Any], category: str) -> bool:
        return bool(ast_checker(functions, answer, accepted, python, category, "any")["valid"])

    return check


def _sample(row: Mapping[str, Any], accepted: list[dict[str, dict[str, list[Any]]]]) -> dict[str, Any]:
    """Return a question as one of a converted dataset, with a system message if it has none.

    As the leaderboard does for servers that reject it, "." in a tool's name becomes "_".
    """
    messages = list(row["question"][0])
    if messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": SYSTEM_MESSAGE})
    functions = [one | {"name": one["name"].replace(".", "_")} for one in row["function"]]
    accepted = [{name.replace(".", "_"): values for name, values in one.items()} for one in accepted]
    calls = []
    for number, one in enumerate(accepted, 1):
        ((name, values),) = one.items()
        call = {"name": name, "arguments": json.dumps(_firsts(values), ensure_ascii=False)}
        calls.append({"id": f"call_{number}", "type": "function", "function": call})
    answer = {"content": None, "tool_calls": calls} if calls else {"content": "No tool fits."}
    tools = [
        one | {"description": one["description"] + _HINT, "parameters": _schema(one["parameters"])}
        for one in functions
    ]
    return {
        "id": row["id"],
        "messages": [*messages, {"role": "assistant"} | answer],
        "tools": [{"type": "function", "function": tool} for tool in tools],
        "functions": functions,
        "accepted": accepted,
    }


def _firsts(accepted: Mapping[str, list[Any]]) -> dict[str, Any]:
    """Return the first accepted value of each argument that may not be left out."""
    return {name: _first(values[0]) for name, values in accepted.items() if values and "" not in values}


def _first(accepted: Any) -> Any:
    """Return the value itself; an object lists the accepted values of each of its keys."""
    if isinstance(accepted, dict):
        return {name: values[0] for name, values in accepted.items() if values and "" not in values}
    return [_first(item) for item in accepted] if isinstance(accepted, list) else accepted


def _schema(schema: Any) -> Any:
    """Return a schema with JSON's names of types instead of Python's, as the leaderboard does."""
    if isinstance(schema, list):
        return [_schema(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: _schema(value) for key, value in schema.items()}
    if isinstance(name := found.get("type"), str):
        found["type"] = _TYPES.get(name, name)
    return found
