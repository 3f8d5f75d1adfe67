"""Ask the base model and the adapter the held-out questions, and compare how often they are right.

RUN/eval/ holds the answers (see mcp_lora.answers) and metrics.json, the figures.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from mcp_lora import answering, questions, runs
from mcp_lora.answers import Answer, Judge, Notebook
from mcp_lora.config import Machine
from mcp_lora.errors import McpLoraError
from mcp_lora.figures import Difference, Share, difference, share
from mcp_lora.prompts import render, rendered
from mcp_lora.prompts.render import ChatTemplate
from mcp_lora.questions import Question
from mcp_lora.records import Fault

BASE, ADAPTER = "base", "adapter"
# The figures of a split; where no tool fits, the last alone.
FIGURES = ("valid", "schema", "tool", "param", "ast", "exact", "abstained")
_BATCH = 16


@dataclass(frozen=True)
class Split:
    """The figures of one test, per model, and what each other model gains on the first.

    `errors` counts the first errors of the answers that are not right.
    """

    count: int
    figures: dict[str, dict[str, Share]]
    errors: dict[str, dict[str, int]]
    gains: dict[str, dict[str, Difference]]


@dataclass(frozen=True)
class Weakness:
    """A server, or one of its tools, and how many of its questions each model has right (`ast`)."""

    server: str
    tool: str
    right: dict[str, Share]


@dataclass(frozen=True)
class Evaluation:
    """Figures by split, the servers and tools that are worst for the last model first, every answer.

    `left_out` counts the questions that could not be asked, by reason.
    """

    splits: dict[str, Split]
    servers: list[Weakness]
    tools: list[Weakness]
    answers: dict[str, list[Answer]]
    left_out: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Endpoint:
    """A server that speaks OpenAI's protocol, and the name of a model there."""

    url: str
    model: str


def evaluate(
    run: Path,
    machine: Machine,
    checkpoint: str | None = None,
    splits: Sequence[str] = (),
    limit: int | None = None,
    models: Sequence[str] = (BASE, ADAPTER),
    endpoint: Endpoint | None = None,
    progress: Callable[[str, float], None] = lambda doing, share: None,
) -> Evaluation:
    """Answer a run's held-out questions greedily and judge the answers.

    Args:
        run: the run's folder.
        machine: where the engine runs.
        checkpoint: of which the adapter is taken; the newest if None.
        splits: keys of questions.SPLITS; none means all that there are.
        limit: questions of each.
        models: BASE, ADAPTER or both.
        endpoint: ask this instead; what is kept of the base model's answers is compared with it.
        progress: is told how far a server's questions are.

    Raises:
        McpLoraError: there is no adapter or nothing is held out, the engine or the server fails, or the
            run's folder cannot be written.
    """
    config = runs.read_run(run)
    folder = Path(config["dataset_dir"])
    wanted = {question.split for question in questions.read(folder, list(splits))}
    adapter = runs.adapter(run, checkpoint) if ADAPTER in models and not endpoint else None
    template = render.load(config)
    every, left_out = _fitting(questions.read(folder, []), template, config)
    number: Counter[str] = Counter()
    asked = []
    for question in every:
        number[question.split] += 1
        if question.split in wanted and number[question.split] <= (limit or number[question.split]):
            asked.append(question)
    if not asked:
        reasons = ", ".join(f"{count} {reason}" for reason, count in left_out.items())
        raise McpLoraError(f"no held-out question can be asked ({reasons}): mcp-lora inspect 1 --split seen")
    settings = runs.serving_config(run, None) | {
        "max_new_tokens": _answer_length(template, every),
        "per_device_eval_batch_size": _BATCH,
    }
    judge = Judge(template)

    def notebook(name: str, *identity: Any) -> Notebook:
        file = run / "eval" / f"{re.sub(r'[^A-Za-z0-9._-]', '_', name)}.jsonl"
        return Notebook(file, every, [settings, template.tokenizer.chat_template, *identity], judge)

    answers = {}
    if endpoint:
        base = notebook(BASE, None)
        if not base.missing(asked):
            with _writing(run):
                answers[BASE] = base.answers(asked)
        models = [endpoint.model]
    for name in models:
        if endpoint:
            book = notebook(f"endpoint-{name}", asdict(endpoint))
            missing = book.missing(asked)
            found = answering.by_endpoint(missing, endpoint.url, name, settings["max_new_tokens"], template)
        else:
            loaded = adapter if name == ADAPTER else None
            book = notebook(name, loaded and _hash(loaded))
            missing = book.missing(asked)
            serving = settings | runs.serving_config(run, loaded)
            found = answering.by_engine(missing, template, serving, machine, f"mcp-lora eval {run}")
        for done, (question, said) in enumerate(found, 1):
            with _writing(run):
                book.add(question, said)
            progress(f"asking {name}", done / len(missing))
        with _writing(run):
            answers[name] = book.answers(asked)
    evaluation = replace(summarise(answers), left_out=left_out)
    metrics = json.dumps(_as_metrics(evaluation), indent=2, ensure_ascii=False)
    with _writing(run):
        (run / "eval" / "metrics.json").write_text(metrics + "\n", encoding="utf-8")
    return evaluation


