import json
import os
import signal
from array import array
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from conftest import SAMPLE, SHAPES, SHARED, preprocessed, record, write_json

from mcp_lora import dataset, forking, lengths
from mcp_lora.dataset import Settings, convert, refresh
from mcp_lora.errors import McpLoraError
from mcp_lora.lengths import Lengths
from mcp_lora.records import Fault


def budget_of(model: Path, template: str = "qwen", cutoff_len: int = 4096, **more: Any) -> dict[str, Any]:
    return {
        "model_name_or_path": str(model),
        "template": template,
        "cutoff_len": cutoff_len,
        "per_device_train_batch_size": 4,
    } | more


@pytest.fixture(scope="session")
def metaspace_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer as Llama 2's: spaces are ▁, and a token may reach over any boundary."""
    from tokenizers import Tokenizer, decoders, models, normalizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    bpe.normalizer = normalizers.Replace(" ", "▁")
    bpe.decoder = decoders.Replace("▁", " ")
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=2500, special_tokens=special, max_token_length=12)
    rows = json.loads(SAMPLE.read_text(encoding="utf-8"))
    texts = [json.dumps(row["tool_info"]) + "\n" + row["instruction"] for row in rows[::4]]
    # Without a pre-tokenizer each text is one word, and only what is short can be learned from.
    pieces = [text[i : i + 60] for text in texts for i in range(0, len(text), 60)]
    bpe.train_from_iterator(pieces, trainer)
    folder = tmp_path_factory.mktemp("models") / "metaspace"
    PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    return folder


TEMPLATES = [
    ("qwen", None),
    ("smollm2", "qwen"),
    ("smollm2", None),
    ("llama3", None),
    ("mistral", None),
    ("glm4", None),
    ("gemma", None),
    ("llama2", None),
    ("qwen3", None),
    ("deepseek", None),
]


@pytest.mark.parametrize("tokenizer", ["tiny_model", "metaspace_model"])
@pytest.mark.parametrize(("template", "tool_format"), TEMPLATES)
def test_the_sum_is_as_near_as_is_said(
    request: pytest.FixtureRequest, tmp_path: Path, tokenizer: str, template: str, tool_format: str | None
) -> None:
    """Against the whole sample, rendered and counted: ten tools each, templates of every kind."""
    counter = Lengths(budget_of(request.getfixturevalue(tokenizer), template, tool_format=tool_format))
    convert(Settings([str(SAMPLE)]), tmp_path)
    margin = lengths.MARGIN * counter.cutoff_len
    for sample in islice(dataset.samples(tmp_path, "mcp_train"), 0, None, 20):
        whole = counter.count([counter.render_sample(sample)])[0]
        bare = counter.count([counter.render_sample(sample | {"tools": None})])[0]
        added = counter.tools(json.loads(sample["tools"]))
        assert abs(bare + counter.any_tools + sum(filter(None, added)) - whole) <= margin
        if tokenizer == "tiny_model" and template == "qwen":
            assert bare + counter.any_tools + sum(filter(None, added)) == whole


@pytest.mark.parametrize("cutoff_len", [600, 1000])
@pytest.mark.parametrize(
    ("tokenizer", "template", "tool_format"),
    [
        ("tiny_model", "qwen", None),
        ("tiny_model", "smollm2", "qwen"),
        ("tiny_model", "qwen3", None),
        ("metaspace_model", "llama2", None),
    ],
)
def test_the_engine_cuts_nothing(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    tokenizer: str,
    template: str,
    tool_format: str | None,
    cutoff_len: int,
) -> None:
    """The engine's own loading and preprocessing of a converted set: every sample is complete."""
    model = request.getfixturevalue(tokenizer)
    budget = budget_of(model, template, cutoff_len, tool_format=tool_format)
    settings = Settings(
        [str(SAMPLE), str(SHAPES / "rows")], [str(SHAPES / "tools")], turns="all", no_call=0.1
    )
    stats = convert(settings, tmp_path, budget)
    assert stats["samples_that_lost_tools"] > 20
    complete, uncut = (
        [row["input_ids"] for row in preprocessed(tmp_path, model, template, tool_format, limit)]
        for limit in (cutoff_len, 100_000)
    )
    assert complete == uncut
    assert len(complete) == stats["written"]["mcp_train"] + stats["no_call_samples"]["mcp_train"]
    # as many tools as there is room for: one sample is close to the limit
    assert cutoff_len - 300 < max(map(len, complete)) <= cutoff_len
    assert abs(max(map(len, complete)) - stats["lengths"]["max"]) <= lengths.MARGIN * cutoff_len


