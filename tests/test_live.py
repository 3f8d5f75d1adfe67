"""Live MCP servers: what they list, what changed, rows by a teacher, and a chat that runs tools."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from conftest import BIN, ROOT, catalogue_of, environment, record, run, write_json

from mcp_lora.cli.app import main
from mcp_lora.data import conversion, dataset, files
from mcp_lora.data.conversion import Settings
from mcp_lora.data.records import RowError, Tool, ToolCall
from mcp_lora.errors import Interrupted, McpLoraError
from mcp_lora.evaluate.evaluation import Endpoint
from mcp_lora.live import chat as chats
from mcp_lora.live import connections, generate
from mcp_lora.live.chat import Chat
from mcp_lora.live.collect import collect
from mcp_lora.live.connections import Address, Connection
from mcp_lora.prompts import chat_template
from mcp_lora.prompts.chat_template import ChatTemplate
from mcp_lora.train import runs

SERVER = ROOT / "tests" / "mcp_server.py"


def address(mode: str = "ok", name: str = "") -> Address:
    return Address(name, [sys.executable, str(SERVER), "good", mode])


@contextmanager
def connected(*servers: Address, timeout: float = 20) -> Iterator[list[Connection]]:
    def failed(server: Address, why: str) -> None:
        raise AssertionError(f"{server}: {why}")

    with connections.connected(servers, failed, timeout) as found:
        yield found


def test_servers_are_named_as_in_desktop_clients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCS_KEY", "secret")
    file = write_json(
        tmp_path / "mcp.json",
        {
            "mcpServers": {
                "time": {
                    "command": "uvx",
                    "args": ["mcp-server-time"],
                    "env": {"TZ": "UTC", "KEY": None},
                    "cwd": "/tmp",
                },
                "docs": {"url": "https://example.org/mcp", "headers": {"X-Key": "${env:DOCS_KEY}"}},
                "old": {"command": "old", "disabled": True},
            }
        },
    )
    assert connections.addresses(["python -m 'my server'", "http://127.0.0.1:1/mcp"], [file]) == [
        Address(command=["python", "-m", "my server"]),
        Address(url="http://127.0.0.1:1/mcp"),
        Address("time", ["uvx", "mcp-server-time"], {"TZ": "UTC"}, "/tmp"),
        Address("docs", [], url="https://example.org/mcp", headers={"X-Key": "secret"}),
    ]


@pytest.mark.parametrize(
    "content, said",
    [
        ({"time": {"command": "x"}}, "has no mcpServers"),
        ({"mcpServers": {"time": {"args": []}}}, "time has no command and no url"),
        ({"mcpServers": {"time": {"command": "x", "env": {"KEY": "${NOT_SET}"}}}}, "export NOT_SET="),
        ([], "it has to be like"),
    ],
)
def test_a_configuration_that_cannot_be_used(content: Any, said: str, tmp_path: Path) -> None:
    file = write_json(tmp_path / "mcp.json", content)
    with pytest.raises(McpLoraError, match=re.escape(said)):
        connections.addresses([], [file])


@pytest.mark.parametrize("named", ["", "python -m 'mcp"])
def test_a_server_that_is_named_wrongly(named: str) -> None:
    with pytest.raises(McpLoraError, match="--mcp"):
        connections.addresses([named], [])


def test_servers_that_fail_do_not_end_a_collection(tmp_path: Path) -> None:
    said: list[str] = []
    modes = ("ok", "pages", "big", "endless", "hang", "fail")
    servers = [address(mode, f"{mode}/../server") for mode in modes]
    servers += [Address(command=["no-such-program"]), Address("none", url="http://127.0.0.1:9/mcp")]
    assert collect(servers, tmp_path / "tools", tmp_path, said.append, timeout=4) == 3
    for mode, why in {
        "endless": "does not answer in time",
        "hang": "does not answer in time",
        "fail": "(the server says why on its last line)",
        "no-such-program": "No such file",
        "none": "connection attempts failed",
    }.items():
        assert [line for line in said if mode in line and why in line and line.startswith("warning: ")]
    for mode, count in {"ok": 3, "pages": 3, "big": 1}.items():
        file = tmp_path / "tools" / f"{mode}%2F..%2Fserver.json"
        assert f"{mode}/../server 1.2.3: {count} tools → {file}" in said
    found = catalogue_of(tmp_path / "tools").by_server
    assert {server: [tool.name for tool in tools] for server, tools in found.items()} == {
        "ok/../server": ["erase", "greet", "part"],
        "pages/../server": ["erase", "greet", "part"],
        "big/../server": ["greet"],
    }
    assert len(found["big/../server"][0].description) == 3 << 20
    with pytest.raises(McpLoraError, match="no server can be used"):
        collect(servers[5:], tmp_path / "tools", tmp_path, said.append, timeout=4)
    assert "ok%2F..%2Fserver.json" in os.listdir(tmp_path / "tools")


def test_a_second_collection_shows_what_has_changed(tmp_path: Path) -> None:
    said: list[str] = []
    tools, data = tmp_path / "tools", tmp_path / "data"
    collect([address(name="good")], tools, data, said.append)
    listed = json.loads((tools / "good.json").read_text())
    assert listed["server_info"] == {"name": "good", "version": "1.2.3"} and len(listed["sha256"]) == 64
    rows = [
        record(f"Do {tool} with {name}.", tool, tool_info=None, server_info={"server_name": "good"})
        | {"function_call": {"name": tool, "arguments": {"name": name}}}
        for tool in ("greet", "erase")
        for name in ("Ann", "Bob", "Cid")
    ]
    file = write_json(tmp_path / "rows.json", rows)
    conversion.convert(Settings(inputs=[str(file)], tools=[str(tools)], test=0.0), data)
    collect([address(name="good")], tools, data, said.append)
    assert said[-1].endswith(": unchanged")
    collect([address("changed", "good")], tools, data, said.append)
    calls = (str(sample["messages"]) for sample in dataset.samples(data, "train"))
    first = ", ".join(str(row) for row, text in enumerate(calls, start=1) if "greet" in text)
    assert said[-1].partition(": ")[2].partition("; since ")[2].partition("+00:00: ")[2] == (
        f"count is new, erase is gone (3 calls in {data}), "
        f"greet has another schema: 3 of 3 calls in {data} no longer validate (row {first}), "
        "part has another description, part no longer says that it only reads"
    )


def test_a_server_by_http_gets_its_headers_and_real_servers_answer(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen([sys.executable, SERVER, "far", "http", str(port)])
    try:
        url = f"http://127.0.0.1:{port}/mcp"
        while process.poll() is None:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
        refused: list[str] = []
        with connections.connected([Address(url=url)], lambda _, why: refused.append(why), 10) as found:
            assert not found and len(refused) == 1
        clock = Address("clock", [str(BIN / "mcp-server-time"), "--local-timezone=UTC"])
        with connected(Address(url=url, headers={"X-Key": "secret"}), clock) as (far, time_server):
            assert (far.name, far.version, far.read_only) == ("far", "1.2.3", {"greet", "part"})
            assert far.call("greet", {"name": "Ann"}) == ("greet Ann \x1b[31m", False)
            assert far.call("greet", {"name": "Nobody"}).is_error
            with pytest.raises(McpLoraError, match="far has died"):
                far.call("greet", {"name": "Death"})
            assert time_server.read_only == {"get_current_time", "convert_time"}
            text, is_error = time_server.call("get_current_time", {"timezone": "Asia/Tokyo"})
            assert json.loads(text)["timezone"] == "Asia/Tokyo" and not is_error
            assert time_server.call("get_current_time", {"timezone": "Nowhere"}).is_error
    finally:
        process.terminate()
        process.wait()


def test_a_call_that_takes_too_long_is_an_error_and_a_server_that_dies_is_reported() -> None:
    with connected(address(), timeout=3) as (server,):
        assert server.call("greet", {"name": "Sleep"}).is_error
        assert server.call("greet", {"name": "Ann"}).text.startswith("greet Ann")
        for name in ("Death", "Ann"):
            with pytest.raises(McpLoraError, match="good has died"):
                server.call("greet", {"name": name})


def test_what_a_server_has_said_last_is_read_without_moving_where_it_writes() -> None:
    with tempfile.TemporaryFile("w+") as log:
        os.pwrite(log.fileno(), b"x" * 3000 + b"\nit starts\nno such key\n", 0)
        assert connections.last_line(log) == " (no such key)"
        assert os.lseek(log.fileno(), 0, os.SEEK_CUR) == 0


Reply = Callable[[dict[str, Any]], dict[str, Any] | int]


@contextmanager
def teacher(reply: Reply) -> Iterator[str]:
    """An OpenAI-compatible server; `reply` makes a message from a request, or a status."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            found = reply(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            status, body = (found, {"error": {"message": "no"}}) if isinstance(found, int) else (200, {})
            if isinstance(found, dict):
                choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant"} | found}
                usage = {"prompt_tokens": 10, "completion_tokens": 2, "total_tokens": 12}
                body = {"id": "1", "object": "chat.completion", "created": 1, "model": "m", "usage": usage}
                body |= {"choices": [choice]}
            content = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.send_header("retry-after-ms", "1")
            self.send_header("x-should-retry", "true" if status == 429 else "false")
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def calling(*made: tuple[str, str]) -> dict[str, Any]:
    calls = [
        {"id": f"call_{number}", "type": "function", "function": {"name": name, "arguments": arguments}}
        for number, (name, arguments) in enumerate(made)
    ]
    return {"content": None, "tool_calls": calls}


