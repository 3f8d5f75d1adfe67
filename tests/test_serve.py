"""Exports and servers: the embedded model by llama.cpp, the commands of the others by equality."""

import ast
import copy
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import chat_templates
import httpx
import openai
import pytest
import xllamacpp
from conftest import BIN, environment, make_project, run
from gguf import GGUFReader, GGUFWriter
from huggingface_hub.errors import LocalTokenNotFoundError
from typer.testing import CliRunner

from mcp_lora.cli.app import app
from mcp_lora.data import files
from mcp_lora.data.records import RowError, ToolCall
from mcp_lora.engine import launch
from mcp_lora.errors import Interrupted, McpLoraError
from mcp_lora.evaluate import evaluation, parity, predict
from mcp_lora.evaluate.answers import Response
from mcp_lora.evaluate.evaluation import ADAPTER, BASE, Evaluation, Split
from mcp_lora.evaluate.questions import Question
from mcp_lora.evaluate.stats import proportion
from mcp_lora.prompts import chat_template
from mcp_lora.prompts.chat_template import ChatTemplate, calling
from mcp_lora.serve import card, llama_cpp, servers, support
from mcp_lora.serve import export as exports
from mcp_lora.serve.servers import Request
from mcp_lora.serve.verify import Comparison
from mcp_lora.train import runs

VLLM, SGLANG = "vllm==0.32.0", "sglang==0.5.23"
TEMPLATES = {
    "Qwen-Qwen2.5-7B-Instruct": ("hermes", "qwen"),
    "Qwen-Qwen3-0.6B": ("hermes", "qwen"),
    "Qwen3.5-4B": ("qwen3_xml", "qwen3_coder"),
    "Qwen3-Coder": ("qwen3_xml", "qwen3_coder"),
    "meta-llama-Llama-3.1-8B-Instruct": ("llama3_json", "llama3"),
    "mistralai-Mistral-Nemo-Instruct-2407": ("mistral", "mistral"),
    "GLM-4.6": ("glm45", "glm"),
    "GLM-4.7-Flash": ("glm47", "glm47"),
    "google-gemma-4-31B-it": ("gemma4", "gemma4"),
    "MiniMax-M2": ("minimax_m2", "minimax-m2"),
    "openai-gpt-oss-120b": ("openai", "gpt-oss"),
    "google-gemma-2-2b-it": ("hermes", "qwen"),  # with our template
    "MiniMax-M3": ("hermes", "qwen"),  # the same behind a mark
    "Kimi-K3": ("kimi_k3", "kimi_k3"),
    "openbmb-MiniCPM5-1B": ("minicpm5", "minicpm5"),
    "deepseek-ai-DeepSeek-V4": ("deepseek_v4", "deepseekv4"),
}
# As much as makes the model call tools: an export is compared by its calls.
SMALL = ["max_steps=2", "--global-batch", "2", "cutoff_len=512", "eval_strategy=no", "val_size=0"]
SMALL += ["preprocessing_num_workers=1", "learning_rate=0.001"]


# Two threads that wait for each other take ten times as long where other tests use the cores, and llama.cpp
# has no variable for their number. As sitecustomize.py on PYTHONPATH it reaches the commands, too.
ONE_THREAD = """
import xllamacpp

class OneThread(xllamacpp.CommonParams):
    def __init__(self):
        super().__init__()
        self.cpuparams.n_threads = self.cpuparams_batch.n_threads = 1

xllamacpp.CommonParams = OneThread
"""


@pytest.fixture(scope="module", autouse=True)
def one_thread(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    folder = tmp_path_factory.mktemp("one-thread")
    (folder / "sitecustomize.py").write_text(ONE_THREAD)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("xllamacpp.CommonParams", xllamacpp.CommonParams)  # restored afterwards
        patch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)
        exec(ONE_THREAD, {})
        yield


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project folder with a run of the embedded model: llama.cpp does not know the tiny one's tokenizer."""
    folder = make_project(tmp_path_factory.mktemp("served") / "project")
    done = run([BIN / "mcp-lora", "train", "--model", "embedded", *SMALL], folder)
    assert done.returncode == 0, done.stderr[-3000:]
    target = folder / "outputs/mcp_lora"
    metrics = {BASE: {"ast": proportion(0, 2)}, ADAPTER: {"ast": proportion(1, 2)}}
    evaluated = Evaluation({"seen": Split(2, metrics, {}, {})}, [], [], adapter=runs.adapter_hash(target))
    (target / "eval").mkdir()
    (target / "eval/metrics.json").write_text(evaluated.metrics())
    return folder


@pytest.fixture(scope="module")
def gguf(project: Path) -> Path:
    kept = {file: file.read_bytes() for file in (project / "outputs/mcp_lora/eval").iterdir()}
    done = run([BIN / "mcp-lora", "export", "--ollama", "--gguf", "q8_0"], project)
    assert done.returncode == 0, done.stderr[-3000:]
    assert kept == {file: file.read_bytes() for file in (project / "outputs/mcp_lora/eval").iterdir()}
    assert "held-out questions have other calls than base + adapter" in done.stderr
    return project / "outputs/ollama/model.gguf"


@pytest.fixture(scope="module")
def template(project: Path) -> ChatTemplate:
    return chat_template.load(runs.read_run(project / "outputs/mcp_lora"))


def test_parsers_are_found_by_how_the_template_writes_calls() -> None:
    texts = dict(chat_templates.templates())
    for name, parser in TEMPLATES.items():
        loaded = ChatTemplate(chat_templates.tokenizer_of(texts[name]))
        assert (name, support.parser(loaded)) == (name, parser)
    other = ChatTemplate(chat_templates.tokenizer_of(texts["unsloth-Apriel-1.5"]))
    with pytest.raises(McpLoraError, match="no parser is known .*--engine llama.cpp"):
        support.parser(other)


