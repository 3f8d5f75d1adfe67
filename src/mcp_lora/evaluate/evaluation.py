"""Ask the base model and the adapter the held-out questions, and compare how often they are right.

RUN/eval/ holds the answers (see mcp_lora.evaluate.answers) and metrics.json, the figures.
"""

import json
import operator
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

from mcp_lora.data import files
from mcp_lora.data.records import Fault
from mcp_lora.engine import api
from mcp_lora.engine.topology import find as find_topology
from mcp_lora.errors import McpLoraError
from mcp_lora.evaluate import predict, questions
from mcp_lora.evaluate.answers import Answer, Judge, Notebook, Said
from mcp_lora.evaluate.questions import Question
from mcp_lora.evaluate.stats import Difference, Share, difference, share
from mcp_lora.prompts import chat_template, render
from mcp_lora.prompts.chat_template import IGNORED, ChatTemplate
from mcp_lora.train import manifest, runs
from mcp_lora.train.machine import detect_machine

BASE, ADAPTER = "base", "adapter"
ASKED = "adapter.sha256"  # the hash of the adapter whose answers are kept
# The figures of a split; where no tool fits, the last alone.
FIGURES = ("valid", "schema", "tool", "param", "ast", "exact", "abstained")
_THOUGHT = 1024  # tokens
_SIGNS = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}


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
    max_new_tokens: int = 0

    def metrics(self) -> str:
        """Return all but the answers as JSON: metrics.json."""
        found = {key: value for key, value in vars(self).items() if key != "answers"}
        return json.dumps(found, default=asdict, indent=2, ensure_ascii=False) + "\n"


@dataclass(frozen=True)
class Endpoint:
    """An OpenAI-compatible server, and the name of a model there."""

    url: str
    model: str


@dataclass(frozen=True)
class Request:
    """What is asked for: which of a run's held-out questions are put to which model.

    Attributes:
        run: the run's folder.
        checkpoint: of which the adapter is taken; the newest if None.
        splits: keys of questions.SPLITS; none means all that there are.
        limit: questions of each.
        models: BASE, ADAPTER or both.
        endpoint: ask this server instead; the base model's answers that are kept are compared with it.
        max_new_tokens: that an answer may have; by default what the longest right one has and some more.
        batch_size: questions at a time of each process; halved where memory runs out.
        gpus: that share the questions; all by default.
        requirements: of splits that are asked.
    """

    run: Path
    checkpoint: str | None = None
    splits: Sequence[str] = ()
    limit: int | None = None
    models: Sequence[str] = (BASE, ADAPTER)
    endpoint: Endpoint | None = None
    max_new_tokens: int | None = None
    batch_size: int = 16
    gpus: int | None = None
    requirements: Sequence["Requirement"] = ()