# How a teacher fails, and the reason that is given.
FAILURES = [
    "no-call",
    "wrong-tool",
    "not-json",
    "schema",
    "several-calls",
    "tool-error",
    "no-instruction",
    "not-answered",
    "rejected-by-teacher",
    "near-copy",
]


def scripted(busy: Counter[str]) -> Reply:
    """A teacher that does all for the tool `part`, and fails with `greet` in each way in turn."""
    languages: dict[str, str] = {}  # of its messages

    def reply(request: dict[str, Any]) -> dict[str, Any] | int:
        text = next(one["content"] for one in request["messages"] if one["role"] == "user")
        if text.startswith("Write one message"):
            number = int(re.findall(r"number (\d+) about", text)[0])
            if busy[text] == 0 and number == 1:  # once
                busy[text] += 1
                return 429
            if '"part"' in text:
                message = f"{'abcdefghijklmnop'[number] * 20}: say goodbye to Ann."
                languages[message] = re.findall("in (.+), that a user", text)[0]
                return {"content": message}
            way = FAILURES[(number - 1) % len(FAILURES)]
            if way == "near-copy":
                return {"content": f"{'b' * 20}: say goodbye to Bob."}
            return (
                400 if way == "rejected-by-teacher" else {"content": "" if way == "no-instruction" else way}
            )
        if text.startswith("A user has sent"):
            named = next((one for message, one in languages.items() if message in text), "")
            agrees = f"Is the message in {named}" in text and "not-answered" not in text
            return {"content": "Yes." if agrees else "no, it is not"}
        if request["messages"][-1]["role"] == "tool":
            return {"content": "It is done."}
        good = json.dumps({"name": "Ann"})
        tool = "part" if text.endswith("goodbye to Ann.") else "greet"
        return {
            "no-call": {"content": "I cannot."},
            "wrong-tool": calling(("erase", good)),
            "not-json": calling((tool, "{name")),
            "schema": calling((tool, "{}")),
            "several-calls": calling((tool, good), (tool, good)),
            "tool-error": calling((tool, '{"name": "Nobody"}')),
        }.get(text, calling((tool, good)))

    return reply