@pytest.mark.slow  # 365 MB
def test_the_parsers_are_those_of_the_servers() -> None:
    def source(package: str, file: str) -> str:
        return (chat_templates.fetched(package) / file).read_text(encoding="utf-8")

    vllm = source(VLLM, "vllm/tool_parsers/__init__.py")
    sglang = source(SGLANG, "sglang/srt/function_call/function_call_parser.py")
    for _, one, other in support.PARSERS:
        assert f'"{one}": (' in vllm and f'"{other}": ' in sglang
    ranks = source(VLLM, "vllm/config/lora.py").split("MaxLoRARanks = Literal", 1)[1].split("\n")[0]
    assert tuple(ast.literal_eval(ranks)) == support.RANKS


@pytest.mark.parametrize("thinking", [False, True])
def test_a_frozen_template_makes_the_prompts_of_training(thinking: bool) -> None:
    compared = set()
    for name, text in chat_templates.templates():
        try:
            template = ChatTemplate(chat_templates.tokenizer_of(text), thinking)
        except McpLoraError:
            continue
        server, firm = (chat_templates.tokenizer_of(template.frozen(firmly)) for firmly in (False, True))
        for messages, tools in list(parity.PROBES.values())[:3]:
            try:
                expected = template.prompt(messages, tools)
            except Exception:  # it rejects a system message
                continue
            other = {"enable_thinking": not thinking, "thinking": not thinking, "date_string": "1 Jan 1970"}
            for tokenizer, arguments in ((server, {}), (firm, other)):
                served = tokenizer.apply_chat_template(
                    messages, tools=tools or None, tokenize=False, add_generation_prompt=True, **arguments
                )
                assert served == expected, name
            compared.add(name)
    assert len(compared) > 90


def test_a_first_token_that_llama_cpp_adds_makes_no_difference(
    gguf: Path, template: ChatTemplate, tmp_path: Path
) -> None:
    """As Llama 3 and Mistral: the template writes it, and llama.cpp shows prompts without it."""
    with_first = copy.deepcopy(template)
    with_first.tokenizer.chat_template = "{{ bos_token }}" + template.frozen()
    file = tmp_path / "first.gguf"
    change = [sys.executable, "-m", "gguf.scripts.gguf_new_metadata", "--force", "--chat-template"]
    subprocess.run([*change, with_first.tokenizer.chat_template, gguf, file], check=True, capture_output=True)
    field = GGUFReader(file, "r+").fields["tokenizer.ggml.add_bos_token"]
    field.parts[field.data[0]][0] = True
    with llama_cpp.running(file, None, None) as url:
        assert parity.parity(url, with_first).differences == []
        assert len(parity.parity(url, template).differences) == len(parity.PROBES)


def test_commands_of_the_servers(project: Path, tmp_path: Path) -> None:
    target = project / "outputs/mcp_lora"
    config = runs.read_run(target)

    def command(engine: str, **changes: Any) -> list[str]:
        return servers.command(Request(**({"target": target, "engine": engine} | changes)))

    where = ["--host", "127.0.0.1", "--port", "8000"]
    template = ["--chat-template", str(target / "serving/chat_template.jinja")]
    assert command("vllm") == [
        *("vllm", "serve", config["model_name_or_path"], "--enable-lora", "--max-lora-rank", "64"),
        *("--lora-modules", f"mcp-lora={target}", *template, *where),
        *("--enable-auto-tool-choice", "--tool-call-parser", "hermes"),
        *("--generation-config", str(target / "serving")),
    ]
    ends = json.loads((target / "serving/generation_config.json").read_text())
    assert ends == {"eos_token_id": [2]}
    with pytest.raises(McpLoraError, match="merged model: mcp-lora export"):
        command("sglang")
    _, _, gguf, *words = command("llama.cpp")
    assert words == [*("--alias", "mcp-lora", "--jinja", "--ctx-size", "16384", "--predict", "2048"), *where]
    assert gguf.startswith(str(target / "merged-")) and gguf.endswith("-f16.gguf")
    merged = tmp_path / "merged"
    exports.copy_adapter(target, merged)
    (merged / "config.json").write_text('{"model_type": "llama"}')
    template = ["--chat-template", str(merged / "chat_template.jinja")]
    assert command("sglang", target=merged, python=Path("/v/python"), api_key="k", port=1) == [
        *("/v/python", "-m", "sglang.launch_server", "--model-path", str(merged), *template),
        *("--host", "127.0.0.1", "--port", "1"),
        *("--tool-call-parser", "qwen", "--served-model-name", "mcp-lora", "--api-key", "k"),
    ]
    with_key = servers.command(Request(merged, "sglang", api_key="k"), Path("key.yaml"))
    assert with_key[-2:] == ["--config", "key.yaml"] and "k" not in with_key
    assert command("vllm", target=merged, python=Path("/v/python")) == [
        *("/v/python", "-m", "vllm.entrypoints.cli.main", "serve", str(merged)),
        *("--served-model-name", "mcp-lora", *template, *where),
        *("--enable-auto-tool-choice", "--tool-call-parser", "hermes"),
    ]
    (merged / "Modelfile").write_text("FROM ./model.gguf")
    assert command("ollama", target=merged) == [
        *("ollama", "create", "mcp-lora", "--file", str(merged / "Modelfile"))
    ]
    with pytest.raises(
        McpLoraError, match=f"no Modelfile: mcp-lora export {re.escape(str(target))} --ollama"
    ):
        command("ollama")
    with pytest.raises(McpLoraError, match="--engine llama.cpp"):
        command("vllm", target=Path("x.gguf"))
    with pytest.raises(McpLoraError, match="neither a run's folder"):
        command("vllm", target=tmp_path)
    assert command("sglang", target=merged)[0] == "python"  # which has SGLang, unlike that of mcp-lora


