"""A split as token ids: the Arrow dataset that LLaMA-Factory loads from disk instead of rendering rows.

data/llama_factory/rendered/KEY/ is a `datasets` folder (`tokenized_path`) with `train` and, if val_size
holds rows out, `validation`; both have input_ids, attention_mask and labels. KEY is a hash of the rows, the
tokenizer, its chat template and the settings, so that a change of any gives a new folder.

Samples in a batch are padded to the longest of them. So `train` is shuffled once, and the samples of each
optimizer step are sorted by length: the batches of a step contain samples of similar length, and a step the
same samples in any number of batches, on any number of GPUs. The engine then reads them in this order
(disable_shuffling), also after a resumption; transformers' own group_by_length would shuffle by a generator
that ranks do not share, and that a resumed run does not restore (accelerate 1.11, prepare_data_loader).

rendered.json is beside them:

    {"samples": 262, "validation": 26, "left_out": {"too-long": 1}, "reasons": ["row 7: 5210 tokens …"],
     "shortened": 3, "dropped_tools": 7, "lost_texts": 0, "lengths": {"median": 612, "p95": 1180,
     "max": 1920, "cutoff_len": 4096, "tokens": 168000, "histogram": [[200, 310, 12], …]}}
"""

import hashlib
import importlib.metadata
import json
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from mcp_lora.data import calls, files
from mcp_lora.data.records import RowError
from mcp_lora.errors import McpLoraError
from mcp_lora.prompts.chat_template import ChatTemplate, Encoded, called

# The engine's template for prerendered data. It has no stop words, and must not be used for chat and export,
# which use the model's own.
TEMPLATE = "empty"
_BATCH = 32  # rows that a worker renders at a time
# The columns of a dataset, and what is reported of each row while it is rendered.
_COLUMNS = {"input_ids": "int32", "attention_mask": "int8", "labels": "int32"}
_REPORTED = {"lost": "int32", "dropped": "int32", "reason": "string", "error": "string"}


@dataclass(frozen=True)
class Fitted:
    """A row that fits into cutoff_len: its samples, and the row with its remaining tools."""

    samples: list[Encoded]
    row: Mapping[str, Any]
    dropped: int


