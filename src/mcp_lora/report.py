"""A page about a run, or about several side by side: one HTML file that needs nothing else.

It is made of the files in the runs' folders: run.yaml, manifest.json, trainer_state.json, eval/*.jsonl.
Whatever is missing there is said in its place. The page itself is report.html, a Jinja template.
"""

import difflib
import json
import re
import shlex
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import chain, islice, zip_longest
from pathlib import Path
from typing import Any

from mcp_lora import answers, charts, manifest, runs
from mcp_lora.answers import Answer
from mcp_lora.errors import McpLoraError
from mcp_lora.evaluation import ADAPTER, BASE, summarise
from mcp_lora.scoring import ERRORS

EXAMPLES = 20
_WORST = 15  # tools, and servers
_TEXT = 2000  # characters of an answer without a call


@dataclass(frozen=True)
class Run:
    """What is in a run's folder.

    Attributes:
        name: as it is called on the page.
        config: run.yaml.
        manifest: manifest.json; empty where there is none.
        history: what the trainer has logged, in transformers' keys; the newest checkpoint's if it is not
            finished.
        answers: what is kept of each model's, the base's first, the adapter's last.
    """

    name: str
    folder: Path
    config: dict[str, Any]
    manifest: dict[str, Any]
    history: list[dict[str, Any]]
    answers: dict[str, list[Answer]]


@dataclass(frozen=True)
class Example:
    """A question with the right calls and each model's answer in parts (see `compare`).

    `outcome` is that of the last model: right or wrong, and with several models gained or lost if the
    first is otherwise.
    """

    answer: Answer
    outcome: str
    expected: str
    said: dict[str, list[tuple[str, str]]]
    errors: dict[str, str | None]


def write(folders: Sequence[Path]) -> Path:
    """Write report.html into a run's folder; of several runs comparison.html into the first one's.

    Returns:
        The page's file.

    Raises:
        McpLoraError: a folder holds no run or a damaged one, or the page cannot be written.
    """
    file = folders[0] / ("comparison.html" if len(folders) > 1 else "report.html")
    page = render([_read(folder, len(folders) > 1) for folder in folders])
    try:
        file.write_text(page, encoding="utf-8", errors="replace")
    except OSError as error:
        raise McpLoraError(
            f"{file} cannot be written ({error.strerror}): make room or grant it, and mcp-lora report "
            f"{shlex.join(map(str, folders))}"
        ) from None
    return file


