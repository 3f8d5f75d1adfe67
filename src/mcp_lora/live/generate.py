"""Make rows for training: a teacher writes instructions, and follows them with the tools of live servers.

FOLDER/filtered_DATE_TIME.json has the rows in the user guide's format, which `convert` takes by itself. Its
journal, filtered_DATE_TIME.journal, starts with what was requested, and has a line for each attempt:

    {"server": "time", "tool": "get_current_time", "difficulty": "easy", "language": "English",
     "reason": "wrong-tool", "message": "it calls convert_time", "tokens": [812, 95],
     "row": {"instruction": "What time is it in Oslo?", …}}

`reason` is null if the row is kept. A request that was interrupted goes on with its journal.
"""

import json
import os
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

from mcp_lora.data import dataset, files
from mcp_lora.data.calls import call_of, split_thought
from mcp_lora.data.catalogue import Catalogue
from mcp_lora.data.records import RowError, Tool, ToolCall
from mcp_lora.data.rows import SYSTEM_MESSAGE, Progress
from mcp_lora.errors import McpLoraError, explained, one_line
from mcp_lora.evaluate.evaluation import Endpoint
from mcp_lora.evaluate.predict import KEY, RETRIES, asked
from mcp_lora.live.connections import Connection
from mcp_lora.prompts.chat_template import calling

_DIFFICULTIES = {
    "easy": "It says plainly what is needed.",
    "medium": "It is in everyday words, so that some values have to be worked out.",
    "hard": "It tells of a situation in two or three sentences, some of which do not matter.",
}
_INSTRUCTION = """Write one message, in {language}, that a user sends to an assistant. To answer it,
the assistant needs one call of this tool of the server {server}:

{tool}

The message has all values that the call requires, realistic ones. {difficulty} It does not name the tool.
Be original: this is message number {number} about this tool. Reply with the message only."""
_VERDICT = """A user has sent this message to an assistant:

{instruction}

It has called {call}, which returned:

{result}

and has answered:

{answer}

Is the message in {language}, is the answer what the user has asked for, and is it what the tool has returned?
Reply with yes or no."""
_CANDIDATES = 10  # tools of the server from which the teacher chooses
_AT_ONCE = 8  # attempts
_ATTEMPTS = 5  # for each row that is wanted of a tool
# Attempts after which a teacher is given up if none was good: one with a good attempt in ten, from which rows
# would take their time already, gets here once in 200 times.
_HOPELESS = 50
_SAME = 90  # of 100, by RapidFuzz's ratio
_RESULT = 4000  # characters
_FATAL = "failed"  # the reason of an attempt that ended the command

_Line = dict[str, Any]  # of the journal
_Ask = Callable[..., tuple[str, list[ToolCall]]]  # messages and tools → the teacher's text and calls
_Tools = Mapping[tuple[str, str], tuple[Connection, Tool]]  # by the names of server and tool


@dataclass(frozen=True)
class Request:
    """What is to be generated.

    Attributes:
        rows: how many, spread evenly over the tools.
        teacher: an OpenAI-compatible server, and the name of its model.
        languages: of the instructions.
        allowed: TOOL or SERVER.TOOL, of tools that are called although they do not say that they only read.
        seed: of the candidate tools, and sent to the teacher.
    """

    rows: int
    teacher: Endpoint
    languages: Sequence[str] = ("English",)
    allowed: Sequence[str] = ()
    seed: int = 42


def generate(
    request: Request,
    servers: Sequence[Connection],
    folder: Path,
    progress: Progress = lambda step, fraction: None,
    say: Callable[[str], None] = lambda text: None,
) -> tuple[Path, list[_Line]]:
    """Generate rows, and write them into a folder.

    Returns:
        The file, and the journal's lines about all attempts.

    Raises McpLoraError if no tool may be called, the teacher or a server fails, or nothing is kept.
    """
    tools = _callable(request, servers, say)
    again = "mcp-lora generate --output OTHER_FOLDER"
    with explained(f"{folder} cannot be written", again):
        folder.mkdir(parents=True, exist_ok=True)
        problem = f"{folder} is in use by another mcp-lora generate: {again}"
        with files.exclusive(folder / ".generate.lock", problem):
            journal, lines = _journal(folder, request)
            if lines:
                say(f"going on with {journal}: {len(lines)} attempts are made")
            _fill(journal, lines, request, tools, progress)
            if not (kept := [line["row"] for line in _kept(lines)]):
                failed = journal.rename(journal.with_suffix(".failed"))
                what = f"no attempt was good, see {failed} (the last: {lines[-1]['message']})"
                raise McpLoraError(f"{what}: mcp-lora generate --model A_STRONGER_ONE")
            dataset.dump(kept, journal.with_suffix(".new"))
            return journal.with_suffix(".new").replace(journal.with_suffix(".json")), lines