def test_only_what_is_good_of_a_teacher_that_fails_in_every_way_becomes_data(tmp_path: Path) -> None:
    said: list[str] = []
    with teacher(scripted(Counter())) as url, connected(address()) as servers:
        request = generate.Request(4, Endpoint(url, "m"), ["English", "中文"])
        file, lines = generate.generate(request, servers, tmp_path / "filtered", say=said.append)
    assert said == ["tools that do not say that they only read are left out: erase (--allow TOOL)"]
    assert [line["tool"] for line in lines if not line["reason"]] == ["part"] * 4
    assert sorted(line["reason"] for line in lines if line["reason"]) == sorted(FAILURES)
    assert [line["reason"] for line in lines if line["tool"] == "greet"] == FAILURES  # in turn
    journal = file.with_suffix(".journal").read_text(encoding="utf-8")
    assert list(map(json.loads, journal.splitlines()))[1:] == lines
    parts = [(line["difficulty"], line["language"]) for line in lines if line["tool"] == "part"]
    assert parts == [("easy", "English"), ("medium", "English"), ("hard", "English"), ("easy", "中文")]
    stats = conversion.convert(Settings(inputs=[str(file)], test=0.0), tmp_path / "data")
    assert stats.read == stats.written["train"] == 4 and not stats.rejected
    (first, *_) = dataset.samples(tmp_path / "data", "train")
    assert first["messages"][1]["content"].endswith("say goodbye to Ann.")