@contextmanager
def _writing(run: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise McpLoraError(
            f"{error.filename or run / 'eval'} cannot be written ({error.strerror}): make room or grant it, "
            f"and mcp-lora eval {run}"
        ) from None


def summarise(answers: dict[str, list[Answer]]) -> Evaluation:
    """Return the figures of models' answers to the same questions, at least one, in the same order."""
    first = next(iter(answers))
    splits = {}
    for split in dict.fromkeys(answer.split for answer in answers[first]):
        of = {name: [one for one in said if one.split == split] for name, said in answers.items()}
        shown = FIGURES[-1:] if split == "no_call" else FIGURES
        right = {
            name: {figure: [bool(getattr(one.verdict, figure)) for one in said] for figure in shown}
            for name, said in of.items()
        }
        splits[split] = Split(
            len(of[first]),
            {
                name: {figure: share(sum(hits), len(hits)) for figure, hits in found.items()}
                for name, found in right.items()
            },
            {
                name: dict(Counter(one.verdict.error for one in said if one.verdict.error).most_common())
                for name, said in of.items()
            },
            {
                name: {figure: difference(right[first][figure], hits) for figure, hits in found.items()}
                for name, found in right.items()
                if name != first
            },
        )
    return Evaluation(
        splits,
        _weaknesses(answers, lambda answer: (answer.server, "")),
        _weaknesses(answers, lambda answer: (answer.server, answer.expected[0].name)),
        answers,
    )


@dataclass(frozen=True)
class Requirement:
    """A bound on a figure of a split, as it was written: unseen_tool.ast>=0.6."""

    text: str
    split: str
    figure: str
    sign: str
    bound: float


def requirement(text: str) -> Requirement:
    """Read `SPLIT.FIGURE>=SHARE`, or with >, <=, <; the share from 0 to 1, or in %.

    Raises:
        McpLoraError: it is of another form.
    """
    found = re.fullmatch(r"\s*(\w+)\.(\w+)\s*(>=|<=|>|<)\s*(\d*\.?\d+)(%?)\s*", text)
    if not found:
        raise McpLoraError(
            f'--require {text} is of another form: mcp-lora eval --require "unseen_tool.ast>=0.6"'
        )
    split, figure, sign, bound, percent = found.groups()
    return Requirement(text.strip(), split, figure, sign, float(bound) / (100 if percent else 1))


def unmet(evaluation: Evaluation, requirements: Sequence[Requirement]) -> list[str]:
    """Return, in words, the requirements that the last model's figures do not meet.

    Raises:
        McpLoraError: one names a figure that there is not.
    """
    told = []
    name = list(evaluation.answers)[-1]
    there = {
        f"{split}.{figure}": share.share
        for split, each in evaluation.splits.items()
        for figure, share in each.figures[name].items()
    }
    for wanted in requirements:
        figure = f"{wanted.split}.{wanted.figure}"
        if figure not in there:
            raise McpLoraError(f"--require {wanted.text}: there is no {figure} but {', '.join(there)}")
        value, bound = there[figure], wanted.bound
        holds = {">=": value >= bound, "<=": value <= bound, ">": value > bound, "<": value < bound}
        if not holds[wanted.sign]:
            told.append(f"{figure} is {value:.3f}, and {wanted.text} is required")
    return told


def _weaknesses(
    answers: dict[str, list[Answer]], place: Callable[[Answer], tuple[str, str]]
) -> list[Weakness]:
    """Return each place's share of right answers, the last model's worst first; where a tool fits only."""
    grouped: dict[tuple[str, str], dict[str, list[bool]]] = {}
    for name, said in answers.items():
        for answer in said:
            if answer.expected:
                found = grouped.setdefault(place(answer), {})
                found.setdefault(name, []).append(answer.verdict.ast)
    weaknesses = [
        Weakness(*where, {name: share(sum(hits), len(hits)) for name, hits in models.items()})
        for where, models in grouped.items()
    ]
    last = list(answers)[-1]
    return sorted(weaknesses, key=lambda one: (one.right[last].share, -one.right[last].count))


def _fitting(
    asked: Sequence[Question], template: ChatTemplate, config: Mapping[str, Any]
) -> tuple[list[Question], dict[str, int]]:
    """Return the questions with the tools that cutoff_len has room for, and why others are left out."""
    fitting, left_out = [], Counter[str]()
    settings = rendered.settings_of(config) | {"mask_history": True}  # of the conversation the answer alone
    for question in asked:
        try:
            fitted = rendered.fit(template, question.sample, settings)
        except Fault as fault:
            left_out[fault.reason] += 1
            continue
        fitting.append(replace(question, sample=dict(fitted.row)))
    return fitting, dict(left_out)


def _answer_length(template: ChatTemplate, asked: Sequence[Question]) -> int:
    """Return how many tokens an answer may have: those of the longest right one, and some for another
    way to write it. A model that does not stop need not be waited for any longer.
    """
    return max(len(template.ids(template.turn(*question.turn)[1])) + 32 for question in asked)


def _hash(adapter: Path) -> str:
    """Return the hash of an adapter's weights."""
    file = next(iter(adapter.glob("adapter_model.*")), adapter / "adapter_config.json")
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _as_metrics(evaluation: Evaluation) -> dict[str, Any]:
    return {
        "splits": {name: asdict(split) for name, split in evaluation.splits.items()},
        "servers": [asdict(place) for place in evaluation.servers],
        "tools": [asdict(place) for place in evaluation.tools],
        "left_out": evaluation.left_out,
    }