def test_another_rank_is_rounded_up_for_vllm(project: Path, tmp_path: Path) -> None:
    target = tmp_path / "run"
    exports.copy_adapter(project / "outputs/mcp_lora", target)
    (target / "run.yaml").write_text((project / "outputs/mcp_lora/run.yaml").read_text())
    adapter = json.loads((target / "adapter_config.json").read_text())
    for rank, allowed in ((2, "8"), (65, "128")):
        (target / "adapter_config.json").write_text(json.dumps(adapter | {"r": rank}))
        words = servers.command(Request(target, "vllm"))
        assert words[words.index("--max-lora-rank") + 1] == allowed
    (target / "adapter_config.json").write_text(json.dumps(adapter | {"r": 1024}))
    with pytest.raises(McpLoraError, match="up to 512, not 1024"):
        servers.command(Request(target, "vllm"))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias"),
        ({"init_lora_weights": "pissa_niter_16"}, "pissa_niter_16"),
        ({"modules_to_save": ["lm_head"]}, "lm_head"),
        ({"init_lora_weights": "gaussian", "bias": "none", "use_dora": False, "modules_to_save": None}, ""),
    ],
)
def test_an_adapter_that_vllm_rejects_is_to_be_merged(
    changes: dict[str, Any], named: str, trained: Path
) -> None:
    (trained / "adapter_config.json").write_text(json.dumps({"r": 8, "init_lora_weights": True} | changes))
    refused = pytest.raises(McpLoraError, match=f"no adapter with {named}, .*: mcp-lora export")
    with refused if named else nullcontext():
        assert support.lora_options(trained)[:3] == ["--enable-lora", "--max-lora-rank", "8"]