def test_a_sample_that_is_too_long_with_its_own_tool_alone_is_rejected(
    tmp_path: Path, tiny_model: Path
) -> None:
    rows = [record("Add."), record("Add this " + "and that " * 2000), record("Subtract.", tool="other")]
    source = write_json(tmp_path / "rows.json", rows)
    stats = convert(Settings([str(source)], test=0), tmp_path / "out", budget_of(tiny_model, cutoff_len=1000))
    assert stats["rejected"] == {"too-long": 1} and stats["read"] == 3
    (line,) = (tmp_path / "out/rejected.jsonl").read_text(encoding="utf-8").splitlines()
    rejected = json.loads(line)
    assert rejected["row"] == 2 and rejected["record"] == rows[1]
    assert "cutoff_len is 1000" in rejected["sentence"]


def test_the_farthest_tools_go_first(tmp_path: Path, tiny_model: Path) -> None:
    servers = {
        item["tool_info"]["tool_name"]: item["server_info"]["server_name"]
        for item in json.loads(SAMPLE.read_text(encoding="utf-8"))
    }
    stats = convert(Settings([str(SAMPLE)]), tmp_path, budget_of(tiny_model, cutoff_len=1000))
    assert stats["tools_dropped"] > 100
    mates = others = 0
    for sample in dataset.samples(tmp_path, "mcp_train"):
        right = json.loads(sample["conversations"][1]["value"])["name"]
        for tool in json.loads(sample["tools"]):
            mates += servers[tool["name"]] == servers[right]
            others += servers[tool["name"]] != servers[right]
    assert others < mates