def test_a_teacher_that_fails_is_reported_and_the_same_command_goes_on(tmp_path: Path) -> None:
    asked: list[Any] = []
    good = scripted(Counter())

    def failing(request: dict[str, Any]) -> dict[str, Any] | int:
        asked.append(request)
        return good(request) if len(asked) < 12 else 500

    said: list[str] = []
    with connected(address()) as servers:
        with (
            teacher(failing) as url,
            pytest.raises(McpLoraError, match="does not answer .*goes on with what is done"),
        ):
            generate.generate(generate.Request(4, Endpoint(url, "m")), servers, tmp_path)
        (journal,) = tmp_path.glob("*.journal")
        before = journal.read_text(encoding="utf-8").splitlines()
        assert len(before) == 1 + 4 and not journal.with_suffix(".json").exists()
        with journal.open("a", encoding="utf-8") as stream:
            stream.write('{"server": "cut off by a ki')
        with teacher(good) as url:  # at another port, and of more rows
            request = generate.Request(5, Endpoint(url, "m"))
            file, lines = generate.generate(request, servers, tmp_path, say=said.append)
    assert said[-1] == f"going on with {journal}: 4 attempts are made"
    assert file == journal.with_suffix(".json") and len(json.loads(file.read_text("utf-8"))) == 5
    after = journal.read_text(encoding="utf-8").splitlines()
    assert after[:5] == before and list(map(json.loads, after))[1:] == lines


@pytest.mark.parametrize(
    "reply, reason",
    [
        ({"content": None}, "no-instruction"),
        ({"content": [{"type": "text", "text": "part"}, {"type": "text", "text": " it"}]}, "no-call"),
        ({"content": "<think>Well.</think>"}, "no-instruction"),
        ({"content": "\ud800"}, "no-call"),
        ({"content": "go", "tool_calls": [{"type": "function", "function": None}]}, "no-call"),
        (calling(("part", "[" * 100_000)), "no-instruction"),
    ],
)
def test_a_malformed_reply_is_a_reason_and_no_traceback(reply: Any, reason: str, tmp_path: Path) -> None:
    with teacher(lambda request: reply) as url, connected(address()) as servers:
        with pytest.raises(McpLoraError, match="no attempt was good"):
            generate.generate(generate.Request(1, Endpoint(url, "m")), servers, tmp_path)
        (journal,) = tmp_path.glob("*.failed")
        lines = list(map(json.loads, journal.read_text(encoding="utf-8").splitlines()))[1:]
        assert {line["reason"] for line in lines} == {reason}


@pytest.mark.parametrize(
    ("name", "arguments", "reason"),
    [
        ("greet", '{"name": "\\ud800"}', "not-json"),
        ("\ud800", "{}", "wrong-tool"),
        ("greet", "[1]", "not-json"),
    ],
)
def test_a_call_of_the_teacher_that_no_journal_can_hold_is_a_reason(
    name: str, arguments: Any, reason: str
) -> None:
    greet = Tool("good", "greet", "", {"type": "object", "properties": {"name": {"type": "string"}}})
    with pytest.raises(RowError) as caught:
        generate.checked("", [ToolCall(name, arguments)], greet)
    assert caught.value.reason == reason
    str(caught.value).encode()