def evaluate(
    request: Request, progress: Callable[[str, float], None] = lambda doing, share: None
) -> Evaluation:
    """Answer a run's held-out questions greedily and judge the answers.

    `progress` receives the share of a model's questions that are answered.

    Raises McpLoraError where there is no adapter or nothing is held out, the engine or the server fails, or
    the run's folder cannot be written.
    """
    api.require()
    run, config = request.run, runs.read_run(request.run)
    folder = Path(config["dataset_dir"])
    manifest.check_data(run, folder)
    wanted, read = questions.chosen(folder, request.splits), questions.read(folder, [])
    if idle := [one.text for one in request.requirements if one.figure.split(".")[0] not in wanted]:
        raise McpLoraError(f"--require {idle[0]}: questions are of {', '.join(wanted)}: mcp-lora eval {run}")
    adapter = None
    if ADAPTER in request.models and not request.endpoint:
        adapter = runs.adapter(run, request.checkpoint)
    template = chat_template.load(config)
    # of every split, whichever are wanted: what is kept is for answers of one length
    every, left_out, longest = _rendered(read, template, config)
    by_split: dict[str, list[Question]] = defaultdict(list)
    for question in every:
        by_split[question.split].append(question)
    asked = [one for split, found in by_split.items() if split in wanted for one in found[: request.limit]]
    if not asked:
        reasons = ", ".join(f"{count} {reason}" for reason, count in left_out.items())
        raise McpLoraError(f"no held-out question can be asked ({reasons}): mcp-lora inspect 1 --split seen")
    # there are other ways to write it, and a thought before it has no bound but this
    more = _THOUGHT if template.switches_thinking and template.thinking else 32
    length = request.max_new_tokens or longest + more
    judge, answers = Judge(template), {}
    common = [runs.serving_config(run, None), length, template.tokenizer.chat_template]
    try:
        for model in _models(request, template, adapter, length):
            file = run / "eval" / f"{quote(model.file, safe='')}.jsonl"
            book = Notebook(file, every, [*common, model.identity], judge)
            missing = book.missing(asked)
            if missing and model.only_kept:
                continue
            with closing(model.ask(missing)) as found:  # nothing outlives a failure to keep an answer
                for done, (question, said) in enumerate(found, 1):
                    book.add(question, said)
                    progress(f"asking {model.name}", done / len(missing))
            answers[model.name] = book.answers(asked)
        evaluation = replace(summarise(answers), left_out=left_out, max_new_tokens=length)
        if adapter:
            (run / "eval" / ASKED).write_text(adapter_hash(adapter), encoding="utf-8")
        # what a part of the questions gives does not replace what all give
        name = "metrics.json" if len(asked) == len(every) else "metrics_part.json"
        (run / "eval" / name).write_text(evaluation.metrics(), encoding="utf-8")
    except OSError as error:
        raise McpLoraError(
            f"{error.filename or run / 'eval'} cannot be written ({error.strerror}): make room or grant it, "
            f"and mcp-lora eval {run}"
        ) from None
    return evaluation


@dataclass(frozen=True)
class _Model:
    """One that is asked: its name, its answers' file, what makes it another one, and how it is asked.

    With `only_kept` nothing new is asked: it is compared where it has all answers already.
    """

    name: str
    file: str
    identity: Any
    ask: Callable[[Sequence[Question]], Generator[tuple[Question, Said]]]
    only_kept: bool = False


def _models(request: Request, template: ChatTemplate, adapter: Path | None, length: int) -> Iterator[_Model]:
    """Yield what is asked, in the order in which it is compared."""
    machine = detect_machine()
    topology = find_topology(os.environ, machine.gpus, request.gpus, nodes=1, node_rank=0)
    for name in [BASE] if request.endpoint else request.models:
        loaded = adapter if name == ADAPTER else None
        settings = runs.serving_config(request.run, loaded)
        settings |= {"max_new_tokens": length, "per_device_eval_batch_size": request.batch_size}
        ask = partial(
            predict.by_engine,
            template=template,
            settings=settings,
            machine=machine,
            topology=topology,
            command=f"mcp-lora eval {request.run}",
        )
        yield _Model(name, name, loaded and adapter_hash(loaded), ask, only_kept=bool(request.endpoint))
    if request.endpoint:
        url, name = request.endpoint.url, request.endpoint.model
        ask = partial(predict.by_endpoint, url=url, model=name, max_tokens=length, template=template)
        yield _Model(name, f"endpoint-{name}", asdict(request.endpoint), ask)


def summarise(answers: dict[str, list[Answer]]) -> Evaluation:
    """Return the figures of models' answers to the same questions, at least one, in the same order."""
    first = next(iter(answers.values()))
    return Evaluation(
        {split: _split(split, answers) for split in dict.fromkeys(answer.split for answer in first)},
        _weaknesses(answers, lambda answer: (answer.server, "")),
        _weaknesses(answers, lambda answer: (answer.server, answer.expected[0].name)),
        answers,
    )


def _split(split: str, answers: dict[str, list[Answer]]) -> Split:
    verdicts = {
        name: [answer.verdict for answer in said if answer.split == split] for name, said in answers.items()
    }
    shown = FIGURES[-1:] if split == "no_call" else FIGURES
    hits = {
        name: {figure: [getattr(verdict, figure) for verdict in each] for figure in shown}
        for name, each in verdicts.items()
    }
    first, *others = hits
    count = len(verdicts[first])
    return Split(
        count,
        {name: {figure: share(sum(hits[name][figure]), count) for figure in shown} for name in hits},
        {
            name: dict(Counter(verdict.error for verdict in each if verdict.error).most_common())
            for name, each in verdicts.items()
        },
        {
            name: {figure: difference(hits[first][figure], hits[name][figure]) for figure in shown}
            for name in others
        },
    )