def render(found: Sequence[Run]) -> str:
    """Return the page about one run, or about several; there the first is what others are compared with."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    several = len(found) > 1
    said = {run.name: run.answers[ADAPTER] for run in found if ADAPTER in run.answers}
    said, left_out = _common(said if several else found[0].answers)
    evaluation = summarise(said) if said else None
    splits = dict(evaluation.splits) if evaluation else {}
    coloured = list(enumerate(found, 0 if several else 1))  # a run as its adapter
    lines = {
        "loss": [
            *((colour, False, _points(run, "loss")) for colour, run in coloured),
            *((colour, True, _points(run, "eval_loss")) for colour, run in coloured),
        ],
        "learning rate": [(colour, False, _points(run, "learning_rate")) for colour, run in coloured],
    }
    drawn = {name: [line for line in there if line[2]] for name, there in lines.items()}
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html").render(
        runs=found,
        several=several,
        base=base.name if (base := Path(found[0].config["model_name_or_path"])).is_absolute() else str(base),
        made_of=_side_by_side([_made_of(run) for run in found]),
        settings=_side_by_side([{key: str(value) for key, value in run.config.items()} for run in found]),
        evaluation=evaluation,
        models=list(said),
        left_out=left_out,
        unasked=[run.folder for run in found if not run.answers or (several and ADAPTER not in run.answers)],
        headline="ast",
        worst=_WORST,
        examples=_examples(said) if said else [],
        errors=[
            error for error in ERRORS if any(error in e for s in splits.values() for e in s.errors.values())
        ],
        series=charts.SERIES,
        wrong=charts.WRONG,
        figures={name: Markup(charts.figures(split)) for name, split in splits.items()},
        error_chart=Markup(charts.errors(splits)) if splits else None,
        curves={name: Markup(charts.curves(there, name)) for name, there in drawn.items() if there},
        validated=any(_points(run, "eval_loss") for run in found),
        histograms={
            run.name: Markup(charts.histogram(lengths["histogram"]))
            for run in found
            if (lengths := (run.manifest.get("rendered") or {}).get("lengths"))
        },
        usage=None if several else _usage(found[0]),
    )


def compare(expected: str, said: str) -> list[tuple[str, str]]:
    """Return what was said in parts: "same", "extra" where it is not expected, "missing" where it should be.

    Texts are compared by words and signs, so that a wrong argument is marked and not all of its line.
    """
    one, other = (re.findall(r"\w+|\s+|[^\w\s]", text) for text in (expected, said))
    parts = []
    matcher = difflib.SequenceMatcher(None, one, other, autojunk=False)
    for kind, low, high, start, end in matcher.get_opcodes():
        if kind == "equal":
            parts.append(("same", "".join(one[low:high])))
        else:
            parts += [("missing", "".join(one[low:high])), ("extra", "".join(other[start:end]))]
    return [part for part in parts if part[1]]


def _read(folder: Path, several: bool) -> Run:
    config = runs.read_run(folder)
    states = [folder, *filter(runs.is_complete, runs.checkpoints(folder)[::-1])]
    kept = {file.stem: answers.read(file) for file in sorted((folder / "eval").glob("*.jsonl"))}
    models = [BASE, *(name for name in kept if name not in (BASE, ADAPTER)), ADAPTER]
    return Run(
        str(folder) if several else folder.resolve().name,
        folder,
        config,
        _json(folder / manifest.NAME),
        next(filter(None, (_json(place / "trainer_state.json").get("log_history") for place in states)), []),
        {name: kept[name] for name in models if kept.get(name)},
    )


def _json(file: Path) -> dict[str, Any]:
    """Return an object of a run's folder, an empty one where there is none.

    Raises:
        McpLoraError: it is damaged.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise McpLoraError(f"{file} is damaged: remove it, and mcp-lora report {file.parent}")
    return content


def _common(said: Mapping[str, list[Answer]]) -> tuple[dict[str, list[Answer]], int]:
    """Return the answers to the questions that all were asked, in one order, and the number of the others."""
    by_key = {name: {answer.question: answer for answer in each} for name, each in said.items()}
    every = dict.fromkeys(chain.from_iterable(by_key.values()))
    common = [key for key in every if all(key in each for each in by_key.values())]
    if not common:
        return {}, len(every)
    return {name: [each[key] for key in common] for name, each in by_key.items()}, len(every) - len(common)


def _points(run: Run, key: str) -> list[tuple[float, float]]:
    return [(row["step"], row[key]) for row in run.history if key in row and "step" in row]


def _made_of(run: Run) -> dict[str, str]:
    """Return what a run was made of, in words; where a key is left out, with the engine's default."""
    config, record = run.config, run.manifest
    batch = [
        int(config.get("per_device_train_batch_size", 8)),
        int(config.get("gradient_accumulation_steps", 1)),
        int(record.get("processes", 1)),
    ]
    samples = (record.get("rendered") or {}).get("samples")
    steps, epochs = (max((row.get(key, 0) for row in run.history), default=0) for key in ("step", "epoch"))
    data = record.get("data") or {}
    found = {
        "base model": config["model_name_or_path"],
        "chat template": (record.get("rendered") or {}).get("chat_template", "not recorded"),
        "method": _method(config),
        "learning rate": f"{config.get('learning_rate', 5e-5)}, {config.get('lr_scheduler_type', 'linear')}",
        "batch": f"{batch[0] * batch[1] * batch[2]} = {batch[0]} per device × {batch[1]} accumulated × "
        f"{batch[2]} process{'es' * (batch[2] > 1)}",
        "trained": f"{steps} steps, {epochs:g} epochs",
        "samples": f"{samples:,}" if samples else "not recorded",
        "data": f"{Path(data['file']).name}, SHA-256 {data['sha256'][:12]}…" if data else "not recorded",
    }
    if record:
        packages = record["packages"]
        found |= {
            "time": _duration(record),
            "restarts": f"{len(record['retries'])} with a smaller batch per device" * bool(record["retries"]),
            "hardware": ", ".join(record["gpus"]) or "CPU",
            "packages": ", ".join(f"{name} {version}" for name, version in packages.items()),
            "commit": record["git_commit"] or "none",
            "seed": str(record["seed"]),
        }
    return {key: value for key, value in found.items() if value}


