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
from typing import Any, NamedTuple

from mcp_lora.data import dataset
from mcp_lora.data.catalogue import Catalogue
from mcp_lora.data.records import RowError, Tool
from mcp_lora.data.rows import SYSTEM_MESSAGE
from mcp_lora.errors import McpLoraError, explained
from mcp_lora.evaluate.evaluation import Endpoint
from mcp_lora.evaluate.predict import KEY, RETRIES
from mcp_lora.live.connections import Connection, reason

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

Is this what the user has asked for, and is it what the tool has returned? Reply with yes or no."""
_CANDIDATES = 10  # tools of the server from which the teacher chooses
_AT_ONCE = 8  # attempts
_ATTEMPTS = 5  # for each row that is wanted of a tool
_SAME = 90  # of 100, by RapidFuzz's ratio
_ANSWER = 1024  # tokens
_RESULT = 4000  # characters


@dataclass(frozen=True)
class Request:
    """What is to be generated.

    Attributes:
        rows: how many, spread evenly over the tools.
        teacher: an OpenAI-compatible server, and the name of its model.
        languages: of the instructions.
        allowed: names of tools that may be called although they do not say that they only read.
        seed: of the candidate tools, and sent to the teacher.
    """

    rows: int
    teacher: Endpoint
    languages: Sequence[str] = ("English",)
    allowed: Sequence[str] = ()
    seed: int = 42


@dataclass(frozen=True)
class Generated:
    """The file, its rows by tool, the rejected attempts by reason, and the teacher's tokens of all attempts.

    `tokens` are those of prompts, and of answers.
    """

    file: Path
    rows: Counter[str]
    rejected: Counter[str]
    tokens: list[int]


class _Attempt(NamedTuple):
    server: Connection
    tool: Tool
    number: int  # of this tool
    difficulty: str
    language: str


def generate(
    request: Request,
    servers: Sequence[Connection],
    folder: Path,
    progress: Callable[[str, float], None] = lambda step, fraction: None,
    say: Callable[[str], None] = lambda text: None,
) -> Generated:
    """Generate rows, and write them into a folder.

    Raises McpLoraError if no tool may be called, the teacher or a server fails, or nothing is kept.
    """
    every = [(server, tool) for server in servers for tool in server.tools.values()]
    tools = [one for one in every if one[1].name in {*one[0].read_only, *request.allowed}]
    if left_out := ", ".join(one[1].name for one in every if one not in tools):
        say(f"tools that do not say that they only read are left out: {left_out} (--allow TOOL)")
    if not tools:
        raise McpLoraError("no tool is left to call: mcp-lora generate --allow TOOL")
    wanted = asdict(request) | {"tools": [[server.name, tool.name] for server, tool in tools]}
    with explained(f"{folder} cannot be written", "mcp-lora generate --output OTHER_FOLDER"):
        journal, lines = _journal(folder, json.loads(json.dumps(wanted)))
        if lines:
            say(f"going on with {journal}: {len(lines)} attempts are made")
        ask = _teacher(request)
        with journal.open("a", encoding="utf-8") as stream, ThreadPool(_AT_ONCE) as pool:
            while batch := _next(request, tools, lines):
                for line in pool.imap(partial(_line, ask, request.seed), batch):
                    lines.append(_original(line, lines))
                    stream.write(json.dumps(lines[-1], ensure_ascii=False) + "\n")
                    stream.flush()
                kept = [line["row"] for line in lines if not line["reason"]]
                progress("generating", len(kept) / request.rows)
        rejected = Counter(line["reason"] for line in lines if line["reason"])
        kept = [line["row"] for line in lines if not line["reason"]]
        if not kept:
            what = f"no attempt was good, see {journal} ({rejected.most_common(5)})"
            raise McpLoraError(f"{what}: mcp-lora generate --model A_STRONGER_ONE")
        file = journal.with_suffix(".json")
        dataset.dump(kept, journal.with_suffix(".new"))
        os.replace(journal.with_suffix(".new"), file)
    rows = Counter(f"{line['server']}.{line['tool']}" for line in lines if not line["reason"])
    return Generated(file, rows, rejected, [sum(line["tokens"][place] for line in lines) for place in (0, 1)])


def _journal(folder: Path, wanted: dict[str, Any]) -> tuple[Path, list[dict[str, Any]]]:
    """Return the journal of a request and its attempts so far: the newest unfinished one, or a new one."""
    folder.mkdir(parents=True, exist_ok=True)
    for journal in sorted(folder.glob("filtered_*.journal"), reverse=True):
        lines = list[dict[str, Any]]()
        with suppress(ValueError), journal.open(encoding="utf-8") as stream:  # the last line may be cut off
            lines.extend(map(json.loads, stream))
        if lines[:1] == [wanted] and not journal.with_suffix(".json").exists():
            break
    else:
        journal, lines = folder / f"filtered_{datetime.now():%Y%m%d_%H%M%S}.journal", [wanted]
    journal.write_text("".join(json.dumps(one, ensure_ascii=False) + "\n" for one in lines), encoding="utf-8")
    return journal, lines[1:]


def _next(
    request: Request, tools: Sequence[tuple[Connection, Tool]], lines: Sequence[Mapping[str, Any]]
) -> list[_Attempt]:
    """Return the attempts to make at once, of the tools that have the fewest rows; none if all is done."""
    tried = Counter((line["server"], line["tool"]) for line in lines)
    rows = Counter((line["server"], line["tool"]) for line in lines if not line["reason"])
    most = _ATTEMPTS * -(-request.rows // len(tools))
    by_name = {(server.name, tool.name): (server, tool) for server, tool in tools}
    grades, batch = list(_DIFFICULTIES), list[_Attempt]()
    for _ in range(min(_AT_ONCE, request.rows - rows.total())):
        left = [key for key in by_name if tried[key] < most]
        if not left:
            break
        key = min(left, key=lambda key: rows[key])
        number = tried[key]
        language = request.languages[number // len(grades) % len(request.languages)]
        batch.append(_Attempt(*by_name[key], number, grades[number % len(grades)], language))
        tried[key] += 1
        rows[key] += 1  # as if it will be good
    return batch


_Ask = Callable[..., Any]  # messages, tokens, seed and tools → the teacher's message


def _teacher(request: Request) -> _Ask:
    """Return a function that sends messages to the teacher, and adds the tokens used to a list."""
    from openai import BadRequestError, OpenAI, OpenAIError, omit

    url, model = request.teacher.url, request.teacher.model
    client = OpenAI(base_url=url, api_key=os.environ.get(KEY, "none"), max_retries=RETRIES)

    def ask(messages: Any, tokens: list[int], seed: int, tools: Any = omit) -> Any:
        try:
            reply = client.chat.completions.create(
                model=model,
                messages=messages,
                tools=tools,
                tool_choice="required" if tools else omit,
                seed=seed,
                max_tokens=_ANSWER,
            )
            message, usage = reply.choices[0].message, reply.usage
        except BadRequestError as error:  # too long, for instance
            raise RowError("rejected-by-teacher", reason(error)) from None
        except (OpenAIError, LookupError, TypeError, ValueError) as error:
            what = f"the teacher at {url} does not answer ({reason(error)}): is it running, is {model} its"
            what += f" model, is the key in {KEY}? The same command goes on with what is done"
            raise McpLoraError(what) from None
        if usage:
            tokens[0] += usage.prompt_tokens
            tokens[1] += usage.completion_tokens
        return message

    return ask


def _line(ask: _Ask, seed: int, attempt: _Attempt) -> dict[str, Any]:
    """Return the journal's line about an attempt to make a row."""
    line: dict[str, Any] = {
        "server": attempt.server.name,
        "tool": attempt.tool.name,
        "difficulty": attempt.difficulty,
        "language": attempt.language,
        "reason": None,
        "message": None,
        "tokens": [0, 0],
        "row": {},
    }
    try:
        _make(line["row"], attempt, seed + attempt.number, partial(ask, tokens=line["tokens"]))
    except RowError as error:
        line |= {"reason": error.reason, "message": str(error)}
    return line


