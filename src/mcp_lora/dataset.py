r"""Turn examples into the files that LLaMA-Factory trains on.

A sample, in LLaMA-Factory's sharegpt format (its data/README.md; a `function_call` turn is the
call as a JSON string, `tools` the candidate tools as a JSON string):

    {"conversations": [{"from": "human", "value": "What is 128 * 46?"},
                       {"from": "function_call",
                        "value": "{\"name\": \"calculate\", \"arguments\": {\"expression\": …}}"}],
     "system": "You are a helpful assistant …",
     "tools": "[{\"name\": \"calculate\", \"description\": …, \"parameters\": …}]"}
"""

import json
import os
import random
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from mcp_lora.errors import McpLoraError
from mcp_lora.readers import FILTERED, FILTERED_FOLDER, newest_filtered, read_filtered, read_rows
from mcp_lora.records import Example, Rejected, Tool, ToolCall

TRAIN, TEST = "mcp_train", "mcp_test"
FOLDER = Path("data/llama_factory")
# Without a system message some templates render another prompt than the model's own chat
# template does, so that the adapter would be served another prompt than it was trained on.
SYSTEM = "You are a helpful assistant. Answer the user by calling the right tool."


def convert(
    inputs: list[Path],
    out: Path = FOLDER,
    candidates: int = 10,
    test: float = 0.1,
    seed: int = 42,
) -> dict[str, Any]:
    """Convert filtered MCP data and return the statistics that are also in `out`/stats.json.

    Writes mcp_train_data.json, mcp_test_data.json (the held-out share `test`), dataset_info.json,
    rejected.jsonl and stats.json. Every row ends in one place: `read` = `train` + `test` +
    `rejected`. The same inputs, settings and seed give the same bytes.

    Args:
        inputs: files to read; none means the newest data/filtered/filtered_*.json.
        out: the folder to write into.
        candidates: tools offered per sample, the right one included.
        test: share of the usable rows to hold out, from 0 to below 1.
        seed: draws what is held out, the candidate tools and their order.

    Raises:
        McpLoraError: an input is not JSON or holds no usable row, or `out` cannot be written;
            nothing has been written over then.
    """
    files = inputs or [newest_filtered()]
    examples, rejected = [], []
    for item in _without_duplicates(row for file in files for row in read_filtered(file)):
        if isinstance(item, Example):
            examples.append(item)
        else:
            rejected.append(item)
    reasons = Counter(item.reason for item in rejected)
    if not examples:
        found = ", ".join(f"{count} × {reason}" for reason, count in reasons.items())
        names = ", ".join(map(str, files))
        raise McpLoraError(
            f"no usable row in {names} ({found or 'it is empty'}): mcp-lora convert OTHER_FILE"
        )

    held_out = _hold_out(examples, test, seed)
    samples = [sample(*pair) for pair in _with_candidates(examples, candidates, seed)]
    splits = {
        TRAIN: [row for index, row in enumerate(samples) if index not in held_out],
        TEST: [row for index, row in enumerate(samples) if index in held_out],
    }
    stats = {
        "read": len(examples) + len(rejected),
        "train": len(splits[TRAIN]),
        "test": len(splits[TEST]),
        "rejected": len(rejected),
        "reasons": dict(reasons),
        "servers": len({example.tool.server for example in examples}),
        "tools": len({(example.tool.server, example.tool.name) for example in examples}),
        "settings": {
            "inputs": [str(file) for file in inputs],
            "candidates": candidates,
            "test": test,
            "seed": seed,
        },
        "files": [str(file) for file in files],
    }
    contents = {data_file(out, name).name: _dump(rows) for name, rows in splits.items()}
    contents["dataset_info.json"] = _dump({name: _description(name) for name, rows in splits.items() if rows})
    contents["rejected.jsonl"] = "".join(
        json.dumps(vars(item), ensure_ascii=False) + "\n" for item in rejected
    )
    contents["stats.json"] = _dump(stats)  # last: its date is the conversion's
    _write(out, contents)
    return stats


def refresh(data: Path | None, out: Path) -> dict[str, Any] | None:
    """Convert again where the data is newer than the conversion in `out`.

    The candidates, held-out share and seed of the last conversion are kept. Without `data` its
    inputs are too, or the newest filtered data again if none were named. A conversion whose data
    is gone stands, unless there is newer data: it may be all that was copied to this machine.

    Returns:
        The statistics of a new conversion, or None where the old one is good.
    """
    settings: dict[str, Any] = {}
    done = out / "stats.json"
    if done.is_file():
        old = json.loads(done.read_text(encoding="utf-8"))
        settings = old["settings"]
        inputs = [data] if data else [Path(name) for name in settings["inputs"]]
        files = inputs
        if not inputs and any(FILTERED_FOLDER.glob(FILTERED)):
            files = [newest_filtered()]
        gone = not data and not all(Path(name).is_file() for name in old["files"])
        newer = any(file.stat().st_mtime > done.stat().st_mtime for file in files if file.is_file())
        if not newer and (gone or [str(file) for file in files] == old["files"]):
            return None
    elif (out / "dataset_info.json").is_file():
        raise McpLoraError(
            f"{out} holds a dataset that mcp-lora did not make: mcp-lora train dataset_dir=OTHER_FOLDER"
        )
    else:
        inputs = [data] if data else []
    return convert(inputs, out, **{k: v for k, v in settings.items() if k != "inputs"})