def _method(config: Mapping[str, Any]) -> str:
    quantised = f"{config['quantization_bit']}-bit base, " if config.get("quantization_bit") else ""
    rank = config.get("lora_rank", 8)
    return (
        f"{quantised}{config.get('finetuning_type', 'lora')}, rank {rank}, alpha "
        f"{config.get('lora_alpha', 2 * rank)}, dropout {config.get('lora_dropout', 0)}, "
        f"{config.get('lora_target', 'all')} layers"
    )


def _duration(record: Mapping[str, Any]) -> str:
    began = datetime.fromisoformat(record["started"])
    when = f"{began:%Y-%m-%d %H:%M} UTC"
    if not record["ended"]:
        return f"{when}, and never came to its end"
    seconds = round((datetime.fromisoformat(record["ended"]) - began).total_seconds())
    ended = "" if record["exit"] == 0 else f", failed with exit code {record['exit']}"
    return f"{when}, {seconds // 3600} h {seconds % 3600 // 60} min {seconds % 60} s{ended}"


def _side_by_side(columns: Sequence[Mapping[str, str]]) -> list[tuple[str, list[str], bool]]:
    """Return rows of (key, the value of each run, whether they differ); those that differ come first."""
    keys = dict.fromkeys(chain.from_iterable(columns))
    rows = [(key, [column.get(key, "") for column in columns]) for key in keys]
    return sorted(((key, values, len(set(values)) > 1) for key, values in rows), key=lambda row: not row[2])


def _examples(said: Mapping[str, list[Answer]]) -> list[Example]:
    """Return examples of each split and outcome in turn, so that none hides the others."""
    groups: dict[tuple[str, str], list[tuple[Answer, ...]]] = defaultdict(list)
    for row in zip(*said.values(), strict=True):
        right = [answer.verdict.error is None for answer in row]
        outcome = "right" if right[-1] else "wrong"
        if right[0] != right[-1]:
            outcome = "gained" if right[-1] else "lost"
        groups[outcome, row[-1].split].append(row)
    order = ("lost", "wrong", "gained", "right")
    ranked = sorted(groups.items(), key=lambda group: (order.index(group[0][0]), group[0][1]))
    # Compared are those alone that are shown: the time of a comparison grows with the square of a text.
    in_turn = zip_longest(*([(outcome, row) for row in rows] for (outcome, _), rows in ranked))
    chosen = islice(filter(None, chain.from_iterable(in_turn)), EXAMPLES)
    return [
        Example(
            row[-1],
            outcome,
            _calls(row[-1].expected) or "no call: no tool on offer fits",
            {name: _parts(answer) for name, answer in zip(said, row, strict=True)},
            {name: answer.verdict.error for name, answer in zip(said, row, strict=True)},
        )
        for outcome, row in chosen
    ]


def _parts(answer: Answer) -> list[tuple[str, str]]:
    if answer.calls and answer.expected:
        return compare(_calls(answer.expected), _calls(answer.calls))
    said = _calls(answer.calls) or answer.text
    beyond = f" … ({len(said) - _TEXT} characters more)" if len(said) > _TEXT else ""
    return [("same", said[:_TEXT] + beyond)]


def _calls(calls: Sequence[Any]) -> str:
    return "\n".join(
        f"{call.name} {json.dumps(call.arguments, indent=2, ensure_ascii=False, sort_keys=True)}"
        for call in calls
    )


def _usage(run: Run) -> dict[str, str] | None:
    """Return commands and Python code that use a run's adapter, None if it has none."""
    try:
        adapter = runs.adapter(run.folder)
    except McpLoraError:
        return None
    base, place = run.config["model_name_or_path"], str(adapter.absolute())
    return {
        "Talk to it": shlex.join(["mcp-lora", "chat", str(run.folder)]),
        "Merge it into the base model": shlex.join(["mcp-lora", "export", str(run.folder)]),
        "Load it in Python": f"from peft import PeftModel\n"
        f"from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f"tokenizer = AutoTokenizer.from_pretrained({place!r})  # with the chat template\n"
        f'model = AutoModelForCausalLM.from_pretrained({base!r}, dtype="auto")\n'
        f"model = PeftModel.from_pretrained(model, {place!r})\n",
    }