def _make(row: dict[str, Any], attempt: _Attempt, seed: int, ask: _Ask) -> None:
    """Make a row step by step; raise a RowError at the first that goes wrong."""
    server, tool, number, difficulty, language = attempt
    prompt = _INSTRUCTION.format(
        language=language,
        server=server.name,
        tool=json.dumps(tool.function, ensure_ascii=False),
        difficulty=_DIFFICULTIES[difficulty],
        number=number + 1,
    )
    row["instruction"] = _text(ask([{"role": "user", "content": prompt}], seed=seed), "no-instruction")
    row["server_info"] = {"server_name": server.name}
    row["tool_info"] = {
        "tool_name": tool.name,
        "tool_description": tool.description,
        "input_schema": tool.parameters,
    }
    draw = random.Random(f"{seed} {server.name} {tool.name}")
    others = [one for one in server.tools.values() if one is not tool]
    candidates = [tool, *draw.sample(others, min(len(others), _CANDIDATES - 1))]
    draw.shuffle(candidates)
    messages: list[Any] = [{"role": "system", "content": SYSTEM_MESSAGE}]
    messages.append({"role": "user", "content": row["instruction"]})
    functions = [{"type": "function", "function": one.function} for one in candidates]
    reply = ask(messages, seed=seed, tools=functions)
    row["function_call"] = call = _call(reply, tool)
    result = server.call(tool.name, call["arguments"])
    row["tool_response"] = {"content": result.text}
    if result.is_error:
        raise RowError("tool-error", result.text[:300])
    (made,) = reply.tool_calls
    called = {"id": made.id, "type": "function", "function": made.function.model_dump()}
    messages.append({"role": "assistant", "content": reply.content, "tool_calls": [called]})
    messages.append({"role": "tool", "tool_call_id": made.id, "content": result.text[:_RESULT]})
    row["final_response"] = answer = _text(ask(messages, seed=seed), "no-answer")
    prompt = _VERDICT.format(
        instruction=row["instruction"],
        call=json.dumps(call, ensure_ascii=False),
        result=result.text[:_RESULT],
        answer=answer,
    )
    verdict = _text(ask([{"role": "user", "content": prompt}], seed=seed), "no-verdict")
    if not verdict.lower().lstrip("*\"'").startswith("yes"):
        raise RowError("not-answered", f"the teacher does not agree with its answer: {verdict[:200]}")