@pytest.mark.skipif(not forking.POSSIBLE, reason="processes are copied on Linux alone")
def test_copies_of_the_process_make_the_same_conversion(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With samples of every split, tools that are dropped, rows that are too long or cannot be rendered."""
    call = {"name": "get-sum", "arguments": {}}
    parallel = record("Add twice.", function_call=[call, call])  # more than glm4 can write
    rows = [*json.loads(SAMPLE.read_text(encoding="utf-8")), parallel]
    settings = Settings(
        [str(write_json(tmp_path / "rows.json", rows))],
        test=0.2,
        holdout_tools=0.3,
        holdout_servers=0.2,
        no_call=0.3,
    )
    budget = budget_of(tiny_model, "glm4", cutoff_len=450)
    for name, batch, worth in (("alone", 10**9, 10**9), ("copies", 7, 2)):
        monkeypatch.setattr("mcp_lora.rows._BATCH", batch)
        monkeypatch.setattr("mcp_lora.samples._SHARED", 100)
        monkeypatch.setattr("mcp_lora.samples.WORTH_A_PROCESS", worth)
        stats = convert(settings, tmp_path / name, budget)
    assert stats["rejected"]["not-renderable"] == 1 and stats["rejected"]["too-long"]
    assert stats["tools_dropped"] and len(stats["written"]) >= 4
    files = sorted(file.name for file in (tmp_path / "alone").iterdir())
    assert files == sorted(file.name for file in (tmp_path / "copies").iterdir())
    for name in files:
        assert (tmp_path / "alone" / name).read_bytes() == (tmp_path / "copies" / name).read_bytes(), name


def test_a_conversation_that_cannot_be_rendered_is_rejected_in_a_test_too(
    tmp_path: Path, tiny_model: Path
) -> None:
    """There it is cut after its call, and counted once more."""
    call = {"name": "get-sum", "arguments": json.dumps({"a": 1})}
    calls = [{"function": call}, {"function": call}]
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"Add {k}."},
                {"role": "assistant", "tool_calls": calls if k % 2 else calls[:1]},
                *[{"role": "tool", "content": "3"}] * (1 + k % 2),
                {"role": "assistant", "content": "It is 3."},
            ],
            "tools": [{"name": "get-sum", "parameters": {"type": "object", "properties": {}}}],
        }
        for k in range(40)
    ]
    settings = Settings([str(write_json(tmp_path / "rows.json", rows))], test=0.5, turns="all")
    stats = convert(settings, tmp_path / "out", budget_of(tiny_model, "glm4"))
    assert stats["rejected"] == {"not-renderable": 20} and stats["written"]["mcp_test_seen"] > 3


@pytest.mark.skipif(not forking.POSSIBLE, reason="processes are copied on Linux alone")
@pytest.mark.parametrize("doing", ["rows.Counting._count", "samples.Samples._write_apart"])
def test_a_copy_that_is_killed_is_told_and_the_old_conversion_stands(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, doing: str
) -> None:
    settings, out = Settings([str(SAMPLE)]), tmp_path / "out"
    convert(settings, out)
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    here = os.getpid()

    def killed(*_: Any) -> Any:
        assert os.getpid() != here
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr("mcp_lora.rows._BATCH", 7)
    monkeypatch.setattr("mcp_lora.samples.WORTH_A_PROCESS", 2)
    monkeypatch.setattr(f"mcp_lora.{doing}", killed)
    with pytest.raises(McpLoraError, match=r"ended \(exit code -9\), perhaps as memory ran out"):
        convert(settings, out, budget_of(tiny_model))
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before
    assert os.listdir(tmp_path) == ["out"]


def test_a_tool_that_the_template_cannot_render_is_no_candidate(tmp_path: Path, tiny_model: Path) -> None:
    """LLaMA-Factory's default tool format joins an enum of texts; numbers would end the run."""
    bad = record("Choose.", tool="choose", function_call={"name": "choose", "arguments": {}})
    bad["tool_info"]["input_schema"] = {"type": "object", "properties": {"n": {"enum": [1, 2]}}}
    source = write_json(tmp_path / "rows.json", [record("Add."), bad])
    settings = Settings([str(source)], test=0)
    stats = convert(settings, tmp_path / "out", budget_of(tiny_model, "gemma"))
    assert stats["rejected"] == {"not-renderable": 1}
    (sample,) = dataset.samples(tmp_path / "out", "mcp_train")
    assert [tool["name"] for tool in json.loads(sample["tools"])] == ["get-sum"]
    assert convert(settings, tmp_path / "out", budget_of(tiny_model))["written"] == {"mcp_train": 2}


def test_an_interruption_is_no_fault_of_the_row(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The signal's handler raises wherever the program is, in the engine's template too."""
    counter = Lengths(budget_of(tiny_model))

    def interrupted(*words: object) -> None:
        raise McpLoraError("interrupted")

    monkeypatch.setattr(counter.template, "encode_multiturn", interrupted)
    with pytest.raises(McpLoraError, match="interrupted"):
        counter.render([{"role": "user", "content": "a"}], "", None)


def test_a_sample_that_cannot_be_rendered_is_an_error(tmp_path: Path, tiny_model: Path) -> None:
    bad = record("Choose.", tool="choose", function_call={"name": "choose", "arguments": {}})
    bad["tool_info"]["input_schema"] = {"type": "object", "properties": {"n": {"enum": [1, 2]}}}
    source = write_json(tmp_path / "rows.json", [bad])
    convert(Settings([str(source)], test=0), tmp_path / "out")
    (sample,) = dataset.samples(tmp_path / "out", "mcp_train")
    with pytest.raises(Fault, match="cannot render"):
        Lengths(budget_of(tiny_model, "gemma")).encode(sample)
    source.unlink()
    with pytest.raises(McpLoraError, match=r"cannot render it.*mcp-lora convert --model"):
        refresh(None, tmp_path / "out", budget_of(tiny_model, "gemma"))


def test_a_template_is_left_as_it_was(tiny_model: Path) -> None:
    from llamafactory.data.template import TEMPLATES

    before = vars(TEMPLATES["smollm2"]).copy()
    Lengths(budget_of(tiny_model, "smollm2", tool_format="qwen", default_system="x", enable_thinking=False))
    assert vars(TEMPLATES["smollm2"]) == before


def test_packing_leaves_a_token_less_room(tiny_model: Path) -> None:
    assert Lengths(budget_of(tiny_model, packing=True)).cutoff_len == 4095


def test_a_summary(tiny_model: Path) -> None:
    counter = Lengths(budget_of(tiny_model))
    found = counter.summary(array("I", [8] * 90 + [16] * 10))
    assert (found["median"], found["p95"], found["max"]) == (8, 16, 16)
    assert sum(count for *_, count in found["histogram"]) == 100
    assert 0.05 < found["padding"] < 0.35
    assert counter.summary(array("I", [8] * 100))["padding"] == 0
    assert counter.summary(array("I", [12] * 100))["padding"] == 0.25  # to a multiple of 8
    grouped = Lengths(budget_of(tiny_model, train_sampling_strategy="group_by_length"))
    assert grouped.summary(array("I", [8] * 92 + [16] * 8))["padding"] == 0


def test_a_sample_as_the_engine_trains_on_it(tmp_path: Path, tiny_model: Path) -> None:
    convert(Settings([str(SAMPLE)], candidates=2), tmp_path)
    sample = next(iter(dataset.samples(tmp_path, "mcp_train")))
    counter = Lengths(budget_of(tiny_model))
    encoded = counter.encode(sample)
    assert len(encoded) == counter.count([counter.render_sample(sample)])[0]
    trained = counter.tokenizer.decode([token for token, is_trained in encoded if is_trained])
    assert trained.startswith("<tool_call>") and trained.endswith("<|im_end|>\n")


def test_no_tokenizer_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(McpLoraError, match=r"tokenizer of .*/none cannot be read.*--model FOLDER"):
        Lengths(budget_of(tmp_path / "none"))


def test_another_budget_converts_again(tmp_path: Path, tiny_model: Path) -> None:
    source = write_json(tmp_path / "rows.json", [record(f"Q{i}", tool=f"t{i}") for i in range(9)])
    out = tmp_path / "out"
    convert(Settings([str(source)]), out)
    budget = budget_of(tiny_model)
    stats = refresh(None, out, budget)
    assert stats and stats["lengths"]["cutoff_len"] == 4096
    assert refresh(None, out, budget) is None
    assert refresh(None, out, budget | {"cutoff_len": 2000})


def test_a_conversion_without_its_data_is_measured_for_another_model(
    tmp_path: Path, tiny_model: Path
) -> None:
    source = write_json(tmp_path / "rows.json", [record(f"Q{i}", tool=f"t{i}") for i in range(9)])
    out = tmp_path / "out"
    convert(Settings([str(source)]), out)
    source.unlink()
    assert refresh(None, out, budget_of(tiny_model)) is None
    stats = json.loads((out / "stats.json").read_text(encoding="utf-8"))
    assert stats["lengths"]["max"] > 100 and stats["budget"]["cutoff_len"] == 4096
    with pytest.raises(
        McpLoraError, match=r"of \d+ samples .* longer than cutoff_len = 200 .*convert --model"
    ):
        refresh(None, out, budget_of(tiny_model, cutoff_len=200))


@pytest.mark.skipif(not SHARED.is_dir(), reason="the third-party data is not here")
def test_real_trajectories_fit(tmp_path: Path, tiny_model: Path) -> None:
    settings = Settings([str(SHARED / "trajectory")], [str(SHARED / "tools")], turns="all")
    stats = convert(settings, tmp_path, budget_of(tiny_model))
    assert stats["read"] == 100 and stats["lengths"]["max"] <= 4096