def test_a_server_that_dies_ends_it_and_its_attempt_is_not_made_again(tmp_path: Path) -> None:
    def reply(request: dict[str, Any]) -> dict[str, Any]:
        text = request["messages"][-1]["content"]
        if request["messages"][-1]["role"] == "tool":
            return {"content": "It is done."}
        if text.startswith("Write one message"):
            number = int(re.findall(r"number (\d+) about", text)[0])
            return {"content": f"{'abcdefghij'[number] * 30} {number}"}
        if text.startswith("A user has sent"):
            return {"content": "yes"}
        return calling(("greet", json.dumps({"name": "Death" if text.endswith(" 1") else "Ann"})))

    with teacher(reply) as url:
        request = generate.Request(1, Endpoint(url, "m"))
        for _ in range(2):
            with connected(address()) as servers:
                del servers[0].tools["part"]
                try:
                    file, lines = generate.generate(request, servers, tmp_path)
                except McpLoraError as error:
                    assert "good has died" in str(error) and "goes on with what is done" in str(error)
    assert [line["reason"] for line in lines] == ["failed", None] and file.is_file()


@pytest.mark.parametrize("reply", [{"content": "no"}, 400])
def test_a_teacher_that_makes_nothing_good_is_given_up(reply: Any, tmp_path: Path) -> None:
    with (
        teacher(lambda request: reply) as url,
        connected(address()) as servers,
        pytest.raises(McpLoraError, match="no attempt was good"),
    ):
        generate.generate(generate.Request(500, Endpoint(url, "m")), servers, tmp_path)
    (journal,) = tmp_path.glob("*.failed")
    assert 50 <= len(journal.read_text(encoding="utf-8").splitlines()) - 1 < 60


def test_one_generation_at_a_time_in_a_folder(tmp_path: Path) -> None:
    request = generate.Request(1, Endpoint("http://127.0.0.1:9/v1", "m"))
    with (
        files.exclusive(tmp_path / ".generate.lock", ""),
        connected(address()) as servers,
        pytest.raises(McpLoraError, match="in use by another mcp-lora generate: .*OTHER_FOLDER"),
    ):
        generate.generate(request, servers, tmp_path)


def test_nothing_good_is_an_error_and_no_tool_is_called_unasked(tmp_path: Path) -> None:
    with teacher(lambda request: {"content": "no"}) as url, connected(address()) as servers:
        with pytest.raises(McpLoraError, match="no attempt was good.*0 calls: no.*A_STRONGER_ONE"):
            generate.generate(generate.Request(1, Endpoint(url, "m")), servers, tmp_path)
        assert not list(tmp_path.glob("*.json"))
        with pytest.raises(McpLoraError, match="--allow good.eras: no server has it"):
            generate.generate(
                generate.Request(1, Endpoint(url, "m"), allowed=["good.eras"]), servers, tmp_path
            )
        for server in servers:
            server.read_only.clear()
        with pytest.raises(McpLoraError, match="no tool is left to call: mcp-lora generate --allow TOOL"):
            generate.generate(generate.Request(1, Endpoint(url, "m")), servers, tmp_path)


@pytest.fixture
def outputs(tmp_path: Path, tiny_model: Path) -> Path:
    """A run's folder, as far as a chat at an endpoint needs it."""
    config = {
        "model_name_or_path": str(tiny_model),
        "cutoff_len": 1200,
        "dataset_dir": str(tmp_path / "data"),
    }
    write_json(tmp_path / "run" / "run.yaml", config)
    return tmp_path / "run"


def adapter(request: dict[str, Any]) -> dict[str, Any] | int:
    """An adapter that calls the tool that it is asked for, and answers with the result."""
    last = request["messages"][-1]
    if last["role"] == "tool":
        return {"content": f"It says: {last['content']}"}
    if last["content"] == "plain":
        return {"content": "Hello."}
    if last["content"] == "broken":
        return 500
    name, argument = last["content"].split()
    return calling((name, json.dumps({"name": argument})))