def _text(message: Any, problem: str) -> str:
    text = (message.content or "").strip()
    if not text:
        raise RowError(problem, "the teacher has written nothing")
    return str(text)


def _call(reply: Any, tool: Tool) -> dict[str, Any]:
    """Return the one call in a teacher's message; raise a RowError if it is none of the tool, or invalid."""
    made = [call.function for call in reply.tool_calls or [] if call.type == "function"]
    if len(made) != 1:
        raise RowError("several-calls" if made else "no-call", f"{len(made)} calls: {reply.content}"[:200])
    if made[0].name != tool.name:
        raise RowError("wrong-tool", f"it calls {made[0].name}")
    try:
        arguments = json.loads(made[0].arguments or "{}")
    except ValueError:
        arguments = None
    if not isinstance(arguments, dict):
        raise RowError("not-json", f"the arguments are {made[0].arguments[:200]}")
    if problem := Catalogue().problem(tool, arguments):
        raise RowError("schema", problem)
    return {"name": tool.name, "arguments": arguments}


def _original(line: dict[str, Any], lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Reject a row whose instruction is nearly the same as that of an earlier one."""
    from rapidfuzz import fuzz, process

    kept = [one["row"]["instruction"] for one in lines if not one["reason"]]
    if line["reason"] or not kept:
        return line
    (same, score, _) = process.extractOne(line["row"]["instruction"], kept, scorer=fuzz.ratio)
    near = {"reason": "near-copy", "message": f"{score:.0f} % the same as: {same}"}
    return line | near if score >= _SAME else line
