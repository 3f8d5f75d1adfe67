"""Put the held-out questions to the base model and the adapter, and compare their accuracy.

RUN/eval/ contains the answers (see mcp_lora.evaluate.answers) and metrics.json, RUN/eval/bfcl/ the same for
the benchmark.
"""

import json
import operator
from collections import Counter, defaultdict
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing, nullcontext, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from mcp_lora.data import files
from mcp_lora.data.records import RowError
from mcp_lora.engine import api
from mcp_lora.errors import McpLoraError, advice
from mcp_lora.evaluate import benchmark, plain_chat, predict, questions
from mcp_lora.evaluate.answers import Answer, Judge, Notebook, Response
from mcp_lora.evaluate.gates import Requirement, metrics_of
from mcp_lora.evaluate.parity import parity
from mcp_lora.evaluate.plain_chat import PlainChat
from mcp_lora.evaluate.questions import Question
from mcp_lora.evaluate.stats import Difference, Proportion, difference, proportion
from mcp_lora.prompts import chat_template, render
from mcp_lora.prompts.chat_template import IGNORED, ChatTemplate
from mcp_lora.train import manifest, runs
from mcp_lora.train.machine import detect_machine

BASE, ADAPTER = "base", "adapter"
_THOUGHT = 1024  # tokens


@dataclass(frozen=True)
class Split:
    """One split's `metrics` by model, and what each other model gains over the first.

    `errors` counts the wrong answers by their first error.
    """

    count: int
    metrics: dict[str, dict[str, Proportion]]
    errors: dict[str, dict[str, int]]
    gains: dict[str, dict[str, Difference]]


@dataclass(frozen=True)
class Weakness:
    """A server, or one of its tools, and each model's accuracy (`ast`) on its questions."""

    server: str
    tool: str
    right: dict[str, Proportion]


@dataclass(frozen=True)
class Evaluation:
    """Metrics by split, servers and tools with the last model's worst ones first, and every answer.

    `left_out` counts the questions that could not be asked, by reason. `adapter` is the adapter's hash, if it
    has answered. `plain_chat` is what has changed without tools, if base and adapter have both answered.
    """

    splits: dict[str, Split]
    servers: list[Weakness]
    tools: list[Weakness]
    answers: dict[str, list[Answer]] = field(default_factory=dict)
    left_out: dict[str, int] = field(default_factory=dict)
    max_new_tokens: int = 0
    adapter: str | None = None
    plain_chat: PlainChat | None = None

    def metrics(self) -> str:
        """Return everything except the answers as JSON: the content of metrics.json."""
        found = {key: value for key, value in vars(self).items() if key != "answers"}
        return json.dumps(found, default=asdict, indent=2, ensure_ascii=False) + "\n"


def kept(run: Path, adapter: Path) -> Evaluation | None:
    """Return what was evaluated of an adapter of a run, without the answers; None if nothing was.

    Raises McpLoraError if metrics.json is damaged.
    """
    for name in ("metrics.json", f"{adapter.name}_metrics.json"):
        found = read(run, run / "eval" / name)
        if found and found.adapter == runs.adapter_hash(adapter):
            return found
    return None


def read(run: Path, file: Path) -> Evaluation | None:
    """Return the metrics in a file of a run, None if it is missing or of another version; else as `kept`."""
    with suppress(ValueError):
        return files.typed(files.load(file, advice("eval", run)), Evaluation)
    return None


@dataclass(frozen=True)
class Endpoint:
    """An OpenAI-compatible server, and the name of its model."""

    url: str
    model: str


