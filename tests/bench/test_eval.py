"""Answering and judging: pytest -m bench -s tests/bench/test_eval.py (ten minutes, no GPU).

The same questions of the shipped sample, put to SmolLM2-135M-Instruct and to an adapter of a few steps, by

    plain   the engine's own do_predict with its defaults, but greedy: 8 at a time, in the file's order, up
            to 1,024 tokens an answer
    ours    mcp-lora eval

Both are timed with the engine's start. The adapter's questions also go to llama.cpp, without its start:

    llama   llama.cpp's server, by token ids, with the merged model in f16 (mcp-lora export --gguf f16)
"""

import json
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from chat_templates import tokenizer_of
from conftest import BIN, CHAT_TEMPLATE, ROOT, SAMPLE, environment

from mcp_lora.data import calls
from mcp_lora.data.conversion import Settings, convert
from mcp_lora.evaluate import evaluation, questions
from mcp_lora.evaluate.answers import Judge, Response
from mcp_lora.evaluate.evaluation import ADAPTER, BASE
from mcp_lora.prompts.chat_template import ChatTemplate
from mcp_lora.serve import llama_cpp
from mcp_lora.serve.export import Request, export
from mcp_lora.train import runs
from mcp_lora.train.machine import Machine

# The base does not stop by itself: plain prediction takes a minute for each of its answers.
COUNT = {BASE: 8, ADAPTER: 24}
CPU = Machine(0, False, True)


@pytest.mark.bench
def test_asking_is_faster_than_plain_prediction(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train_configs").symlink_to(ROOT / "train_configs")
    convert(Settings([str(SAMPLE)], candidates=2, test=0.12), tmp_path / "data/demo")
    config = ["--config", "train_configs/demo.yaml", "max_steps=20"]
    _run(BIN / "mcp-lora", "train", "--data", SAMPLE, *config)
    run = tmp_path / "outputs/demo"
    seconds: dict[str, dict[str, float]] = {}
    for model, count in COUNT.items():
        adapter = runs.adapter(run) if model == ADAPTER else None
        plain = runs.serving_config(run, adapter) | {
            "stage": "sft",
            "do_predict": True,
            "predict_with_generate": True,
            "do_sample": False,
            "dataset_dir": str(tmp_path / "data/demo"),
            "eval_dataset": "mcp_test_seen",
            "max_samples": count,
            "template": "smollm2",
            "tool_format": "qwen",
            "use_cpu": True,
            "report_to": "none",
            "output_dir": str(tmp_path / f"plain-{model}"),
        }
        (tmp_path / "plain.yaml").write_text(yaml.safe_dump(plain), encoding="utf-8")
        start = time.perf_counter()
        _run(BIN / "llamafactory-cli", "train", "plain.yaml")
        between = time.perf_counter()
        request = evaluation.Request(run, limit=count, models=[model])
        found = evaluation.evaluate(request)
        took = {"plain": between - start, "ours": time.perf_counter() - between}
        seconds[model] = {name: each / count for name, each in took.items()}
        lines = (tmp_path / f"plain-{model}/generated_predictions.jsonl").read_text(encoding="utf-8")
        theirs = [json.loads(line)["predict"] for line in lines.splitlines()]
        same = sum(
            said.startswith(answer.text) for said, answer in zip(theirs, found.answers[model], strict=True)
        )
        rates = ", ".join(f"{name} {1 / each:.3f} a second" for name, each in seconds[model].items())
        ratio = seconds[model]["plain"] / seconds[model]["ours"]
        print(f"\n{model}: {count} questions, {rates}: {ratio:.2f} times; {same} answers begin alike")
    export(Request(run, tmp_path / "merged.gguf", gguf="f16"))
    prepared = evaluation.prepare(request)
    judge, template, same = Judge(prepared.template), prepared.template, 0
    with llama_cpp.running(tmp_path / "merged.gguf", None, None) as url:
        start = time.perf_counter()
        texts = [
            template.tokenizer.decode(llama_cpp.complete(url, template.ids(one.prompt), prepared.length))
            for one in prepared.asked
        ]
        llama = (time.perf_counter() - start) / len(texts)
    for question, text, answer in zip(prepared.asked, texts, found.answers[ADAPTER], strict=True):
        made = judge(question, Response("", template.without_end(text), [])).calls
        same += calls.same_calls(made, answer.calls)
    print(f"llama: {1 / llama:.3f} a second, the same calls for {same} of {len(texts)}")
    assert same >= 0.8 * len(texts)  # ours may be in bf16
    plain, ours = (sum(each[name] for each in seconds.values()) for name in ("plain", "ours"))
    print(f"a question put to both: ours is {plain / ours:.2f} times as fast")
    assert plain / ours >= 1.5


@pytest.mark.bench
def test_judging_takes_no_time(tmp_path: Path) -> None:
    convert(Settings([str(SAMPLE)], candidates=10, test=0.5), tmp_path / "data")
    asked = questions.read(tmp_path / "data", [])
    said = [
        Response("", f"<tool_call>\n{json.dumps(call._asdict())}\n</tool_call>", [])
        for question in asked
        for call in question.expected
    ]
    pairs = list(zip(asked * 200, (said[1:] + said[:1] + said) * 100, strict=True))  # half are wrong
    judge = Judge(ChatTemplate(tokenizer_of(CHAT_TEMPLATE)))
    judge(*pairs[0])  # the engine's import is no judging
    start = time.perf_counter()
    verdicts = [judge(question, answer).verdict for question, answer in pairs]
    rate = len(pairs) / (time.perf_counter() - start)
    print(f"\n{len(pairs)} answers read and judged, {rate:,.0f} a second")
    assert {verdict.exact for verdict in verdicts} == {True, False}
    assert rate >= 20_000


def _run(*argv: Any) -> None:
    done = subprocess.run(
        list(map(str, argv)), capture_output=True, text=True, env=environment(PATH=f"{BIN}:/usr/bin:/bin")
    )
    assert done.returncode == 0, done.stderr[-3000:]