def settings_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a configuration (LLaMA-Factory's keys) that decide how rows are rendered."""
    return {
        "cutoff_len": int(config.get("cutoff_len") or 2048),
        "mask_history": bool(config.get("mask_history")),
        "train_on_prompt": bool(config.get("train_on_prompt")),
        "max_samples": config.get("max_samples"),
        "val_size": config.get("val_size") or 0,
        "seed": 42 if config.get("seed") is None else config["seed"],
    }


def fit(template: ChatTemplate, row: Mapping[str, Any], settings: Mapping[str, Any]) -> Fitted:
    """Render a row; if it is longer than cutoff_len tokens, remove distractors, the last ones first.

    Args:
        template: the model's chat template.
        row: as `mcp-lora convert` writes it.
        settings: the result of settings_of.

    Raises RowError if it cannot be rendered, or is too long without distractors. Nothing is ever truncated.
    """
    gold = {call.name for message in row["messages"] for call in called(message)}
    tools, dropped = list(row.get("tools") or []), 0
    while True:
        fitted = {**row, "tools": tools}
        samples = template.encode(fitted, settings["mask_history"])
        if settings["train_on_prompt"]:
            samples = [replace(sample, labels=sample.input_ids) for sample in samples]
        longest = max(len(sample.input_ids) for sample in samples)
        if longest <= settings["cutoff_len"]:
            return Fitted(samples, fitted, dropped)
        spare = [place for place, tool in enumerate(tools) if tool["function"]["name"] not in gold]
        # a row without calls keeps one tool, or there is nothing to refuse
        if len(spare) <= (0 if gold else 1):
            limit = f"cutoff_len is {settings['cutoff_len']}"
            raise RowError("too-long", f"{longest} tokens without any distractor, but {limit}")
        del tools[spare[-1]]
        dropped += 1


def render(
    template: ChatTemplate, file: Path, folder: Path, settings: Mapping[str, Any], step: int | None = None
) -> tuple[Path, dict[str, Any]]:
    """Render a split for training, unless this has been done; of several processes only the first does.

    Args:
        template: the model's chat template.
        file: the rows, as `mcp-lora convert` writes them.
        folder: the folder of rendered datasets.
        settings: LLaMA-Factory's keys; only those of settings_of and preprocessing_num_workers count.
        step: samples of an optimizer step, which are sorted by length; by default the rows' order is kept.

    Returns:
        The dataset's folder, and the content of rendered.json.

    Raises McpLoraError if no row is left to train on, the file cannot be read or the folder not written.
    """
    from datasets.exceptions import DatasetGenerationError

    chosen = settings_of(settings) | {"step": step}
    out = folder / _key(template, file, chosen)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        problem = f"another process has been rendering into {out} for an hour: end it, and run again"
        with files.exclusive(folder / f".{out.name}.lock", problem, files.WAIT):
            if not (out / "rendered.json").is_file():
                _render(template, file, out, chosen, int(settings.get("preprocessing_num_workers") or 1))
    except DatasetGenerationError as error:  # wraps what reading or writing has raised
        what = f"{file} cannot be read, or copied into {folder} ({error.__cause__})"
        raise McpLoraError(f"{what}: mcp-lora convert") from None
    except OSError as error:
        what = f"{folder} cannot be written ({error.strerror})"
        raise McpLoraError(f"{what}: mcp-lora train dataset_dir=OTHER_FOLDER") from None
    return out, json.loads((out / "rendered.json").read_text(encoding="utf-8"))


def write(folder: Path, prompts: Sequence[tuple[list[int], list[int]]]) -> None:
    """Write prompts and their gold answers, (token ids, token ids), as a dataset for prediction."""
    import datasets

    columns = {
        "input_ids": [prompt for prompt, _ in prompts],
        "attention_mask": [[1] * len(prompt) for prompt, _ in prompts],
        "labels": [target for _, target in prompts],
    }
    datasets.disable_progress_bars()
    datasets.DatasetDict({"validation": datasets.Dataset.from_dict(columns)}).save_to_disk(str(folder))


def _key(template: ChatTemplate, file: Path, chosen: Mapping[str, Any]) -> str:
    tokenizer = template.tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = backend.to_str() if backend else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    versions = [importlib.metadata.version(package) for package in ("transformers", "jinja2")]
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    sources = [*sorted(Path(__file__).parent.glob("*.*")), Path(calls.__file__)]
    code = [file.read_text(encoding="utf-8") for file in sources]
    model = [vocabulary, tokenizer.chat_template, special, template.thinking]
    parts = json.dumps([files.sha256(file), model, chosen, versions, code])
    return hashlib.sha256(parts.encode()).hexdigest()[:16]


def _render(template: ChatTemplate, file: Path, out: Path, chosen: Mapping[str, Any], workers: int) -> None:
    import datasets

    new = out.with_name(f"{out.name}.new")
    shutil.rmtree(new, ignore_errors=True)  # left by a run that was killed
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    rows = datasets.Dataset.from_generator(_lines, gen_kwargs={"file": file}, cache_dir=str(new / "cache"))
    if chosen["max_samples"]:
        rows = rows.select(range(min(len(rows), int(chosen["max_samples"]))))
    splits = {"train": rows}
    if chosen["val_size"] and len(rows) > 1:
        try:
            halves = rows.train_test_split(test_size=chosen["val_size"], seed=chosen["seed"])
        except ValueError:
            what = f"val_size={chosen['val_size']} of {len(rows)} rows leaves nothing to train on"
            raise McpLoraError(f"{what}: mcp-lora train val_size=0.1") from None
        splits = {"train": halves["train"], "validation": halves["test"]}
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the worker processes are the parallelism
    types = {name: datasets.Value(kind) for name, kind in _REPORTED.items()}
    types |= {name: datasets.Sequence(datasets.Value(kind)) for name, kind in _COLUMNS.items()}
    rendered, good = {}, {}
    for name, split in splits.items():
        rendered[name] = split.map(
            _encode,
            batched=True,
            batch_size=_BATCH,
            num_proc=min(workers, os.cpu_count() or 1, -(-len(split) // _BATCH)) or None,
            remove_columns=["row", "text"],
            features=datasets.Features(types),
            fn_kwargs={"template": template, "chosen": dict(chosen)},
            new_fingerprint=f"{out.name}{name}",
            desc="rendering",
        )
        kept = rendered[name].filter(lambda reason: reason is None, input_columns="reason")
        if len(kept):
            good[name] = kept.select_columns([*_COLUMNS])
    if "train" in good and chosen["step"]:
        good["train"] = good["train"].select(order(_lengths(good["train"]), chosen["step"], chosen["seed"]))
    summary = _summary(rendered, chosen["cutoff_len"])
    summary["validation"] = len(good.get("validation", ()))
    if not summary["samples"]:
        shutil.rmtree(new)
        what = f"no row of {file} is left to train on ({'; '.join(summary['reasons'])})"
        raise McpLoraError(f"{what}: see one with mcp-lora inspect 1, or raise cutoff_len")
    datasets.DatasetDict(good).save_to_disk(str(new))
    shutil.rmtree(new / "cache")
    (new / "rendered.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    shutil.rmtree(out, ignore_errors=True)
    new.rename(out)


def _lines(file: Path) -> Any:
    with file.open(encoding="utf-8") as stream:
        for number, line in enumerate(stream, 1):
            yield {"row": number, "text": line}


def _encode(
    batch: Mapping[str, list[Any]], template: ChatTemplate, chosen: Mapping[str, Any]
) -> dict[str, Any]:
    """Render a batch of rows; a row yields one or more samples, or a reason why it is left out."""
    made: list[dict[str, Any]] = []
    for number, text in zip(batch["row"], batch["text"], strict=True):
        try:
            fitted = fit(template, json.loads(text), chosen)
        except RowError as error:
            made.append({"reason": error.reason, "error": f"row {number}: {error}"})
            continue
        except (ValueError, TypeError, LookupError) as error:
            made.append({"reason": "damaged", "error": f"row {number}: it is damaged ({error})"})
            continue
        for sample in fitted.samples:
            ids = {"input_ids": sample.input_ids, "attention_mask": [1] * len(sample.input_ids)}
            made.append(ids | {"labels": sample.labels, "lost": sample.lost})
        made[-1]["dropped"] = fitted.dropped  # per row, so counted once
    return {name: [one.get(name) for one in made] for name in (*_COLUMNS, *_REPORTED)}


def _summary(rendered: Mapping[str, Any], cutoff_len: int) -> dict[str, Any]:
    import numpy
    import pandas

    reported = pandas.concat(split.select_columns([*_REPORTED]).to_pandas() for split in rendered.values())
    lengths = _lengths(rendered["train"])
    summary: dict[str, Any] = {
        "samples": len(lengths),
        "left_out": reported["reason"].value_counts().to_dict(),
        "reasons": reported.dropna(subset="reason").drop_duplicates("reason")["error"].tolist(),
        "shortened": int((reported["dropped"] > 0).sum()),
        "dropped_tools": int(reported["dropped"].sum()),
        "lost_texts": int(reported["lost"].sum()),
    }
    if len(lengths):
        counts, edges = numpy.histogram(lengths, bins=min(16, len(numpy.unique(lengths))))
        bins = zip(edges, edges[1:], counts, strict=False)
        summary["lengths"] = {
            "median": int(numpy.median(lengths)),
            "p95": int(numpy.percentile(lengths, 95)),
            "max": int(lengths.max()),
            "cutoff_len": cutoff_len,
            "tokens": int(lengths.sum()),
            "histogram": [[round(low), round(high), int(count)] for low, high, count in bins],
        }
    return summary


def lengths(data: Path) -> Any:
    """Return the number of tokens of each sample of a rendered dataset, in its order, as a numpy array."""
    import datasets

    return _lengths(datasets.load_from_disk(str(data))["train"])


def _lengths(samples: Any) -> Any:
    """Return the number of tokens of each sample, without rows that are left out."""
    import pyarrow.compute

    column = samples.flatten_indices().data.column("input_ids")
    return pyarrow.compute.list_value_length(column).drop_null().to_numpy()


def first_lengths(template: ChatTemplate, file: Path, settings: Mapping[str, Any], rows: int) -> Any:
    """Return the number of tokens of each sample of the first rows; nothing is written.

    Args:
        template: the model's chat template.
        file: the rows, as `mcp-lora convert` writes them.
        settings: LLaMA-Factory's keys.
        rows: how many.
    """
    import numpy

    first = [*islice(_lines(file), rows)]
    batch = {name: [row[name] for row in first] for name in ("row", "text")}
    made = _encode(batch, template, settings_of(settings))
    return numpy.array([len(ids) for ids in made["input_ids"] if ids])


def order(lengths: Any, step: int, seed: int) -> list[int]:
    """Return a random order of samples, of which each optimizer step is sorted by length, longest first.

    The longest sample of all is the first, so that memory runs out at the start, or not at all.

    Args:
        lengths: tokens of each sample, a numpy array.
        step: samples of an optimizer step, the global batch size.
        seed: of the order.
    """
    import numpy

    shuffled = numpy.random.default_rng(seed).permutation(len(lengths))
    first = lengths[shuffled].argmax()
    shuffled[[0, first]] = shuffled[[first, 0]]
    steps = (shuffled[start : start + step] for start in range(0, len(lengths), step))
    return [int(one) for part in steps for one in part[numpy.argsort(-lengths[part], kind="stable")]]


def padding(lengths: Any, size: int) -> float:
    """Return the fraction of padding in batches of `size` samples of these lengths, a numpy array."""
    batches = [lengths[start : start + size] for start in range(0, len(lengths), size)]
    return 1 - float(lengths.sum()) / sum(int(batch.max()) * len(batch) for batch in batches)
