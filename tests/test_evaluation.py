"""Questions are asked once, judged, counted; a server that fails for the moment is asked again."""

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from chat_templates import tokenizer_of
from conftest import BIN, CHAT_TEMPLATE, SAMPLE, environment, write_json

from mcp_lora.cli.app import main
from mcp_lora.data.conversion import Settings, convert
from mcp_lora.engine import launch
from mcp_lora.errors import McpLoraError
from mcp_lora.evaluate import parity, plain_chat, predict, questions
from mcp_lora.evaluate.answers import Judge, Notebook, Response
from mcp_lora.evaluate.evaluation import (
    ADAPTER,
    BASE,
    Endpoint,
    Evaluation,
    Request,
    evaluate,
    prepare,
    summarise,
)
from mcp_lora.evaluate.gates import requirement, unmet
from mcp_lora.evaluate.questions import Question
from mcp_lora.evaluate.score import Verdict
from mcp_lora.prompts.chat_template import ChatTemplate
from mcp_lora.report import page as report
from mcp_lora.serve.card import model_card
from mcp_lora.train import manifest, runs
from mcp_lora.train.machine import Machine

JUDGE = Judge(ChatTemplate(tokenizer_of(CHAT_TEMPLATE)))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sample with questions of every split."""
    folder = tmp_path_factory.mktemp("data") / "held_out"
    settings = Settings(
        [str(SAMPLE)], candidates=3, test=0.2, holdout_tools=0.3, holdout_servers=0.2, no_call=0.3
    )
    convert(settings, folder)
    return folder


@pytest.fixture
def asked(data: Path) -> list[Question]:
    return [question for split in questions.SPLITS for question in questions.read(data, [split])[:2]]


def said(text: str) -> Response:
    return Response("prompt", text, [])


def right(question: Question) -> Response:
    calls = [f"<tool_call>\n{json.dumps(call._asdict())}\n</tool_call>" for call in question.expected]
    return said("\n".join(calls) or "There is no tool for that.")


def test_questions_are_read_by_split(data: Path, tmp_path: Path) -> None:
    everything = questions.read(data, [])
    assert list(dict.fromkeys(question.split for question in everything)) == list(questions.SPLITS)
    for question in everything:
        assert bool(question.expected) == (question.split != "no_call") and question.instruction
        assert all(call.name in question.tools for call in question.expected)
    unseen = questions.read(data, ["unseen_server"])
    assert all(question.split == "unseen_server" and question.server for question in unseen)
    with pytest.raises(McpLoraError, match="no split seem: mcp-lora eval --split seen or"):
        questions.read(data, ["seem"])
    convert(Settings([str(SAMPLE)], test=0.2), tmp_path)
    with pytest.raises(McpLoraError, match="no questions of split no_call: mcp-lora convert .*--no-call"):
        questions.read(tmp_path, ["no_call"])


def test_a_damaged_question_is_told(tmp_path: Path) -> None:
    convert(Settings([str(SAMPLE)], test=0.2), tmp_path)
    file = tmp_path / "seen.jsonl"
    sample = json.loads(file.read_text(encoding="utf-8").splitlines()[0])
    for change in ({"tools": [{}]}, {"tools": "["}, {"messages": sample["messages"][2:]}):
        file.write_text(json.dumps(sample | change) + "\n", encoding="utf-8")
        with pytest.raises(McpLoraError, match="seen in .* is damaged: mcp-lora convert --output"):
            questions.read(tmp_path, [])


def test_an_answer_is_kept_at_once_and_asked_once(asked: list[Question], tmp_path: Path) -> None:
    file = tmp_path / "eval/base.jsonl"
    book = Notebook(file, asked, ["a"], 99, JUDGE)
    assert book.missing(asked) == asked
    for question in asked[::-1][:3]:
        book.add(question, right(question))
    with file.open("a") as stream:
        stream.write('{"key": "torn')  # where the power went
    again = Notebook(file, asked, ["a"], 99, JUDGE)
    assert again.missing(asked) == asked[:-3]
    again.add(asked[0], said("No."))  # not behind the half line
    assert Notebook(file, asked, ["a"], 99, JUDGE).missing(asked) == asked[1:-3]
    for question in again.missing(asked):
        again.add(question, said("No."))
    answers = again.answers(asked)
    assert [answer.verdict.error is None for answer in answers[-3:]] == [True] * 3
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert [row["instruction"] for row in rows] == [question.instruction for question in asked]
    assert rows[-1]["verdict"]["abstained"] and rows[0]["text"] == "No."
    assert Notebook(file, asked, ["b"], 99, JUDGE).missing(asked) == asked
    assert Notebook(file, asked[:2], ["a"], 99, JUDGE).missing(asked[:2]) == []


def test_answers_that_ended_are_kept_at_another_length(asked: list[Question], tmp_path: Path) -> None:
    file = tmp_path / "eval/base.jsonl"
    book = Notebook(file, asked, ["a"], 99, JUDGE)
    for question in asked[1:]:
        book.add(question, right(question))
    book.add(asked[0], said("And then")._replace(failed="cut off"))
    assert Notebook(file, asked, ["a"], 99, JUDGE).missing(asked) == []
    longer = Notebook(file, asked, ["a"], 2048, JUDGE)
    assert longer.missing(asked) == asked[:1]
    longer.add(asked[0], right(asked[0]))
    assert Notebook(file, asked, ["a"], 99, JUDGE).missing(asked) == []


def test_a_servers_tool_calls_are_read_as_they_are(asked: list[Question]) -> None:
    (call,) = asked[0].expected
    good = {"name": call.name, "arguments": json.dumps(call.arguments)}

    def verdict(**changes: str) -> Verdict:
        return JUDGE(asked[0], Response("", "", [good | changes])).verdict

    assert verdict().exact
    for strange in ('{"a": ', '{"a": NaN}', '{"a": "\\ud800"}', '{"a":' * 5000):
        assert verdict(arguments=strange).error == "unreadable call"
        assert not verdict(arguments=strange).abstained
    other = verdict(name="unknown")
    assert (other.error, other.schema) == ("wrong tool", False)


@pytest.fixture
def evaluation(data: Path) -> Evaluation:
    """A base that never calls, an adapter that is right but for every third answer."""
    everything = questions.read(data, [])
    wrong = said('<tool_call>{"name": "x", "arguments": {}}</tool_call>')
    adapter = [wrong if i % 3 == 0 else right(question) for i, question in enumerate(everything)]
    return summarise(
        {
            "base": [JUDGE(question, said("Hello.")) for question in everything],
            "adapter": [JUDGE(*pair) for pair in zip(everything, adapter, strict=True)],
        }
    )


def test_metrics_are_by_split_and_model(evaluation: Evaluation) -> None:
    assert list(evaluation.splits) == list(questions.SPLITS)
    seen = evaluation.splits["seen"]
    base, adapter, gain = seen.metrics["base"], seen.metrics["adapter"], seen.gains["adapter"]["ast"]
    wrong = -(-seen.count // 3)
    assert base["valid"].right == 0 and base["abstained"].rate == 1
    assert (adapter["valid"].right, adapter["ast"].right) == (seen.count, seen.count - wrong)
    assert seen.errors == {"base": {"no call": seen.count}, "adapter": {"wrong tool": wrong}}
    assert gain.gained == seen.count - wrong and gain.low > 0 and gain.p < 0.05
    no_call = evaluation.splits["no_call"].metrics
    assert list(no_call["base"]) == ["abstained"]
    assert no_call["base"]["abstained"].rate == 1 > no_call["adapter"]["abstained"].rate
    for places in (evaluation.tools, evaluation.servers):  # the worst come first
        rates = [place.right["adapter"].rate for place in places]
        assert rates == sorted(rates) and len(rates) > 1
    calls = sum(split.count for name, split in evaluation.splits.items() if name != "no_call")
    assert sum(place.right["base"].count for place in evaluation.tools) == calls
    assert all(place.tool for place in evaluation.tools)


def test_a_requirement_holds_or_is_told(evaluation: Evaluation) -> None:
    def told_of(*texts: str) -> list[str]:
        return unmet(evaluation, [requirement(text) for text in texts])

    assert told_of("seen.valid>=1", "seen.ast > 50%", "no_call.abstained<=0.9") == []
    (told,) = told_of("unseen_tool.ast>=0.95", "seen.valid>=0.5")
    assert told.startswith("unseen_tool.ast is 0.") and told.endswith("unseen_tool.ast>=0.95 is required")
    with pytest.raises(McpLoraError, match="is not SPLIT.METRIC>=VALUE: mcp-lora eval --require"):
        requirement("ast>=1")
    with pytest.raises(McpLoraError, match="60 is not between 0 and 1: .*seen.ast>=60%"):
        requirement("seen.ast>=60")
    with pytest.raises(McpLoraError, match="101% is not between 0 and 1"):
        requirement("seen.ast>=101%")
    with pytest.raises(McpLoraError, match="no no_call.ast, only .*no_call.abstained"):
        told_of("no_call.ast>=1")


@contextmanager
def server(answer: Callable[[dict[str, Any]], tuple[int, dict[str, Any]]]) -> Iterator[tuple[str, list[Any]]]:
    """A server of OpenAI's protocol that fails when told to; yields its URL and what it was asked."""
    requests: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if "temperature" not in body:  # parity's, of which it knows nothing
                return self.send_error(404)
            requests.append(body | {"key": self.headers["Authorization"], "path": self.path})
            code, message = answer(body)
            content = json.dumps(message).encode()
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *words: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = threading.Thread(target=http.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{http.server_port}/v1", requests
        finally:
            http.shutdown()
            thread.join()


def completion(finish: str = "stop", **message: Any) -> tuple[int, dict[str, Any]]:
    message = {"role": "assistant", "content": None} | message
    choice = {"index": 0, "finish_reason": finish, "message": message}
    return 200, {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}


@pytest.fixture
def run(data: Path, tiny_model: Path, tmp_path: Path) -> Path:
    config = {"dataset_dir": str(data), "model_name_or_path": str(tiny_model)}
    runs.write_config(tmp_path / "my run", config)
    return tmp_path / "my run"


def test_a_server_is_asked_again_where_it_failed_and_goes_on_later(
    data: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    expected = {question.instruction: question for question in questions.read(data, ["seen"])}
    failed: set[str] = set()
    down = True

    def answer(body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        instruction = body["messages"][-1]["content"]
        place = list(expected).index(instruction)
        if place == 0 and instruction not in failed:
            failed.add(instruction)
            return 503, {"error": {"message": "busy"}}
        if place == 5 and down:
            return 401, {"error": {"message": "who are you?"}}
        (call,) = expected[instruction].expected
        assert call.name in [tool["function"]["name"] for tool in body["tools"]]
        function = {"name": call.name, "arguments": json.dumps(call.arguments)}
        return completion(tool_calls=[{"id": "1", "type": "function", "function": function}])

    with server(answer) as (url, requests):
        with pytest.raises(
            McpLoraError, match=f"who are you.*OPENAI_API_KEY.*--endpoint {url} --endpoint-model m"
        ):
            evaluate(Request(run, splits=["seen"], endpoint=Endpoint(url, "m")))
        assert failed and {request["key"] for request in requests} == {"Bearer secret"}
        assert {(request["model"], request["temperature"]) for request in requests} == {("m", 0)}
        kept = (run / "eval/endpoint-m.jsonl").read_text(encoding="utf-8").splitlines()
        assert kept
        down = False
        for missing in (len(expected) - len(kept), 0):
            requests.clear()
            found = evaluate(Request(run, splits=["seen"], endpoint=Endpoint(url, "m")))
            assert len(requests) == missing
            assert list(found.answers) == ["m"] and found.splits["seen"].metrics["m"]["exact"].rate == 1


def hello(asked: list[Question], **rest: Any) -> Iterator[tuple[Question, Response]]:
    yield from ((question, said("Hello.")) for question in asked)


def test_a_server_is_compared_with_the_base_where_that_was_asked(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predict, "by_engine", hello)
    evaluate(Request(run, splits=["no_call"], limit=2, models=[BASE]))
    with server(lambda body: completion(content="half a pair: \ud800")) as (url, _):
        found = evaluate(Request(run, splits=["no_call"], limit=2, endpoint=Endpoint(url, "m")))
        assert list(found.answers) == ["base", "m"] and "abstained" in found.splits["no_call"].gains["m"]
        assert found.answers["m"][0].text == "half a pair: ?"  # what can be written
        more = evaluate(Request(run, splits=["no_call"], endpoint=Endpoint(url, "m")))
        assert list(more.answers) == ["m"]
    metrics = json.loads((run / "eval/metrics_part.json").read_text(encoding="utf-8"))
    assert metrics["max_new_tokens"] > 32 and not (run / "eval/metrics.json").exists()


def test_the_model_card_has_only_the_adapters_metrics(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predict, "by_engine", hello)
    monkeypatch.setattr(plain_chat, "of_run", lambda *rest: None)
    write_json(run / "adapter_config.json", {})
    evaluate(Request(run))
    card = model_card(run, run, "mcp-lora serve .")
    assert "questions, base: abstained 100.0" in card and "questions, adapter: abstained 100.0" in card
    evaluate(Request(run, models=[BASE]))
    with server(lambda body: completion(content="Hello.")) as (url, _):
        found = evaluate(Request(run, endpoint=Endpoint(url, "hosted")))
    assert list(found.answers) == ["base", "adapter", "hosted"]  # all have answered the same questions
    assert model_card(run, run, "mcp-lora serve .") == card
    (run / "adapter_config.json").write_text("{ }")  # as if trained again
    assert "None." in model_card(run, run, "mcp-lora serve .")
    (run / "eval/metrics.json").write_text('{"splits": {"seen": {"count": 1, "figures": {}}}}')
    assert "None." in model_card(
        run, run, "mcp-lora serve ."
    )  # of an earlier version: it is asked again, not damaged


def test_plain_chat_is_not_compared_where_the_base_was_changed(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plain_chat, "measure", lambda *rest: plain_chat.PlainChat(1, 1, 100, 4000))
    write_json(run / "adapter_config.json", {})
    (run / "eval").mkdir()
    template = ChatTemplate(tokenizer_of(CHAT_TEMPLATE))
    settings = (run / "run.yaml").read_text()
    (run / "run.yaml").write_text(f"{settings}\npissa_init: true\n")
    assert plain_chat.of_run(run, run, template, pytest.fail) is None
    (run / "run.yaml").write_text(settings)
    assert plain_chat.of_run(run, run, template, pytest.fail)


def test_asking_the_adapter_alone_or_a_checkpoint_replaces_nothing(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[Path] = []

    def measure(config: Any, adapter: Path, *rest: Any) -> plain_chat.PlainChat:
        measured.append(adapter)
        return plain_chat.PlainChat(len(measured), 0.5, 100, 4000)

    monkeypatch.setattr(predict, "by_engine", hello)
    monkeypatch.setattr(plain_chat, "measure", measure)
    checkpoint = run / "checkpoint-300"
    write_json(run / "adapter_config.json", {})
    write_json(checkpoint / "adapter_config.json", {"r": 8})
    evaluate(Request(run))

    def kept() -> list[Any]:
        files = ("metrics.json", "base.jsonl", "adapter.jsonl")
        return [
            model_card(run, run, "mcp-lora serve ."),
            *((run / "eval" / file).read_bytes() for file in files),
        ]

    before = kept()
    found = evaluate(Request(run, models=[ADAPTER]))
    assert list(found.answers) == ["base", "adapter"] and found.plain_chat and kept() == before
    found = evaluate(Request(run, checkpoint="300"))
    assert list(found.answers) == ["base", "checkpoint-300"] and found.plain_chat and kept() == before
    evaluate(Request(run, checkpoint="300", limit=1))
    assert "questions, checkpoint-300: abstained 100.0" in model_card(run, checkpoint, "mcp-lora serve .")
    moved = [plain_chat.kept_of(run, one) for one in (run, checkpoint)]
    assert [one and one.divergence for one in moved] == [1, 2] and len(measured) == 2
    page = report.write([run]).read_text(encoding="utf-8")
    assert "checkpoint-300" in page and "has changed since it was evaluated" not in page


def test_the_batch_is_halved_where_memory_runs_out(
    asked: list[Question], tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = []

    def run_engine(
        verb: str, config: dict[str, Any], environment: dict[str, str], log: Path
    ) -> launch.Outcome:
        batches.append(size := config["per_device_eval_batch_size"])
        if size > 4:
            return launch.Outcome(
                1, "Traceback (most recent call last):\ntorch.OutOfMemoryError: CUDA out of memory."
            )
        rows = [{"prompt": "", "predict": "No.<|im_end|>", "label": ""}] * len(asked)
        answers = Path(config["output_dir"]) / "generated_predictions.jsonl"
        answers.parent.mkdir()
        answers.write_text("\n".join(map(json.dumps, rows)))
        return launch.Outcome(0, "")

    monkeypatch.setattr(launch, "run_engine", run_engine)
    template = ChatTemplate(tokenizer_of(CHAT_TEMPLATE))
    settings = {"model_name_or_path": str(tiny_model), "per_device_eval_batch_size": 16, "max_new_tokens": 9}
    found = predict.by_engine(asked, template, settings, None, "mcp-lora eval")
    assert {reply.text for _, reply in found} == {"No."} and batches == [16, 8, 4]


def test_json_is_all_that_is_on_stdout(
    run: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    engine = (
        "import json, pathlib, sys, yaml\n"
        "print('***** predict metrics *****', flush=True)\n"
        "place = pathlib.Path(yaml.safe_load(open(sys.argv[1]))['output_dir'])\n"
        "place.mkdir()\n"
        "row = json.dumps({'prompt': '', 'predict': 'No.<|im_end|>', 'label': ''})\n"
        "(place / 'generated_predictions.jsonl').write_text(row)\n"
    )
    monkeypatch.setattr(launch, "engine_argv", lambda verb, file: [sys.executable, "-c", engine, str(file)])
    words = ["eval", str(run), "--base-only", "--split", "seen", "--limit", "1", "--json"]
    with pytest.raises(SystemExit) as caught:
        main(words)
    shown = capfd.readouterr()
    assert not caught.value.code and json.loads(shown.out)["splits"]["seen"]["count"] == 1
    assert "predict metrics" in shown.err and f"mcp-lora report '{run}'" in shown.err


def test_a_run_is_asked_about_its_own_data_and_splits(run: Path) -> None:
    with pytest.raises(McpLoraError, match="the splits are seen: mcp-lora eval"):
        evaluate(Request(run, splits=["seen"], requirements=[requirement("no_call.abstained>0")]))
    manifest.write(run, manifest.Manifest(data=manifest.Hashed("train.jsonl", "of other data")))
    with pytest.raises(McpLoraError, match="is not what .* was trained on: mcp-lora convert"):
        evaluate(Request(run))


SUM = {"a": 3, "b": 4}
CALL_AS_TEXT = f"<tool_call>\n{json.dumps({'name': 'get-sum', 'arguments': SUM})}\n</tool_call>"


@pytest.mark.parametrize(
    ("reply", "text", "calls", "error"),
    [
        (completion(content="I can", finish="length"), "I can", 0, "cut off"),
        (completion(content=None, reasoning_content=CALL_AS_TEXT), CALL_AS_TEXT, 1, None),
        (completion(content="No.", reasoning_content="Hm."), "<think>\nHm.\n</think>\n\nNo.", 0, "no call"),
        (completion(content=[{"type": "text", "text": "No."}]), "No.", 0, "no call"),
        (completion(tool_calls=[{"function": {"name": "get-sum", "arguments": SUM}}]), "", 1, None),
        (
            completion(tool_calls=[{"function": {"name": "get-sum", "arguments": None}}]),
            "",
            1,
            "missing argument",
        ),
        ((200, {"choices": []}), '{"choices": []}', 0, "no reply"),
        ((200, {"error": "busy"}), '{"error": "busy"}', 0, "no reply"),
        ((200, "<html>"), '"<html>"', 0, "no reply"),
    ],
)
def test_whatever_a_server_sends_is_an_answer(
    reply: tuple[int, Any], text: str, calls: int, error: str | None
) -> None:
    function = {"name": "get-sum", "arguments": json.dumps(SUM)}
    right = {"role": "assistant", "content": None, "tool_calls": [{"function": function}]}
    tool = {"name": "get-sum", "description": "", "parameters": {"properties": dict.fromkeys(SUM, {})}}
    sample = {"messages": [{"role": "user", "content": "Add."}, right], "tools": [{"function": tool}]}
    template = ChatTemplate(tokenizer_of(CHAT_TEMPLATE))
    with server(lambda body: reply) as (url, _):
        ((question, found),) = predict.by_endpoint(
            [Question("seen", sample)], url, "m", 8, template, "mcp-lora eval"
        )
    answer = JUDGE(question, found)
    assert (answer.text, len(answer.calls), answer.verdict.error) == (text, calls, error)
    assert not (answer.failed and answer.verdict.abstained)


def test_a_server_that_never_answers_can_be_left(run: Path) -> None:
    asked, leave = threading.Event(), threading.Event()

    def answer(body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        asked.set()
        leave.wait()
        return completion(content="Too late.")

    with server(answer) as (url, _):
        argv = [BIN / "mcp-lora", "eval", run, "--endpoint", url, "--endpoint-model", "m", "--limit", "1"]
        with subprocess.Popen(argv, stderr=subprocess.PIPE, text=True, env=environment()) as process:
            try:
                assert asked.wait(120)
                process.send_signal(signal.SIGINT)
                assert process.stderr and "interrupted" in process.stderr.read()
                assert process.wait(120) == 128 + signal.SIGINT
            finally:
                leave.set()
                process.kill()


def test_a_folder_that_cannot_be_written_is_told(run: Path) -> None:
    (run / "eval").write_text("a file")
    told = pytest.raises(McpLoraError, match="eval.* cannot be written .*mcp-lora eval")
    with server(lambda body: completion(content="No.")) as (url, _), told:
        evaluate(Request(run, limit=1, endpoint=Endpoint(url, "m")))
    left = [thread.name for thread in threading.enumerate() if "_handle_workers" in thread.name]
    assert not left, "the threads that ask a server outlive the failure"


def test_an_adapter_is_looked_for_before_anything_is_asked(run: Path) -> None:
    with pytest.raises(McpLoraError, match="contains no adapter"):
        evaluate(Request(run))
    assert not (run / "eval").exists()


def test_a_server_that_is_not_there_is_told(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predict, "RETRIES", 0)
    with pytest.raises(McpLoraError, match="http://127.0.0.1:9/v1 does not answer"):
        evaluate(Request(run, limit=1, endpoint=Endpoint("http://127.0.0.1:9/v1", "m")))


def test_some_questions_are_spread_over_the_tools(run: Path) -> None:
    every = prepare(Request(run, splits=["unseen_tool"])).asked
    some = prepare(Request(run, splits=["unseen_tool"], limit=8)).asked
    assert len(some) == 8 and some == [question for question in every if question in some]  # in order
    tools, first = ({question.expected[0].name for question in each} for each in (some, every[:8]))
    assert len(tools) > len(first)


def test_answers_of_another_precision_are_asked_again(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []

    def by_engine(
        questions: list[Question], settings: dict[str, Any], **rest: Any
    ) -> Iterator[tuple[Question, Response]]:
        asked.append(settings["bf16_full_eval"])
        yield from ((question, said("No.")) for question in questions)

    monkeypatch.setattr(predict, "by_engine", by_engine)
    for gpus, bf16 in ((0, True), (0, True), (0, False), (1, True)):
        machine = Machine(gpus, bf16, deepspeed=False)
        monkeypatch.setattr("mcp_lora.evaluate.evaluation.detect_machine", lambda found=machine: found)
        evaluate(Request(run, splits=["no_call"], models=[BASE]))
    assert asked == [True, False]  # what a CPU without bf16 has answered, a GPU need not answer again


def test_a_server_gets_no_empty_list_of_tools() -> None:
    sample = {"messages": [{"role": "user", "content": "Hi."}, {"role": "assistant"}], "tools": []}
    template = ChatTemplate(tokenizer_of(CHAT_TEMPLATE))
    with server(lambda body: completion(content="No.")) as (url, requests):
        list(predict.by_endpoint([Question("bfcl.x", sample)], url, "m", 8, template, "mcp-lora eval"))
    assert "tools" not in requests[0]


def test_parity_shows_the_first_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    template = ChatTemplate(tokenizer_of(CHAT_TEMPLATE))

    def get(client: httpx.Client, place: str) -> httpx.Response:
        return httpx.Response(200, json={"data": [{"id": "m"}]}, request=httpx.Request("GET", place))

    def post(client: httpx.Client, place: str, json: Any) -> httpx.Response:
        if not place.endswith("/tokenize"):
            return httpx.Response(404)
        assert json["model"] == "m"
        prompt = template.prompt(json["messages"], json.get("tools", [])).replace("You may call", "Call")
        request = httpx.Request("POST", place)
        return httpx.Response(200, json={"tokens": template.ids(prompt)}, request=request)

    monkeypatch.setattr(httpx.Client, "get", get)
    monkeypatch.setattr(httpx.Client, "post", post)
    found = parity.parity("http://127.0.0.1:9/v1/", template)
    assert (found.compared, found.count, found.left_out) == ("token ids", len(parity.PROBES), 0)
    assert len(found.differences) == sum(bool(tools) for _, tools in parity.PROBES.values())
    assert found.differences[0].startswith("a question and one tool: at character ")
    assert "You may call" in found.differences[0].split(" in training, ")[0]


@pytest.mark.parametrize("code", [400, 422])
def test_a_server_that_rejects_arguments_for_a_chat_template_is_asked_without(
    code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample = {"messages": [{"role": "user", "content": "Hi."}, {"role": "assistant"}], "tools": []}
    template = ChatTemplate(tokenizer_of(CHAT_TEMPLATE))
    monkeypatch.setattr(ChatTemplate, "server_arguments", {"enable_thinking": False})

    def answer(body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        if "chat_template_kwargs" in body:
            return code, {"error": {"message": "unrecognized request argument: chat_template_kwargs"}}
        return completion(content="No.")

    asked = [Question("seen", sample)] * 2
    with server(answer) as (url, requests):
        found = list(predict.by_endpoint(asked, url, "m", 8, template, "mcp-lora eval"))
    assert [reply.text for _, reply in found] == ["No.", "No."] and len(requests) == 4


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--endpoint-model", "m", "--checkpoint", "300"], "--checkpoint cannot be used with --endpoint"),
        (["--endpoint-model", "m", "--gpus", "2", "--batch-size", "4"], "--gpus, --batch-size cannot"),
        (["--endpoint-model", "m", "--base-only"], "exclude each other"),
        (["--endpoint-model", "base"], "base is the name of the run's own answers"),
        (["--endpoint-model", "adapter"], "adapter is the name of the run's own answers"),
        ([], "use both options or neither"),
    ],
)
def test_options_that_a_server_cannot_have_are_refused(
    run: Path, words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["eval", str(run), "--endpoint", "http://127.0.0.1:9/v1", *words])
    told = capsys.readouterr().err
    assert said in told and "mcp-lora " in told
    assert not (run / "eval").exists()


def test_gpus_that_are_not_there_are_told_with_the_command(run: Path) -> None:
    with pytest.raises(McpLoraError, match="not 8 .*omit --gpus: mcp-lora eval '.*my run'$"):
        evaluate(Request(run, models=[BASE], gpus=8))


def test_the_benchmark_has_no_splits(capsys: Any, run: Path) -> None:
    with pytest.raises(SystemExit):
        main(["eval", str(run), "--benchmark", "bfcl", "--split", "seen"])
    assert "the benchmark has no --split" in capsys.readouterr().err
    with pytest.raises(McpLoraError, match="the splits are .*mcp-lora eval .*--benchmark bfcl"):
        evaluate(Request(run, requirements=[requirement("bfcl.simple>=0.5")], models=[BASE]))