def chatting(
    outputs: Path, url: str, servers: Sequence[Connection], declined: str = "", **more: Any
) -> tuple[Chat, list[Any], list[Any]]:
    shown: list[tuple[str, str]] = []
    confirmed: list[str] = []

    def confirm(server: Connection, name: str, arguments: Any) -> bool:
        confirmed.append(f"{server.name}.{name} {arguments}")
        return name != declined

    model = chats.by_endpoint(outputs, Endpoint(url, "m"))
    tools, transcript = more.get("tools", ()), more.get("transcript")
    chat = Chat(outputs, model, servers, tools, confirm, lambda *said: shown.append(said), transcript)
    return chat, shown, confirmed


def test_a_server_that_rejects_arguments_for_a_chat_template_can_be_chatted_with(
    outputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ChatTemplate, "server_arguments", {"enable_thinking": False})
    requests: list[Any] = []
    said: list[str] = []

    def reply(request: dict[str, Any]) -> dict[str, Any] | int:
        requests.append(request)
        return 400 if "chat_template_kwargs" in request else {"content": "Hello."}

    with teacher(reply) as url:
        answer = chats.by_endpoint(outputs, Endpoint(url, "m"), said.append)
        for _ in range(2):
            assert answer([{"role": "user", "content": "Hi."}], []) == ("Hello.", [])
    assert len(requests) == 3 and len(said) == 1
    assert "rejects chat_template_kwargs: prompts differ from training" in said[0]


def test_a_call_is_run_after_a_yes_and_the_transcript_is_data(outputs: Path, tmp_path: Path) -> None:
    transcript = tmp_path / "chat.jsonl"
    with teacher(adapter) as url, connected(address()) as servers:
        chat, shown, confirmed = chatting(outputs, url, servers, transcript=transcript)
        chat.say("greet Ann")
        assert shown == [
            ("call", 'greet {"name": "Ann"}'),
            ("result", "greet Ann \x1b[31m"),
            ("assistant", "It says: greet Ann \x1b[31m"),
        ]
        assert confirmed == ["good.greet {'name': 'Ann'}"]
        shown.clear()
        chat.say("nonsense Bob")
        assert shown[1] == ("result", "there is no tool nonsense") and len(confirmed) == 1
        with pytest.raises(McpLoraError, match="does not answer as it should"):
            chat.say("broken")
        chat.clear()
        chat.say("part Cid")
        chat.say("plain")
        # declined, and of a server that dies: the conversation is as before
        chat, shown, _ = chatting(outputs, url, servers, declined="erase", transcript=transcript)
        chat.say("erase Dan")
        assert shown == [("call", 'erase {"name": "Dan"}'), ("note", "not run")]
        # another chat writes the same file meanwhile, without a last line break
        with transcript.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({"messages": []}))
        chat.say("greet Nobody")
    kept = list(map(json.loads, transcript.read_text(encoding="utf-8").splitlines()))
    roles = [[one["role"] for one in conversation["messages"]] for conversation in kept]
    assert roles == [
        ["system", *["user", "assistant", "tool", "assistant"] * 2],
        ["system", "user", "assistant", "tool", "assistant", "user", "assistant"],
        ["system", "user", "assistant", "tool"],
        [],
        ["system", "user", "assistant", "tool", "user", "assistant", "tool", "assistant"],
    ]
    (failed,) = (one for one in kept[-1]["messages"] if one.get("is_error"))
    assert failed["content"].startswith("greet Nobody")
    stats = conversion.convert(Settings(inputs=[str(transcript)], test=0.0), tmp_path / "data")
    assert stats.written == {"train": 3} and stats.rejected["duplicate"] == 1  # up to the first call


def test_a_server_that_dies_leaves_the_conversation_as_it_was(outputs: Path) -> None:
    with teacher(adapter) as url, connected(address()) as servers:
        chat, shown, _ = chatting(outputs, url, servers)
        with pytest.raises(McpLoraError, match="good has died"):
            chat.say("greet Death")
        chat.say("plain")
        assert shown[-1] == ("assistant", "Hello.")