def sample(example: Example, candidates: list[Tool]) -> dict[str, Any]:
    """Return one sample in LLaMA-Factory's sharegpt format (see above)."""
    call = {"name": example.call.name, "arguments": example.call.arguments}
    tools = [
        {
            "name": tool.name,
            "description": tool.description,
            # The schema's own dialect tells a model nothing; hosts leave it out too.
            "parameters": {key: value for key, value in tool.parameters.items() if key != "$schema"},
        }
        for tool in candidates
    ]
    return {
        "conversations": [
            {"from": "human", "value": example.instruction},
            {"from": "function_call", "value": json.dumps(call, ensure_ascii=False)},
        ],
        "system": SYSTEM,
        "tools": json.dumps(tools, ensure_ascii=False),
    }


def data_file(folder: Path, dataset: str) -> Path:
    """Return where the samples of a dataset (TRAIN or TEST) are."""
    return folder / f"{dataset}_data.json"


def questions(folder: Path) -> list[tuple[str, ToolCall]]:
    """Return the held-out instructions of a conversion with their calls, in file order."""
    rows = read_rows(data_file(folder, TEST))
    turns = [[turn["value"] for turn in row["conversations"]] for row in rows]
    return [(instruction, ToolCall(**json.loads(call))) for instruction, call in turns]


def _description(dataset: str) -> dict[str, Any]:
    """Describe a dataset for LLaMA-Factory; any name left out would fall back to none at all."""
    return {
        "file_name": data_file(Path(), dataset).name,
        "formatting": "sharegpt",
        "columns": {"messages": "conversations", "system": "system", "tools": "tools"},
        "tags": {
            "role_tag": "from",
            "content_tag": "value",
            "user_tag": "human",
            "assistant_tag": "gpt",
            "observation_tag": "observation",
            "function_tag": "function_call",
            "system_tag": "system",
        },
    }


def _without_duplicates(rows: Iterable[Example | Rejected]) -> Iterator[Example | Rejected]:
    """Reject a row that repeats an earlier one: it could be trained on and held out at once."""
    seen = set()
    for row in rows:
        if isinstance(row, Example):
            key = json.dumps([row.instruction, vars(row.call)], sort_keys=True)
            if key in seen:
                row = Rejected(row.file, row.row, "duplicate", row.record)
            seen.add(key)
        yield row


def _hold_out(examples: list[Example], share: float, seed: int) -> set[int]:
    """Draw the indices of the held-out examples: `share` of each tool's, but never its last one.

    The examples are put in line by tool and taken at even distances, so that the total is right
    even where a tool has few.
    """
    by_tool: dict[tuple[str, str], list[int]] = {}
    for index, example in enumerate(examples):
        by_tool.setdefault((example.tool.server, example.tool.name), []).append(index)
    draw = random.Random(seed)
    spare: list[int] = []
    for indices in by_tool.values():
        draw.shuffle(indices)
        spare += indices[1:]
    count = min(round(share * len(examples)), len(spare))
    return {spare[(2 * k + 1) * len(spare) // (2 * count)] for k in range(count)}


def _with_candidates(examples: list[Example], count: int, seed: int) -> Iterator[tuple[Example, list[Tool]]]:
    """Pair every example with its candidate tools: its own, its server's, then any, shuffled."""
    servers: dict[str, dict[str, Tool]] = {}
    for example in examples:
        servers.setdefault(example.tool.server, {}).setdefault(example.tool.name, example.tool)
    everything = [tool for tools in servers.values() for tool in tools.values()]
    for example in examples:
        # Drawn from the example alone: other rows may come and go without changing this one.
        draw = random.Random(f"{seed} {example.instruction}")
        own = list(servers[example.tool.server].values())
        chosen = {example.tool.name: example.tool}
        for pool in (own, everything):
            for tool in draw.sample(pool, len(pool)):
                if len(chosen) < count:
                    chosen.setdefault(tool.name, tool)
        tools = list(chosen.values())
        draw.shuffle(tools)
        yield example, tools


def _dump(content: Any) -> str:
    return json.dumps(content, ensure_ascii=False, indent=2) + "\n"


def _write(out: Path, contents: dict[str, str]) -> None:
    """Write all files into `out`: none appears before every one of them is on disk."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out) as scratch:
            for name, text in contents.items():
                # half a surrogate pair, in a rejected row, becomes its JSON escape
                data = text.encode(errors="backslashreplace")
                (Path(scratch) / name).write_bytes(data)
            for name in contents:
                os.replace(Path(scratch) / name, out / name)
    except OSError as error:
        raise McpLoraError(
            f"{out} cannot be written ({error.strerror}): mcp-lora convert --out OTHER_FOLDER"
        ) from None