def _fill(journal: Path, lines: list[_Line], request: Request, tools: _Tools, progress: Progress) -> None:
    """Make attempts until there is none left to make; add them to the journal and its lines.

    Raises McpLoraError if the teacher or a server fails.
    """
    ask = _teacher(request)
    with journal.open("a", encoding="utf-8") as stream, ThreadPool(_AT_ONCE) as pool:
        while batch := _next(request, tools, lines):
            for line in pool.imap(partial(_attempt, ask, request.seed, tools), batch):
                lines.append(_original(line, lines))
                stream.write(json.dumps(lines[-1], ensure_ascii=False) + "\n")
                stream.flush()
            for line in lines[-len(batch) :]:
                if line["reason"] == _FATAL:
                    raise McpLoraError(f"{line['message']} The same command goes on with what is done")
            progress("generating", len(_kept(lines)) / request.rows)


def _kept(lines: Sequence[_Line]) -> list[_Line]:
    return [line for line in lines if not line["reason"]]


def _callable(request: Request, servers: Sequence[Connection], say: Callable[[str], None]) -> _Tools:
    """Return the tools that may be called."""
    tools = dict[tuple[str, str], tuple[Connection, Tool]]()
    left_out, unknown = list[str](), {*request.allowed}
    for server in servers:
        for name, tool in server.tools.items():
            names = {name, f"{server.name}.{name}"}
            unknown -= names
            if name in server.read_only or names & {*request.allowed}:
                tools[server.name, name] = server, tool
            else:
                left_out.append(name)
    if unknown:
        raise McpLoraError(
            f"--allow {', '.join(sorted(unknown))}: no server has it: mcp-lora collect lists them"
        )
    if left_out:
        say(f"tools that do not say that they only read are left out: {', '.join(left_out)} (--allow TOOL)")
    if not tools:
        raise McpLoraError("no tool is left to call: mcp-lora generate --allow TOOL")
    return tools


def _journal(folder: Path, request: Request) -> tuple[Path, list[_Line]]:
    """Return the journal of a request and its attempts so far: the newest unfinished one, or a new one."""
    wanted = json.loads(json.dumps(asdict(request)))
    del wanted["rows"], wanted["teacher"]["url"]  # which may be others when it goes on
    for journal in sorted(folder.glob("filtered_*.journal"), reverse=True):
        content = journal.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]  # the last line may be cut off
        with suppress(ValueError):
            lines = list(map(json.loads, whole.splitlines()))
            if lines[:1] == [wanted] and not journal.with_suffix(".json").exists():
                os.truncate(journal, len(whole))
                return journal, lines[1:]
    journal = folder / f"filtered_{datetime.now():%Y%m%d_%H%M%S}.journal"
    journal.write_text(json.dumps(wanted, ensure_ascii=False) + "\n", encoding="utf-8")
    return journal, []