def test_what_may_have_changed_something_is_not_taken_back(outputs: Path, tmp_path: Path) -> None:
    file = tmp_path / "chat.jsonl"
    with teacher(adapter) as url, connected(address()) as servers:
        chat, _, _ = chatting(outputs, url, servers, transcript=file)
        for name in ("greet", "erase"):
            with pytest.raises(McpLoraError, match="good has died"):
                chat.say(f"{name} Death")
    (line,) = file.read_text(encoding="utf-8").splitlines()
    said = [one["content"] for one in json.loads(line)["messages"][1:]]
    assert said == ["erase Death", None, "not run"]


def test_more_tools_than_fit_are_narrowed_to_those_closest_to_the_question(outputs: Path) -> None:
    words = ("weather", "train", "music", "mail", "road", "stock", "film", "bank", "hotel", "天气")
    tools = [
        Tool("s", f"get_{word}_{number}", f"The {word} " * 9, {}) for word in words for number in range(9)
    ]
    sent: list[Any] = []

    def reply(request: dict[str, Any]) -> dict[str, Any]:
        sent.append([tool["function"]["name"] for tool in request["tools"]])
        return calling(("get_music_3", "{}"))

    with teacher(reply) as url:
        chat, shown, confirmed = chatting(outputs, url, [], tools=tools)
        chat.say("Which music is there?")
        chat.say("天气如何？")
        assert 9 <= len(sent[0]) < 40 and {*sent[0][:9]} == {f"get_music_{number}" for number in range(9)}
        assert {*sent[1][:9]} == {f"get_天气_{number}" for number in range(9)}
        assert shown[0][1].startswith(f"{len(sent[0])} of 90 tools fit into cutoff_len 1200: get_music_")
        assert shown[1:3] == [("call", "get_music_3 {}"), ("note", "not run")] and not confirmed


def test_a_long_conversation_leaves_room_for_fewer_tools(outputs: Path) -> None:
    tools = [Tool("s", f"get_{number}", "The weather " * 9, {}) for number in range(40)]
    sent: list[Any] = []

    def reply(request: dict[str, Any]) -> dict[str, Any]:
        sent.append(request)
        return {"content": "It rains and rains. " * 40}

    template = chat_template.load(runs.read_run(outputs))
    with teacher(reply) as url:
        chat, shown, _ = chatting(outputs, url, [], tools=tools)
        for _ in range(2):
            chat.say("What is the weather like?")
        first, second = (len(request["tools"]) for request in sent)
        assert first > second > 1
        notes = [text for who, text in shown if who == "note"]
        assert [note.split(" of ")[0] for note in notes] == [str(first), str(second)]
        for request in sent:
            prompt = template.prompt(request["messages"], request["tools"])
            assert len(template.ids(prompt)) <= 1200 - 256
        for _ in range(4):
            chat.say("What is the weather like?")
    assert len(sent[-1]["tools"]) == 1
    assert shown[-2] == ("note", "no tool fits into cutoff_len 1200, get_0 is used alone: /clear starts anew")


def test_the_chat_at_a_terminal(outputs: Path, tmp_path: Path) -> None:
    folder = tmp_path / "here"
    folder.mkdir()
    lines = "greet Ann\nYes\nerase Bob\n\n/clear\nbroken\nplain\nexit\n"
    server = f"{sys.executable} {SERVER} good ok"
    with teacher(adapter) as url:
        words = ["chat", outputs, "--mcp", server, "--endpoint", url, "--transcript", "chat.jsonl"]
        done = run([BIN / "mcp-lora", *words], folder, stdin=lines)
    assert done.returncode == 0, done.stderr
    assert '→ greet {"name": "Ann"}' in done.stdout and "← greet Ann \ufffd[31m" in done.stdout
    assert "Assistant: It says: greet Ann \ufffd[31m" in done.stdout and "Assistant: Hello." in done.stdout
    assert "run greet of good, which only reads? [y/N]" in done.stdout
    assert "run erase of good, which may change something? [y/N]" in done.stdout
    assert "mcp-lora: not run" in done.stderr and "does not answer as it should" in done.stderr
    assert len((folder / "chat.jsonl").read_text(encoding="utf-8").splitlines()) == 2
    done = run([BIN / "mcp-lora", "chat", outputs, "--mcp", "no-such-program", "--endpoint", url], folder)
    assert done.returncode == 2 and "no-such-program cannot be used" in done.stderr
    done = run([BIN / "mcp-lora", "chat", outputs, "--tools", "nothing.json"], folder)
    assert done.returncode == 2 and "mcp-lora chat --tools OTHER_FILE" in done.stderr