@dataclass(frozen=True)
class Request:
    """The request for an evaluation: which of a run's held-out questions are put to which models.

    Attributes:
        run: the run's folder.
        checkpoint: the checkpoint of the adapter; by default the newest.
        splits: names from questions.SPLITS; by default all that exist.
        benchmark: ask the leaderboard's questions instead (see mcp_lora.evaluate.benchmark).
        limit: maximum questions per split.
        models: which are asked: BASE, ADAPTER or both; what the base has answered before is compared, too.
        endpoint: evaluate this server instead, and compare it with those models that have answered the same.
        max_new_tokens: tokens per answer; by default those of the longest gold answer and a margin.
        batch_size: questions per batch of each process; halved if memory runs out.
        gpus: number of GPUs that the questions are sharded across; by default all.
        requirements: on metrics of the evaluated splits.
    """

    run: Path
    checkpoint: str | None = None
    splits: Sequence[str] = ()
    benchmark: bool = False
    limit: int | None = None
    models: Sequence[str] = (BASE, ADAPTER)
    endpoint: Endpoint | None = None
    max_new_tokens: int | None = None
    batch_size: int = 16
    gpus: int | None = None
    requirements: Sequence[Requirement] = ()

    @property
    def command(self) -> str:
        """The command that evaluates the same kind of questions."""
        return advice("eval", self.run, *["--benchmark", benchmark.NAME] * self.benchmark)


def evaluate(
    request: Request,
    progress: Callable[[str, float], None] = lambda step, fraction: None,
    say: Callable[[str], None] = lambda text: None,
) -> Evaluation:
    """Let models answer a run's held-out questions greedily, and score the answers.

    `progress` receives the fraction of a model's questions that are answered; `say` logs a warning if a
    server's prompts are not those of training.

    Raises McpLoraError if there is no adapter, nothing is held out, the engine or the server fails, or the
    run's folder cannot be written.
    """
    api.require()
    if request.endpoint and request.endpoint.model in (BASE, ADAPTER):
        what = f"--endpoint-model {request.endpoint.model} is the name of the run's own answers"
        raise McpLoraError(f"{what}: serve it under another name, as {advice('serve', request.run)} does")
    run, prepared = request.run, prepare(request)
    predictors = _predictors(request, prepared, say)
    every, asked, judge, answers = prepared.every, prepared.asked, Judge(prepared.template), {}
    folder = run / "eval" / (benchmark.NAME if request.benchmark else "")
    common = [runs.serving_config(run, None), prepared.template.tokenizer.chat_template]
    try:
        for one in predictors:
            file, identity = folder / f"{one.stem}.jsonl", [*common, one.identity]
            book = Notebook(file, every, identity, prepared.length, judge)
            missing = book.missing(asked)
            if missing and not one.is_asked:
                continue  # only what it has answered before is compared
            if missing:
                # closing stops the server or engine if an answer cannot be written
                with closing(one.ask(missing)) as found:
                    for done, (question, response) in enumerate(found, 1):
                        book.add(question, response)
                        progress(f"asking {one.name}", done / len(missing))
            answers[one.name] = book.answers(asked)
        adapters = (one.adapter for one in predictors if one.adapter and one.name in answers)
        adapter = next(map(runs.adapter_hash, adapters), None)
        evaluation = replace(
            summarise(answers), left_out=prepared.left_out, max_new_tokens=prepared.length, adapter=adapter
        )
        last = predictors[-1]
        # the model card's, which those of some questions or of another model do not overwrite
        part = "" if last.adapter and len(asked) == len(every) else "_part"
        of_checkpoint = f"{last.stem}_" if last.adapter and request.checkpoint else ""
        metrics = folder / f"{of_checkpoint}metrics{part}.json"
        metrics.write_text(evaluation.metrics(), encoding="utf-8")
        if last.adapter and not request.benchmark and BASE in answers:
            progress("comparing plain chat", 0)
            moved = plain_chat.of_run(run, last.adapter, prepared.template, say)
            evaluation = replace(evaluation, plain_chat=moved)
            metrics.write_text(evaluation.metrics(), encoding="utf-8")
    except OSError as error:
        what = f"{error.filename or run / 'eval'} cannot be written ({error.strerror})"
        raise McpLoraError(f"{what}: free space or fix permissions, and {request.command}") from None
    return evaluation