def _next(request: Request, tools: _Tools, lines: Sequence[_Line]) -> list[_Line]:
    """Return the attempts to make at once, of the tools that have the fewest rows.

    There are none if all rows are made, all attempts, or _HOPELESS of them without a row.
    """
    tried = Counter((line["server"], line["tool"]) for line in lines)
    rows = Counter((line["server"], line["tool"]) for line in _kept(lines))
    if len(lines) >= _HOPELESS and not rows:
        return []
    most = _ATTEMPTS * -(-request.rows // len(tools))
    grades, batch = list(_DIFFICULTIES), list[_Line]()
    for _ in range(min(_AT_ONCE, request.rows - rows.total())):
        if not (left := [key for key in tools if tried[key] < most]):
            break
        key = min(left, key=lambda key: rows[key])
        number = tried[key]
        language = request.languages[number // len(grades) % len(request.languages)]
        line = {
            "server": key[0],
            "tool": key[1],
            "number": number,
            "difficulty": grades[number % len(grades)],
        }
        batch.append(
            line | {"language": language, "reason": None, "message": None, "tokens": [0, 0], "row": {}}
        )
        tried[key] += 1
        rows[key] += 1  # as if it will be good
    return batch


def _teacher(request: Request) -> _Ask:
    """Return a function that asks the teacher, and adds the tokens used to a line of the journal."""
    from openai import BadRequestError, OpenAI

    url, model = request.teacher.url, request.teacher.model
    client = OpenAI(base_url=url, api_key=os.environ.get(KEY, "none"), max_retries=RETRIES)

    def ask(
        messages: Sequence[Any], line: _Line, seed: int, tools: Sequence[Any] = ()
    ) -> tuple[str, list[ToolCall]]:
        more = {"tool_choice": "required"} if tools else {}
        try:
            found, tokens = asked(client, model, messages, tools, seed=seed, **more)
        except BadRequestError as error:  # too long, for instance
            raise RowError("rejected-by-teacher", one_line(error)) from None
        except Exception as error:  # any exception is possible
            what = f"the teacher at {url} does not answer ({one_line(error)}): is it running, is {model} its"
            raise McpLoraError(f"{what} model, is the key in {KEY}?") from None
        line["tokens"] = [sum(pair) for pair in zip(line["tokens"], tokens, strict=True)]
        if found.failed:
            raise RowError(found.failed.replace(" ", "-"), f"the teacher's answer: {found.text[-200:]}")
        calls = [ToolCall(call["name"], call["arguments"]) for call in found.tool_calls]
        return split_thought(found.text)[0].strip(), calls

    return ask


def _attempt(ask: _Ask, seed: int, tools: _Tools, line: _Line) -> _Line:
    """Make the row of a line, or note why it could not be made."""
    try:
        server, tool = tools[line["server"], line["tool"]]
        _make(line, server, tool, partial(ask, line=line, seed=seed + line["number"]), seed)
    except RowError as error:
        line |= {"reason": error.reason, "message": str(error)}
    except McpLoraError as error:
        line |= {"reason": _FATAL, "message": str(error)}
    return line


def _make(line: _Line, server: Connection, tool: Tool, ask: _Ask, seed: int) -> None:
    """Make a row step by step; raise a RowError at the first that goes wrong."""
    row, number = line["row"], line["number"]
    prompt = _INSTRUCTION.format(
        language=line["language"],
        server=server.name,
        tool=json.dumps(tool.function, ensure_ascii=False),
        difficulty=_DIFFICULTIES[line["difficulty"]],
        number=number + 1,
    )
    row["instruction"], _ = ask([{"role": "user", "content": prompt}])
    if not row["instruction"] or tool.name in row["instruction"] and not tool.name.isalpha():
        raise RowError("no-instruction", "the teacher has written nothing, or names the tool")
    row["server_info"] = {"server_name": server.name}
    described = {"tool_name": tool.name, "tool_description": tool.description}
    row["tool_info"] = described | {"input_schema": tool.parameters}
    rng = random.Random(f"{seed} {number} {server.name} {tool.name}")
    others = [one for one in server.tools.values() if one is not tool]
    candidates = [tool, *rng.sample(others, min(len(others), _CANDIDATES - 1))]
    rng.shuffle(candidates)
    messages: list[Any] = [{"role": "system", "content": SYSTEM_MESSAGE}]
    messages.append({"role": "user", "content": row["instruction"]})
    text, made = ask(messages, tools=[{"type": "function", "function": one.function} for one in candidates])
    call = checked(text, made, tool)
    row["function_call"] = call._asdict()
    result = server.call(tool.name, call.arguments)
    row["tool_response"] = {"content": result.text}
    if result.is_error:
        raise RowError("tool-error", result.text[:300])
    called = calling([call])
    answered = {
        "role": "tool",
        "tool_call_id": called["tool_calls"][0]["id"],
        "content": result.text[:_RESULT],
    }
    row["final_response"], _ = ask([*messages, called, answered])
    if not row["final_response"]:
        raise RowError("no-answer", "the teacher has not answered the instruction")
    prompt = _VERDICT.format(
        language=line["language"],
        instruction=row["instruction"],
        call=json.dumps(row["function_call"], ensure_ascii=False),
        result=result.text[:_RESULT],
        answer=row["final_response"],
    )
    verdict, _ = ask([{"role": "user", "content": prompt}])
    if not verdict.lower().lstrip("*\"'").startswith("yes"):
        raise RowError("not-answered", f"the teacher does not agree: {verdict[:200]}")


def checked(text: str, made: Sequence[ToolCall], tool: Tool) -> ToolCall:
    """Return the one call in a teacher's message; raise a RowError if it is none of the tool, or invalid."""
    if len(made) != 1:
        raise RowError("several-calls" if made else "no-call", f"{len(made)} calls: {text[:200]}")
    name, arguments = made[0]
    if name != tool.name:
        raise RowError("wrong-tool", f"it calls {name!r}")
    if (call := call_of(name, arguments)) is None:
        raise RowError("not-json", f"the arguments are {str(arguments)[:200]!r}")
    if problem := Catalogue().problem(tool, call.arguments):
        raise RowError("schema", problem)
    return call


def _original(line: _Line, lines: Sequence[_Line]) -> _Line:
    """Reject a row whose instruction is nearly the same as that of an earlier one."""
    from rapidfuzz import fuzz, process

    kept = [one["row"]["instruction"] for one in _kept(lines)]
    if line["reason"] or not kept:
        return line
    (same, score, _) = process.extractOne(line["row"]["instruction"], kept, scorer=fuzz.ratio)
    near = {"reason": "near-copy", "message": f"{score:.0f} % the same as: {same}"}
    return line | near if score >= _SAME else line