def test_ctrl_c_stops_an_answer_and_not_the_chat(outputs: Path, tmp_path: Path) -> None:
    asked = threading.Event()

    def slow(request: dict[str, Any]) -> dict[str, Any] | int:
        last = request["messages"][-1]["content"]
        if last == "wait":
            asked.set()
            stopped.wait(60)
        return {"content": "Hello."}

    stopped = threading.Event()
    with teacher(slow) as url:
        pipe = subprocess.PIPE
        argv = [BIN / "mcp-lora", "chat", outputs, "--endpoint", url]
        started = {"stdin": pipe, "stdout": pipe, "stderr": pipe, "text": True, "env": environment()}
        with subprocess.Popen(argv, cwd=tmp_path, **started) as process:
            guard = threading.Timer(180, process.kill)  # a chat that hangs fails
            guard.start()
            process.stdin.write("wait\n")
            process.stdin.flush()
            assert asked.wait(120)
            process.send_signal(signal.SIGINT)
            assert next(line for line in process.stderr if "stopped" in line)
            stopped.set()
            out, _ = process.communicate("plain\nexit\n", timeout=60)
            guard.cancel()
    assert process.returncode == 0 and "Assistant: Hello." in out


def test_ctrl_c_at_the_question_whether_a_tool_is_run_does_not_end_the_chat(
    outputs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines: Iterator[Any] = iter(["call", Interrupted(128 + signal.SIGINT), "plain", "exit"])

    def typed(question: str) -> str:
        line = next(lines)
        if isinstance(line, Interrupted):
            assert question.endswith("[y/N] ")
            raise line
        return line

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        is_call = request["messages"][-1]["content"] == "call"
        return calling(("greet", "{}")) if is_call else {"content": "Hello."}

    monkeypatch.setattr("builtins.input", typed)
    server = f"{sys.executable} {SERVER} good ok"
    with teacher(answer) as url, pytest.raises(SystemExit) as end:
        main(["chat", str(outputs), "--endpoint", url, "--mcp", server])
    said = capsys.readouterr()
    assert end.value.code == 0 and "stopped" in said.err and "Assistant: Hello." in said.out


def test_the_commands_say_what_comes_next(tmp_path: Path) -> None:
    server = f"{sys.executable} {SERVER} good ok"
    done = run([BIN / "mcp-lora", "collect", "--mcp", server, "--mcp", "no-such-program"], tmp_path)
    assert done.returncode == 0 and "1 of 2 servers; to use them: mcp-lora convert --tools" in done.stderr
    assert (tmp_path / "data/tools/good.json").is_file()
    for words, said in {
        ("collect",): "no server is named",
        ("generate", "--mcp", server): "Missing option '--endpoint'",
    }.items():
        done = run([BIN / "mcp-lora", *words], tmp_path)
        assert done.returncode == 2 and said in done.stderr
    with teacher(scripted(Counter())) as url:
        words = ("generate", "--mcp", server, "--endpoint", url, "--model", "m", "--rows", "4")
        done = run([BIN / "mcp-lora", *words], tmp_path)
    assert done.returncode == 0, done.stderr
    assert "good.part" in done.stdout and "1 wrong-tool" in done.stderr
    assert "tokens: 370 of prompts, 74 of answers" in done.stderr
    (file,) = (tmp_path / "data/filtered").glob("*.json")
    done = run([BIN / "mcp-lora", "convert", "--test", "0"], tmp_path)  # takes it by itself
    assert done.returncode == 0 and file.name in done.stdout


def test_a_server_from_npm(tmp_path: Path) -> None:
    npx = shutil.which("npx")
    if not npx:
        pytest.skip("npm is not installed")
    everything = Address("all", [npx, "--yes", "@modelcontextprotocol/server-everything@2026.8.31"])
    with connected(everything, timeout=120) as (server,):
        assert "echo" in server.tools and server.call("echo", {"message": "hi"}).text == "Echo: hi"