@dataclass(frozen=True)
class Prepared:
    """The questions of an evaluation, rendered.

    Attributes:
        template: the chat template of the run.
        every: all questions of the run that can be asked, in order.
        asked: those of the request.
        left_out: the number of others, by reason.
        length: maximum tokens per answer.
    """

    template: ChatTemplate
    every: list[Question]
    asked: list[Question]
    left_out: dict[str, int]
    length: int


def prepare(request: Request) -> Prepared:
    """Read and render a run's held-out questions; raises McpLoraError as `evaluate` does."""
    run, config = request.run, runs.read_run(request.run)
    folder = Path(config["dataset_dir"])
    if request.benchmark:
        read = benchmark.questions()
        wanted = list(dict.fromkeys(question.split for question in read))
    else:
        manifest.check_data(run, folder)
        wanted, read = questions.chosen(folder, request.splits), questions.read(folder, [])
    template = chat_template.load(config)
    # of all splits, as an answer that is cut off is kept only for one max_new_tokens
    every, left_out, longest = _rendered(read, template, config)
    by_split = {split: [one for one in every if one.split == split] for split in wanted}
    if idle := [one for one in request.requirements if not by_split.get(one.split)]:
        there = ", ".join(split for split, found in by_split.items() if found)
        again = replace(request, benchmark=benchmark.is_asked_in(idle[0].split)).command
        raise McpLoraError(f"--require {idle[0].text}: the splits are {there}: {again}")
    # by their hash, as questions about one tool often stand together
    hashed = (sorted(found, key=operator.attrgetter("key")) for found in by_split.values())
    some = {one.key for found in hashed for one in found[: request.limit]}
    asked = [one for found in by_split.values() for one in found if one.key in some]
    if not asked:
        reasons = ", ".join(f"{count} {reason}" for reason, count in left_out.items())
        again = "mcp-lora train cutoff_len=8192" if request.benchmark else "mcp-lora inspect 1 --split seen"
        raise McpLoraError(f"no question can be asked ({reasons}): {again}")
    # an answer may be written differently, and reasoning has no other limit
    more = _THOUGHT if template.switches_thinking and template.thinking else 32
    return Prepared(template, every, asked, left_out, request.max_new_tokens or longest + more)


class Predictor(NamedTuple):
    """A model, the file and identity of its answers (see Notebook), and how it is asked, if it is."""

    name: str
    stem: str
    identity: Any
    is_asked: bool
    ask: Callable[[Sequence[Question]], Generator[tuple[Question, Response]]]
    adapter: Path | None = None


def _predictors(request: Request, prepared: Prepared, say: Callable[[str], None]) -> list[Predictor]:
    """Return the models that are compared, the base first and the one to evaluate last."""
    found = [_of_engine(request, prepared, None)]
    with suppress(McpLoraError) if request.endpoint else nullcontext():  # a server's run needs no adapter
        if ADAPTER in request.models:
            found.append(_of_engine(request, prepared, runs.adapter(request.run, request.checkpoint)))
    return [*found, _of_server(request, request.endpoint, prepared, say)] if request.endpoint else found


def _of_engine(request: Request, prepared: Prepared, adapter: Path | None) -> Predictor:
    """Return the base, or base + adapter, as LLaMA-Factory loads it."""
    machine = detect_machine()
    # on a CPU that has it: 115 s instead of 349 for 89 questions, of which 9 got another answer
    bf16 = machine.bf16 and not machine.gpus
    settings = runs.serving_config(request.run, adapter) | {"bf16_full_eval": bf16}
    settings |= {"max_new_tokens": prepared.length, "per_device_eval_batch_size": request.batch_size}
    how: dict[str, Any] = {"template": prepared.template, "gpus": request.gpus, "command": request.command}
    ask = partial(predict.by_engine, settings=settings, **how)
    kind = ADAPTER if adapter else BASE
    name = adapter.name if adapter and request.checkpoint else kind  # a checkpoint's answers replace none
    identity = [adapter and runs.adapter_hash(adapter), bf16]
    is_asked = kind in request.models and not request.endpoint
    return Predictor(name, name, identity, is_asked, ask, adapter)