def test_an_exported_folder_is_converted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Path] = []

    def convert(folder: Path, target: Path, dtype: str) -> None:
        assert (folder, dtype) == (tmp_path, "f16") and target.parent != tmp_path  # two may start at once
        target.write_bytes(b"GGUF")
        made.append(target)

    @contextmanager
    def running(model: Path, *where: Any) -> Iterator[str]:
        assert model == tmp_path / "model.gguf" and model.is_file()
        raise Interrupted(130)
        yield ""

    monkeypatch.setattr(llama_cpp, "convert", convert)
    monkeypatch.setattr(llama_cpp, "running", running)
    with pytest.raises(McpLoraError, match="neither a run's folder"):
        servers.gguf_of(Request(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    for _ in range(2):
        with pytest.raises(Interrupted):
            request = Request(tmp_path, engine="llama.cpp", port=0)
            servers.serve(request, lambda text: None, lambda: pytest.fail("exports"))
    assert len(made) == 1 and not made[0].exists()


def test_an_adapter_as_gguf_is_not_served_alone(tmp_path: Path) -> None:
    file = tmp_path / "adapter.gguf"
    writer = GGUFWriter(file, "llama")
    writer.add_type("adapter")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with (
        pytest.raises(McpLoraError, match="adapter without its base: mcp-lora serve RUN"),
        llama_cpp.running(file, None, None),
    ):
        pass


def test_a_gguf_file_answers_calls_to_several_clients(
    project: Path, gguf: Path, template: ChatTemplate
) -> None:
    with llama_cpp.running(gguf, None, None, api_key="secret") as url:
        client = openai.OpenAI(base_url=url, api_key="secret")

        def ask(city: str) -> tuple[str, str]:
            message = {"role": "user", "content": f"Use get_weather for {city}."}
            made = client.chat.completions.create(
                model="mcp-lora", messages=[message], tools=[servers.PROBE], temperature=0, max_tokens=64,
                tool_choice="required",
            )  # fmt: skip
            (call,) = made.choices[0].message.tool_calls or []
            return call.function.name, call.function.arguments

        cities = ["Tokyo", "Paris", "Oslo", "Rome", "Lima", "Cairo", "Berlin", "Madrid"]
        alone = [ask(city) for city in cities]
        assert alone[0] == ("get_weather", '{"city": "Tokyo"}') and len({*alone}) == 8
        with ThreadPool(8) as pool:
            assert pool.map(ask, cities) == alone
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=url, api_key="wrong").chat.completions.create(model="x", messages=[])
        with pytest.raises(openai.APIStatusError) as broken:
            client.chat.completions.create(model="x", messages="broken")  # type: ignore[arg-type]
        assert 400 <= broken.value.status_code < 500 and ask("Tokyo") == alone[0]


def test_an_answer_that_does_not_end_is_ended(gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama_cpp, "ANSWER", 8)
    with llama_cpp.running(gguf, None, None) as url, openai.OpenAI(base_url=url, api_key="-") as client:
        for given, length in ((openai.omit, 8), (12, 12)):
            made = client.chat.completions.create(
                model="mcp-lora",
                messages=[{"role": "user", "content": "Tell a story."}],
                max_tokens=given,
                extra_body={"ignore_eos": True},
            )
            assert made.usage and made.usage.completion_tokens == length


PROBE = ("canitoolcall==0.1.1", "jsonschema==4.26.0", "attrs==26.1.0", "referencing==0.37.0")
PROBE += ("jsonschema-specifications==2025.9.1", "rpds-py==2026.9.1")


# Prints the scenarios of the probe, by name.
SCENARIOS = """
import json
from canitoolcall.probe import BUILTIN_SCENARIOS
print(json.dumps({one.id: [one.messages, one.tools] for one in BUILTIN_SCENARIOS}, default=dict))
"""
PEOPLE = [{"name": "Ana", "email": "ana@example.com"}, {"name": "Bo", "email": "bo@example.com"}]
# What the probe expects of a model: calls, or an answer.
ANSWERS: dict[str, list[ToolCall] | str] = {
    "single-call": [ToolCall("get_weather", {"city": "Paris"})],
    "parallel-calls": [
        ToolCall("get_weather", {"city": "Paris"}),
        ToolCall("get_weather", {"city": "Tokyo"}),
    ],
    "no-call": "42",
    "nested-args": [
        ToolCall(
            "create_event",
            {
                "title": "Design review",
                "start": "2026-10-01T15:00:00Z",
                "attendees": PEOPLE,
                "location": {"city": "Berlin", "room": "4.12"},
            },
        )
    ],
    "unicode-args": [
        ToolCall("save_note", {"title": "Grüße aus Zürich", "body": "Café ☕ in 東京 — naïve résumé 🚀"})
    ],
    "empty-args": [ToolCall("get_server_time", {})],
    "forced-tool-choice": [ToolCall("get_weather", {"city": "Lisbon"})],
    "tool-result-followup": "It is 18 °C and clear in Paris.",
    "reasoning-then-call": [ToolCall("record_answer", {"answer": "9.9"})],
}


@pytest.mark.slow  # trains for some minutes
def test_canitoolcalls_probe_passes(tmp_path: Path) -> None:
    """A model that has learned the right answers gives them by the server, as stream and whole."""
    probing = environment(PYTHONPATH=":".join(str(chat_templates.fetched(package)) for package in PROBE))
    argv = [sys.executable, "-c", SCENARIOS]
    scenarios = json.loads(subprocess.run(argv, env=probing, capture_output=True, check=True).stdout)
    assert scenarios.keys() == ANSWERS.keys()
    with (tmp_path / "rows.jsonl").open("w") as rows:
        for name, (messages, tools) in scenarios.items():
            said = ANSWERS[name]
            answer = {"role": "assistant", "content": said} if isinstance(said, str) else calling(said)
            rows.write(json.dumps({"messages": [*messages, answer], "tools": tools}) + "\n")
    words = ["convert", "rows.jsonl", "--turns", "all", "--keep-plain", "--test", "0", "--no-call", "0"]
    done = run([BIN / "mcp-lora", *words], tmp_path)
    assert "read 9 rows = 9 in train + 0 rejected" in done.stderr, done.stderr
    words = ["dataset_dir=data/llama_factory", "num_train_epochs=10", "learning_rate=1e-3"]
    done = run([BIN / "mcp-lora", "train", "--config", "demo", "--model", "embedded", *words], tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    words = ["outputs/demo", "--gguf", "f16", "--output", "model.gguf"]
    done = run([BIN / "mcp-lora", "export", *words], tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    with llama_cpp.running(tmp_path / "model.gguf", None, None) as url:
        argv = [sys.executable, "-m", "canitoolcall", "probe", "--base-url", url, "--model", "mcp-lora"]
        probed = subprocess.run(
            [*argv, "--timeout", "300", "--json", "-"], env=probing, capture_output=True, text=True
        )
    outcomes = json.loads(probed.stdout)["outcomes"]
    assert len(outcomes) == 27 and {one["status"] for one in outcomes} == {"pass"}, outcomes


def test_parity_is_shown_and_another_template_is_found_out(
    project: Path, gguf: Path, template: ChatTemplate, monkeypatch: pytest.MonkeyPatch
) -> None:
    with llama_cpp.running(gguf, None, None) as url:
        same = parity.parity(url, template)
        assert (same.compared, same.count, same.differences) == ("token ids", len(parity.PROBES), [])
        # servers that have no /apply-template
        post = httpx.Client.post
        lacking = httpx.Response(404)

        def counted(client: httpx.Client, place: str, **body: Any) -> httpx.Response:
            return post(client, place, **body) if place.endswith("completions") else lacking

        monkeypatch.setattr(httpx.Client, "post", counted)
        same = parity.parity(url, template)
        assert (same.compared, same.differences) == ("numbers of tokens", [])

        def tokenize(client: httpx.Client, place: str, json: Any) -> httpx.Response:
            if not place.endswith("/tokenize"):
                return lacking
            prompt = template.prompt(json["messages"], json.get("tools", []))
            return httpx.Response(
                200, json={"tokens": template.ids(prompt)[1:]}, request=httpx.Request("POST", place)
            )

        monkeypatch.setattr(httpx.Client, "post", tokenize)
        other = parity.parity(url, template)
        assert other.compared == "token ids" and len(other.differences) == len(parity.PROBES)
        monkeypatch.setattr(httpx.Client, "post", post)
    with llama_cpp.running(gguf, None, chat_template.PLAIN) as url:
        other = parity.parity(url, template)
        said: list[str] = []
        request = evaluation.Request(
            project / "outputs/mcp_lora", limit=1, endpoint=evaluation.Endpoint(url, "mcp-lora")
        )
        evaluation.evaluate(request, say=said.append)
    assert "# Tools" in said[0] and said[0].startswith("warning: ")
    assert "# Tools" in other.differences[0] and other.differences[0].startswith("a question and one tool: ")
    with pytest.raises(McpLoraError, match="does not answer .*mcp-lora serve"):
        parity.parity(url, template)


@pytest.mark.parametrize(
    ("names", "asked"),
    [
        (["base", "mcp-lora"], "mcp-lora"),
        (["mcp-lora:latest", "llama3:latest"], "mcp-lora:latest"),
        (["other"], "other"),
    ],
)
def test_parity_asks_the_served_adapter(
    names: list[str], asked: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ollama lists every model that it has, and gives its reason for a refusal in the answer's text."""
    refused: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        if request.url.path.endswith("/models"):
            return httpx.Response(200, json={"data": [{"id": name} for name in names]})
        if request.url.path.endswith("/completions"):
            refused.append(json.loads(request.content)["model"])
            return httpx.Response(400, json={"error": {"message": f"{refused[0]} does not support tools"}})
        return httpx.Response(404)

    template = ChatTemplate(chat_templates.tokenizer_of(dict(chat_templates.templates())["Qwen3-Coder"]))
    client, transport = httpx.Client, httpx.MockTransport(answer)
    monkeypatch.setattr(httpx, "Client", lambda **how: client(transport=transport, **how))
    with pytest.raises(McpLoraError, match=f"400: .*{asked} does not support tools.*: is it running"):
        parity.parity("http://s/v1", template)
    assert refused == [asked]
    names[:] = ["a", "b"]
    again = "a, b: mcp-lora parity http://s/v1 --endpoint-model NAME"
    with pytest.raises(McpLoraError, match=f"which of its models.*{again}"):
        parity.parity("http://s/v1", template)


@pytest.fixture
def merging(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the project, with an engine that merges at once, and answers with the gold calls.

    What the real one does, `gguf` and test_end_to_end.py show.
    """

    def run_engine(verb: str, config: dict[str, Any], environment: dict[str, str]) -> launch.Outcome:
        assert verb == "export" and Path(config["adapter_name_or_path"]).is_dir()
        folder = Path(config["export_dir"])
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"merged")
        return launch.Outcome(0, "")

    monkeypatch.chdir(project)
    monkeypatch.setattr(launch, "run_engine", run_engine)
    monkeypatch.setattr(exports, "compare", lambda *words: Comparison(0.1, 0.2, "float32"))
    monkeypatch.setattr(predict, "by_engine", gold)


def gold(
    asked: Sequence[Question], template: ChatTemplate, *rest: Any
) -> Iterator[tuple[Question, Response]]:
    return ((one, Response(one.prompt, template.without_end(one.target), [])) for one in asked)


def test_what_is_not_equivalent_is_not_exported(
    merging: None, gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llama_cpp, "convert", lambda model, target, dtype: target.symlink_to(gguf))
    monkeypatch.setattr(llama_cpp, "complete", lambda url, prompt, length: [])  # never a call
    before = {*Path("outputs").iterdir()}
    with pytest.raises(McpLoraError, match="have other calls than base \\+ adapter, at most") as refused:
        exports.export(exports.Request(Path("outputs/mcp_lora"), Path("outputs/other.gguf"), gguf="f16"))
    assert refused.value.code == 1
    assert {*Path("outputs").iterdir()} - before == {Path("outputs/.other.gguf.lock")}


def test_a_merged_model_that_answers_otherwise_is_not_exported(
    merging: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def by_engine(
        asked: Sequence[Question], template: ChatTemplate, settings: dict[str, Any], *rest: Any
    ) -> Iterator[tuple[Question, Response]]:
        if "adapter_name_or_path" in settings:
            return gold(asked, template)
        assert (Path(settings["model_name_or_path"]) / "model.safetensors").read_bytes() == b"merged"
        return ((question, Response(question.prompt, "As the base.", [])) for question in asked)

    monkeypatch.setattr(predict, "by_engine", by_engine)
    before = {*Path("outputs").iterdir()}
    request = exports.Request(Path("outputs/mcp_lora"), Path("outputs/other"))
    with pytest.raises(McpLoraError, match="other calls than base .*mcp-lora export .*--adapter-only"):
        exports.export(request)
    monkeypatch.setattr(exports, "compare", lambda *words: Comparison(0.3, 0.2, "float32"))
    with pytest.raises(McpLoraError, match="not equivalent, nothing is exported .* logit is 0.3 ") as refused:
        exports.export(request)
    assert refused.value.code == 1
    assert {*Path("outputs").iterdir()} - before == {Path("outputs/.other.lock")}


def test_a_model_that_there_is_no_room_for_is_exported_with_a_warning(
    merging: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def by_engine(*words: Any) -> Any:
        raise predict.NoRoomError("CUDA out of memory")

    monkeypatch.setattr(predict, "by_engine", by_engine)
    note = exports.export(exports.Request(Path("outputs/mcp_lora"), Path("outputs/unasked")))
    assert "difference of a logit" in note and note.endswith("(the model does not fit into memory)")
    assert Path("outputs/unasked/model.safetensors").is_file()


def test_an_adapter_by_itself(project: Path, template: ChatTemplate) -> None:
    folder = project / "outputs/adapter"
    exports.export(exports.Request(project / "outputs/mcp_lora", folder, adapter_only=True))
    assert (folder / "adapter_model.safetensors").read_bytes() == (
        project / "outputs/mcp_lora/adapter_model.safetensors"
    ).read_bytes()
    assert (
        (folder / "chat_template.jinja").read_text() == template.frozen() == template.tokenizer.chat_template
    )
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [template.tokenizer.convert_tokens_to_ids("<|im_end|>")]
    card = (folder / "README.md").read_text()
    assert "24 rows" in card and "lora_rank 64" in card and "seen, " in card
    done = run([BIN / "mcp-lora", "export", "--adapter-only", "--gguf", "f16"], project)
    assert done.returncode == 0 and "held-out questions" in done.stderr, done.stderr[-3000:]
    assert (project / "outputs/adapter.gguf").is_file()


def test_the_modelfile_leaves_the_prompt_to_the_chat_template_of_the_gguf_file(
    gguf: Path, template: ChatTemplate
) -> None:
    lines = gguf.with_name("Modelfile").read_text(encoding="utf-8").splitlines()
    assert lines == [
        *("FROM ./model.gguf", "REQUIRES 0.30.0", "PARAMETER temperature 0", "PARAMETER repeat_penalty 1"),
        *("PARAMETER num_ctx 16384", 'PARAMETER stop "<|im_end|>"'),
    ]
    field = GGUFReader(gguf).fields["tokenizer.chat_template"]
    assert bytes(field.parts[field.data[0]]).decode() == template.frozen(firmly=True)
    assert {file.name for file in gguf.parent.iterdir()} == {"model.gguf", "Modelfile", "README.md"}


def test_the_model_card_has_the_bases_licence(trained: Path, tmp_path: Path) -> None:
    (trained / "run.yaml").write_text(f"model_name_or_path: {tmp_path}")
    assert "\nlicense" not in card.model_card(trained, trained, "mcp-lora serve .")
    (tmp_path / "README.md").write_text("A model.\nlicense: [see below\n")  # no front matter
    assert "\nlicense" not in card.model_card(trained, trained, "mcp-lora serve .")
    head = "license: other\nlicense_name: qwen\ntags: [a]\n"
    (tmp_path / "README.md").write_text(f"---\n{head}---\nlicense: none\n")
    lines = card.model_card(trained, trained, "mcp-lora serve .").splitlines()
    assert lines[: lines.index("---", 1)][-2:] == ["license: other", "license_name: qwen"]
    assert "license: none" not in lines and "In this folder: `mcp-lora serve .`" in lines


@pytest.mark.parametrize(
    ("options", "command"),
    [
        ({"ollama": True}, "ollama create mcp-lora --file Modelfile"),
        ({"gguf": "f16"}, "llama-server --jinja --model my.gguf"),
        ({"gguf": "f16", "adapter_only": True}, "llama-server --jinja --model BASE.gguf --lora my.gguf"),
    ],
)
def test_the_command_that_serves_an_export(options: dict[str, Any], command: str, trained: Path) -> None:
    assert exports._serving(exports.Request(trained, Path("my.gguf"), **options), trained) == command


def test_ollama_gets_no_model_that_it_prompts_in_its_own_way(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_folder = project / "outputs/mcp_lora"
    card.check_ollama(run_folder, "mcp-lora export --gguf f16")
    (tmp_path / "config.json").write_text('{"model_type": "gemma4_text"}')
    monkeypatch.setattr(chat_template, "model_folder", lambda config: tmp_path)
    with pytest.raises(McpLoraError, match="renders gemma4_text with its own prompts.*--gguf f16, and"):
        card.check_ollama(run_folder, "mcp-lora export --gguf f16")


def test_serve_is_one_command(project: Path, gguf: Path) -> None:
    argv = [BIN / "mcp-lora", "serve", "--port", "0"]
    servers.gguf_of(Request(project / "outputs/mcp_lora")).symlink_to(gguf)  # as if it was served before
    with subprocess.Popen(argv, cwd=project, env=environment(), stderr=subprocess.PIPE, text=True) as server:
        try:
            assert server.stderr
            ready = next(line for line in server.stderr if "http://127.0.0.1:" in line)
            url = re.findall(r"http://127.0.0.1:\d+/v1", ready)[0]
            done = run([BIN / "mcp-lora", "parity", url], project)
            assert done.returncode == 0 and "7 conversations compared by token ids, 0 differ" in done.stderr
            words = [BIN / "mcp-lora", "eval", "--endpoint", url, "--endpoint-model", "mcp-lora"]
            done = run([*words, "--limit", "1"], project)
            assert done.returncode == 0 and "not those of training" not in done.stderr, done.stderr
            port = url.split(":")[2].split("/")[0]
            done = run([BIN / "mcp-lora", "serve", gguf, "--port", port], project)
            assert done.returncode == 2 and f"port {port} cannot be used" in done.stderr
        finally:
            server.send_signal(signal.SIGINT)
        assert "the server is stopped" in server.stderr.read()
    assert server.returncode == 0


def test_a_run_is_exported_once_to_be_served(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, served = [], []

    def export(request: exports.Request, progress: Any) -> str:
        assert (request.run, request.gguf, earlier.is_file()) == (target, "f16", True)
        request.target.write_bytes(b"GGUF")
        made.append(request.target)
        return "checked"

    @contextmanager
    def running(model: Path, *where: Any) -> Iterator[str]:
        served.append(model)
        yield "http://127.0.0.1:1/v1"

    def announce(*words: Any) -> None:
        raise Interrupted(128 + signal.SIGINT)

    monkeypatch.setattr(exports, "export", export)
    monkeypatch.setattr(llama_cpp, "running", running)
    monkeypatch.setattr(servers, "announce", announce)
    target = project / "outputs/mcp_lora"
    servers.gguf_of(Request(target)).unlink(missing_ok=True)
    earlier = target / "merged-earlier-f16.gguf"
    earlier.write_bytes(b"of an earlier adapter")
    said: list[str] = []
    for _ in range(2):
        servers.serve(
            Request(target, "llama.cpp", port=0),
            said.append,
            lambda: nullcontext(lambda step, fraction: None),
        )
    assert served == [*made, *made] and not earlier.exists()
    once = f"exporting {target} as {made[0]}, once"
    assert said == [once, f"{made[0]}: checked", *2 * ["the server is stopped"]]
    made[0].unlink()


def test_what_cannot_be_served_is_told(project: Path, tmp_path: Path, capsys: Any) -> None:
    def fails(*words: str) -> str:
        done = run([BIN / "mcp-lora", "serve", *words], project)
        assert done.returncode and "Traceback" not in done.stderr
        return done.stderr

    assert "can be reached from other machines: mcp-lora serve --host 0.0.0.0 --api-key" in fails(
        "--host", "0.0.0.0"
    )
    (tmp_path / "no.gguf").write_bytes(b"GGUF")
    assert "is it a GGUF file" in fails(str(tmp_path / "no.gguf"))
    for words in ([], ["--print", "llama.cpp"]):
        assert "no missing.gguf: mcp-lora export RUN --gguf f16 --output missing.gguf" in fails(
            "missing.gguf", *words
        )
    assert "nowhere.invalid is not an address" in fails("--host", "nowhere.invalid", "--api-key", "k")
    assert "is not installed here: mcp-lora serve --python" in fails("--engine", "vllm")
    assert "only llama.cpp finds a free port" in fails("--engine", "vllm", "--port", "0")
    stub = tmp_path / "python"
    stub.write_text("#!/bin/sh\necho 'ValueError: no such model' >&2; exit 3\n")
    stub.chmod(0o755)
    ended = fails("--engine", "vllm", "--python", str(stub))
    assert (
        "ended:\nValueError: no such model\nIts command: mcp-lora serve outputs/mcp_lora --print vllm"
        in ended
    )
    missing = fails("--engine", "vllm", "--python", sys.executable)
    assert "vllm is not installed here: mcp-lora serve --python PATH, or --engine llama.cpp" in missing
    assert "llama.cpp needs no --python" in fails("--engine", "llama.cpp", "--python", sys.executable)


# Run with the package that is named: each has this module of its own. A server gets an answer in pieces.
PARSE = """
import importlib, json, sys
chat_parsing = importlib.import_module(sys.argv[1])

def parsed(template, prompt, text, tools):
    parser = chat_parsing.ResponseParser(template, prefix=prompt, tools=tools)
    for character in text:
        parser.feed(character)
    return parser.finalize()[0]

print(json.dumps([parsed(*one) for one in json.load(sys.stdin)]))
"""


@pytest.mark.parametrize(
    ("module", "packages", "folder"),
    [
        # 5.5, which LLaMA-Factory needs, has none
        ("transformers.utils.chat_parsing", ["transformers==5.24.0", "tokenizers==0.23.1"], ""),
        pytest.param("chat_parsing", [VLLM], "vllm/parser", marks=pytest.mark.slow),
        pytest.param("chat_parsing", [SGLANG], "sglang/srt/parser", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("thinking", [False, True])
def test_answers_are_parsed_by_the_response_template(
    thinking: bool, module: str, packages: list[str], folder: str
) -> None:
    question, calls = chat_templates.QUESTION, chat_templates.CALLS
    called = chat_templates.calling(calls["one call"])
    turns = [
        ([question], chat_templates.calling(made, said), made, said)
        for made in calls.values()
        for said in (None, "Let me see.")
    ]
    turns.append(([question, called, chat_templates.RESULT], chat_templates.ANSWER, [], "It is 7."))
    given, expected, formats = [], [], Counter[str]()
    for name, text in chat_templates.templates():
        # cohere2 ends an answer with a token of its own, diffusion_gemma opens it again after a result
        if name in ("trl/cohere2", "trl/diffusion_gemma"):
            continue
        try:
            template = ChatTemplate(chat_templates.tokenizer_of(text), thinking=thinking)
        except McpLoraError:
            continue
        if not (parsed := card.response_template(template)):
            continue
        formats[parsed["fields"]["tool_calls"]["open_pattern"]] += 1
        for messages, answer, made, said in turns:
            with suppress(RowError):  # the template cannot write this
                prompt, target = template.turn(messages, answer, chat_templates.TOOLS)
                # SGLang reads the None of a text that may be null as text
                null = "None" if packages == [SGLANG] and "\nNone\n" in target else None
                given.append([parsed, prompt, target, chat_templates.TOOLS])
                functions = [
                    {
                        "name": name,
                        "arguments": {key: null if one is None else one for key, one in values.items()},
                    }
                    for name, values in made
                ]
                found = [{"type": "function", "function": function} for function in functions]
                message = {"role": "assistant"} | ({"tool_calls": found} if found else {})
                # some templates leave out what is said besides a call
                expected.append(message | ({"content": said} if said and said in target else {}))
    assert len(formats) == 3 and formats.total() >= 50, formats
    paths = [str(chat_templates.fetched(package) / folder) for package in packages]
    done = subprocess.run(
        [sys.executable, "-c", PARSE, module],
        input=json.dumps(given),
        env=environment(PYTHONPATH=":".join(paths)),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    for (_, _, target, _), wanted, found in zip(given, expected, json.loads(done.stdout), strict=True):
        assert found == wanted, target


def test_without_an_opening_there_is_no_response_template() -> None:
    """Mistral's first chat template begins an answer at once."""
    text = (
        "{{ bos_token }}{% for one in messages %}{% if one.role == 'user' %}[INST] {{ one.content }} [/INST]"
        "{% elif one.role == 'assistant' %}{{ one.content }}{{ eos_token }}{% endif %}{% endfor %}"
    )
    assert card.response_template(ChatTemplate(chat_templates.tokenizer_of(text))) is None


def test_push_makes_a_private_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    class Hub:
        def create_repo(self, name: str, **settings: Any) -> str:
            asked.append((name, settings))
            return f"https://huggingface.co/{name}"

        def upload_folder(self, **settings: Any) -> None:
            asked.append(settings)

        def upload_file(self, **settings: Any) -> None:
            raise httpx.ConnectError("no network")

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    address = "https://huggingface.co/me/model"
    assert exports.push(exports.Request(tmp_path, tmp_path, push="me/model")) == address
    assert asked == [
        ("me/model", {"private": True, "exist_ok": True}),
        {"repo_id": "me/model", "folder_path": tmp_path},
    ]
    file = tmp_path / "my x.gguf"
    file.write_bytes(b"GGUF")
    again = re.escape(f"hf auth login, and hf upload --private me/model '{file}'")
    with pytest.raises(McpLoraError, match=f"cannot be written on the hub .*{again}"):
        exports.push(exports.Request(tmp_path, file, push="me/model"))


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("me/a model", "must use alphanumeric .*: mcp-lora export --push"),
        ("me/m", "no token.*hf auth login, and .*--push me/m"),
    ],
)
def test_what_cannot_be_pushed_is_not_exported_first(
    name: str, problem: str, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Hub:
        def whoami(self) -> None:
            raise LocalTokenNotFoundError("no token")

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    with pytest.raises(McpLoraError, match=problem):
        exports.export(exports.Request(trained, tmp_path / "x", push=name))


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """A run's folder, as far as an export looks at it before its work."""
    run = tmp_path / "my run"
    run.mkdir()
    (run / "run.yaml").write_text("model_name_or_path: none")
    (run / "adapter_config.json").write_text('{"r": 12}')
    return run


def test_a_refused_export_names_the_whole_command(trained: Path, tmp_path: Path) -> None:
    output = tmp_path / "x"
    output.mkdir()
    request = exports.Request(trained, output, gguf="f16", adapter_only=True, push="me/x")
    options = "--adapter-only --gguf f16 --push me/x --output OTHER"
    with pytest.raises(McpLoraError, match=f"x exists: mcp-lora export '{trained}' {options}$"):
        exports.export(request)
    with pytest.raises(McpLoraError, match="merged model: mcp-lora export '.*my run' --ollama --output .*x$"):
        exports.export(exports.Request(trained, output, ollama=True, adapter_only=True))
    request = exports.Request(trained, checkpoint="300", ollama=True)
    assert request.command() == f"mcp-lora export '{trained}' --ollama --checkpoint 300"
    assert exports.Request(trained, questions=50).command().endswith(" --questions 50")


def test_one_export_at_a_time_to_a_place(trained: Path, tmp_path: Path) -> None:
    request = exports.Request(trained, tmp_path / "x")
    begun = tmp_path / ".x.new"
    begun.mkdir()
    with (
        files.exclusive(tmp_path / ".x.lock", ""),
        pytest.raises(McpLoraError, match="x is in use by another mcp-lora export: .* --output OTHER"),
    ):
        exports.export(request)
    assert begun.is_dir()


def test_a_repository_is_made_only_for_what_was_exported(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub is not asked before an export has succeeded."""
    monkeypatch.setattr(exports, "push", lambda *words: pytest.fail("pushed"))
    (tmp_path / "x").mkdir()
    words = ["export", str(trained), "--output", str(tmp_path / "x"), "--push", "me/model"]
    done = CliRunner().invoke(app, words)
    assert isinstance(done.exception, McpLoraError) and "x exists" in str(done.exception)


def test_an_address_where_no_server_can_listen_is_told_at_once(tmp_path: Path) -> None:
    def check(host: str, port: int) -> None:
        servers.check_address(Request(tmp_path, host=host, port=port, api_key="k"))

    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        with pytest.raises(McpLoraError, match=f"port {port} .*in use.*: mcp-lora serve --port {port + 1}"):
            check("127.0.0.1", port)
    check("127.0.0.1", port)
    check("127.0.0.1", 0)
    for host in ("10.255.255.1", "nowhere.invalid"):
        with pytest.raises(McpLoraError, match=f"{host} is not an address of this machine"):
            check(host, port)


def test_other_users_do_not_see_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the list of processes arguments are visible to all."""
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr(servers, "command", lambda request, key=None: [sys.executable, str(key)])
    monkeypatch.setattr(servers, "announce", lambda *words: None)
    seen: list[Any] = []

    def started(argv: list[str], variables: dict[str, str]) -> launch.Outcome:
        file = Path(argv[1])
        seen.append((file.suffix, file.stat().st_mode & 0o777, json.loads(file.read_text()), variables))
        return launch.Outcome(1, "")

    monkeypatch.setattr(launch, "run", started)
    request = Request(tmp_path, "sglang", port=1, api_key="secret")
    with pytest.raises(McpLoraError, match="the server has ended"):
        servers.serve(request, lambda text: None, lambda: nullcontext(lambda step, fraction: None))
    assert seen == [(".yaml", 0o600, {"api-key": "secret"}, {"VLLM_API_KEY": "secret"})]


def test_an_adapter_is_exported_once_and_its_command_is_offered_again(
    trained: Path, tiny_model: Path, tmp_path: Path
) -> None:
    (trained / "run.yaml").write_text(f"model_name_or_path: {tiny_model}")
    for file in tiny_model.glob("tokenizer*"):
        shutil.copy(file, trained)
    request = exports.Request(trained, tmp_path / "new folder" / "x", adapter_only=True)
    assert exports.export(request) == "the adapter as it was trained"
    there = {file.name for file in (tmp_path / "new folder").iterdir()}
    assert there == {"x", ".x.lock"}
    names = {"adapter_config.json", "chat_template.jinja", "generation_config.json", "README.md"}
    assert names < {file.name for file in request.target.iterdir()}
    vllm = "vllm serve BASE --enable-lora --max-lora-rank 16 --lora-modules mcp-lora=. --generation-config . "
    vllm += "--chat-template chat_template.jinja --enable-auto-tool-choice --tool-call-parser hermes"
    assert f"In this folder: `{vllm}`" in (request.target / "README.md").read_text()
    with pytest.raises(McpLoraError, match="x exists: .* --adapter-only --output OTHER"):
        exports.export(request)