def _weaknesses(
    answers: dict[str, list[Answer]], place: Callable[[Answer], tuple[str, str]]
) -> list[Weakness]:
    """Return each place's share of right answers, the last model's worst first; where a tool fits only."""
    grouped: dict[tuple[str, str], dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
    for name, said in answers.items():
        for answer in said:
            if answer.expected:
                grouped[place(answer)][name].append(answer.verdict.ast)
    weaknesses = [
        Weakness(*where, {name: share(sum(hits), len(hits)) for name, hits in each.items()})
        for where, each in grouped.items()
    ]
    last = list(answers)[-1]
    return sorted(weaknesses, key=lambda one: (one.right[last].share, -one.right[last].count))


@dataclass(frozen=True)
class Requirement:
    """A bound on a figure, named SPLIT.FIGURE, as it was written: unseen_tool.ast>=0.6."""

    text: str
    figure: str
    holds: Callable[[float, float], bool]
    bound: float


def requirement(text: str) -> Requirement:
    """Read `SPLIT.FIGURE>=SHARE`, or with >, <=, <; the share from 0 to 1, or in %.

    Raises McpLoraError where it is of another form.
    """
    found = re.fullmatch(r"\s*(\w+\.\w+)\s*(>=|<=|>|<)\s*(\d*\.?\d+)(%?)\s*", text)
    if not found:
        raise McpLoraError(
            f'--require {text} is of another form: mcp-lora eval --require "unseen_tool.ast>=0.6"'
        )
    figure, sign, bound, percent = found.groups()
    split, name = figure.split(".")
    if split not in questions.SPLITS or name not in FIGURES:
        splits, names = " or ".join(questions.SPLITS), " or ".join(FIGURES)
        raise McpLoraError(f"--require {text}: a figure is SPLIT.NAME, of {splits} and {names}")
    return Requirement(text.strip(), figure, _SIGNS[sign], float(bound) / (100 if percent else 1))


def unmet(evaluation: Evaluation, requirements: Sequence[Requirement]) -> list[str]:
    """Return, in words, the requirements that the last model's figures do not meet.

    Raises McpLoraError where one names a figure that there is not.
    """
    name = list(evaluation.answers)[-1]
    there = {
        f"{split}.{figure}": share.share
        for split, each in evaluation.splits.items()
        for figure, share in each.figures[name].items()
    }
    told = []
    for wanted in requirements:
        if wanted.figure not in there:
            raise McpLoraError(f"--require {wanted.text}: there is no {wanted.figure} but {', '.join(there)}")
        value = there[wanted.figure]
        if not wanted.holds(value, wanted.bound):
            told.append(f"{wanted.figure} is {value:.3f}, and {wanted.text} is required")
    return told


def _rendered(
    read: Sequence[Question], template: ChatTemplate, config: Mapping[str, Any]
) -> tuple[list[Question], dict[str, int], int]:
    """Return the questions with the tools that cutoff_len has room for, and why others are left out.

    The number is that of the tokens of the longest right answer: a model that does not stop need not be
    waited for much longer.
    """
    # of the conversation the answer alone
    settings = render.settings_of(config) | {"mask_history": True, "train_on_prompt": False}
    fitting, left_out, longest = [], Counter[str](), 0
    for question in read:
        try:
            fitted = render.fit(template, question.sample, settings)
        except Fault as fault:
            left_out[fault.reason] += 1
            continue
        (sample,) = fitted.samples
        fitting.append(Question(question.split, dict(fitted.row), sample.prompt, sample.target))
        longest = max(longest, len(sample.labels) - sample.labels.count(IGNORED))
    return fitting, dict(left_out), longest


def adapter_hash(adapter: Path) -> str:
    """Return the hash of an adapter's weights."""
    return files.sha256(next(iter(adapter.glob("adapter_model.*")), adapter / "adapter_config.json"))