def _of_server(
    request: Request, server: Endpoint, prepared: Prepared, say: Callable[[str], None]
) -> Predictor:
    """Return a server; `say` logs a warning if its prompts are not those of training."""
    with suppress(McpLoraError):  # asking it says more
        found = parity(server.url, prepared.template, server.model)
        if found.differences:
            what = f"{len(found.differences)} of {found.count} prompts are not those of training"
            again = advice("parity", server.url, request.run, "--endpoint-model", server.model)
            say(f"warning: {what}: {found.differences[0]}; see {again}")
    how = (server.url, server.model, prepared.length, prepared.template, request.command, say)
    stem = f"endpoint-{quote(server.model, safe='')}"
    return Predictor(server.model, stem, asdict(server), True, lambda asked: predict.by_endpoint(asked, *how))


def summarise(answers: dict[str, list[Answer]]) -> Evaluation:
    """Return the metrics of models' answers to the same questions, one or more, in the same order."""
    first = next(iter(answers.values()))
    return Evaluation(
        {split: _split(split, answers) for split in dict.fromkeys(answer.split for answer in first)},
        _weaknesses(answers, lambda answer: (answer.server, "")),
        _weaknesses(answers, lambda answer: (answer.server, answer.expected[0].name)),
        answers,
    )


def _split(split: str, answers: dict[str, list[Answer]]) -> Split:
    found = Split(0, {}, {}, {})
    first: dict[str, list[bool]] = {}
    for name, each in answers.items():
        verdicts = [answer.verdict for answer in each if answer.split == split]
        metrics = metrics_of(split)
        hits = {metric: [getattr(verdict, metric) for verdict in verdicts] for metric in metrics}
        found = replace(found, count=len(verdicts))
        found.metrics[name] = {metric: proportion(sum(hit), len(hit)) for metric, hit in hits.items()}
        found.errors[name] = dict(Counter(one.error for one in verdicts if one.error).most_common())
        if first:
            found.gains[name] = {metric: difference(first[metric], hits[metric]) for metric in metrics}
        first = first or hits
    return found


def _weaknesses(
    answers: dict[str, list[Answer]], place: Callable[[Answer], tuple[str, str]]
) -> list[Weakness]:
    """Return each place's accuracy, the last model's worst first, on questions with a gold call."""
    grouped: dict[tuple[str, str], dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
    for name, each in answers.items():
        for answer in each:
            if answer.expected and not benchmark.is_asked_in(answer.split):
                grouped[place(answer)][name].append(answer.verdict.ast)
    weaknesses = [
        Weakness(*where, {name: proportion(sum(hits), len(hits)) for name, hits in each.items()})
        for where, each in grouped.items()
    ]
    last = list(answers)[-1]
    return sorted(weaknesses, key=lambda one: (one.right[last].rate, -one.right[last].count))


def _rendered(
    read: Sequence[Question], template: ChatTemplate, config: Mapping[str, Any]
) -> tuple[list[Question], dict[str, int], int]:
    """Return the questions fitted into cutoff_len, why others are left out, and the longest gold answer.

    The last is a number of tokens: a model that does not stop need not be run for much longer.
    """
    # only the answer is the target
    settings = render.settings_of(config) | {"mask_history": True, "train_on_prompt": False}
    fitting, left_out, longest = [], Counter[str](), 0
    for question in read:
        try:
            fitted = render.fit(template, question.sample, settings)
        except RowError as error:
            left_out[error.reason] += 1
            continue
        if fitted.dropped and benchmark.is_asked_in(question.split):  # it would be an easier one
            left_out["too-long"] += 1
            continue
        (sample,) = fitted.samples
        fitting.append(Question(question.split, dict(fitted.row), sample.prompt, sample.target))
        longest = max(longest, len(sample.labels) - sample.labels.count(IGNORED))
    return fitting, dict(left_out), longest
