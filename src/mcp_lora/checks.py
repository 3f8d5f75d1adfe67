"""What every row must pass, whatever its form: cleaned, in order, its calls valid."""

import re
from collections.abc import Iterator
from typing import Any

from mcp_lora.catalogue import Catalogue
from mcp_lora.records import ANSWER, CALL, RESULT, SYSTEM, USER, Content, Fault, Tool, ToolCall, Turn
from mcp_lora.tools import takes_null

# What each role may follow.
_FOLLOWS = {USER: ("", CALL, ANSWER), RESULT: (CALL, RESULT), CALL: (USER, RESULT), ANSWER: (USER, RESULT)}


_ERROR = re.compile(r"\W*(?:error|exception|traceback|failed|failure|invalid)\b", re.IGNORECASE)


def check(
    content: Content,
    catalogue: Catalogue,
    whole: bool,
    max_observation: int,
    strict_schema: bool = False,
    keep_failed: bool = False,
    drop_reasoning: bool = False,
) -> list[Turn]:
    """Return a row's turns as they can be trained on; what is normalized is added to `content.cleaned`.

    Args:
        content: as a reader gives it.
        catalogue: checks arguments against schemas.
        whole: keep the whole conversation, not only what goes up to the first call.
        max_observation: a tool's result is shortened to so many characters.
        strict_schema: refuse parameters that a tool's schema does not know.
        keep_failed: train on calls of which the result is an error.
        drop_reasoning: leave out what was thought.

    Returns:
        A conversation that begins with the user, after a system message if there is one, alternates (USER, or
        the RESULTs of a CALL) with (CALL or ANSWER) and ends with one of the latter. Later system messages
        stand where they stood.

    Raises:
        Fault: it cannot be used.
    """
    cleaned = content.cleaned
    turns = content.turns if keep_failed else list(_without_failed(content.turns, cleaned))
    turns = turns if whole else _up_to_the_call(turns)
    turns = _joined([_clean(turn, max_observation, drop_reasoning, cleaned) for turn in turns])
    while turns and turns[-1].role in (SYSTEM, USER, RESULT):
        cleaned.append(f"trailing-{turns.pop().role}")
    said = [turn for turn in turns if turn.role != SYSTEM]
    if content.fault and not any(turn.trained for turn in said if turn.role in (CALL, ANSWER)):
        raise content.fault
    if content.fault and (whole or not any(turn.calls for turn in said)):
        cleaned.append("ends-at-a-broken-message")
    if not said or (said[0].role == USER and not said[0].text):
        raise Fault("no-instruction", "there is no question with an answer")
    before = ""
    for place, turn in enumerate(said, start=1):
        if before not in _FOLLOWS[turn.role]:
            raise Fault("bad-order", f"turn {place} is a {turn.role}, after {before or 'nothing'}")
        before = turn.role
    if not any(turn.trained for turn in said if turn.role in (CALL, ANSWER)):
        raise Fault("failed-call", "every call failed, and nothing else is to be trained on")
    tools = {tool.name: tool for tool in content.tools}
    if not tools:
        raise Fault("no-tool", "no tool is on offer")
    for place, turn in enumerate(turns):
        if turn.calls:
            calls = [_checked(call, tools, catalogue, strict_schema, content) for call in turn.calls]
            turns[place] = turn._replace(calls=tuple(calls))
    return turns


def _checked(
    call: ToolCall, tools: dict[str, Tool], catalogue: Catalogue, strict: bool, content: Content
) -> ToolCall:
    """Return a call without the nulls that a table has filled in, if it is valid."""
    if call.name not in tools:
        raise Fault("unknown-tool", f"{call.name} is called, but not among the tools")
    tool = tools[call.name]
    arguments = _without_nulls(call.arguments, tool.parameters)
    if arguments != call.arguments:
        content.cleaned.append("null-argument")
    if problem := catalogue.problem(tool, arguments):
        raise Fault("schema", f"the arguments of {call.name} break its schema: {problem}")
    unknown = [key for key in arguments if key not in tool.parameters["properties"]]
    if unknown and "additionalProperties" not in tool.parameters:
        if strict:
            raise Fault("schema", f"the schema of {call.name} has no {', '.join(unknown)}")
        content.unknown.append(call.name)
    return ToolCall(call.name, arguments)


def _without_nulls(value: Any, schema: Any) -> Any:
    """Return arguments without nulls that the schema neither takes nor requires."""
    if not isinstance(value, dict) or not isinstance(schema, dict):
        return value
    properties, required = schema.get("properties"), schema.get("required") or ()
    if not isinstance(properties, dict):
        return value
    return {
        key: _without_nulls(item, properties.get(key))
        for key, item in value.items()
        if item is not None or key in required or takes_null(properties.get(key))
    }


def _without_failed(turns: list[Turn], cleaned: list[str]) -> Iterator[Turn]:
    """Yield turns; a call of which the result is an error is context, and not trained on.

    A result that begins as errors do is one where the same tool is called again at once.
    """
    for place, turn in enumerate(turns):
        if turn.role == CALL:
            results = []
            for later in turns[place + 1 :]:
                if later.role != RESULT:
                    break
                results.append(later)
            after = turns[place + 1 + len(results) : place + 2 + len(results)]
            again = any(
                call.name == other.name for one in after for other in one.calls for call in turn.calls
            )
            failed = any(one.failed or (again and _ERROR.match(one.text)) for one in results)
            if failed and turn.trained:
                cleaned.append("failed-call")
                turn = turn._replace(trained=False)
        yield turn


def _up_to_the_call(turns: list[Turn]) -> list[Turn]:
    """Return the turns up to the first call that is trained on, and those in parallel; else to an answer."""
    calls = [place for place, turn in enumerate(turns) if turn.role == CALL and turn.trained]
    if calls:
        end = calls[0] + 1
        while end < len(turns) and turns[end].role == CALL:
            end += 1
        return turns[:end]
    answers = [
        place
        for place, turn in enumerate(turns)
        if turn.role == ANSWER and turn.text.strip() and turn.trained
    ]
    return turns[: answers[0] + 1] if answers else turns


def _clean(turn: Turn, max_observation: int, drop_reasoning: bool, cleaned: list[str]) -> Turn:
    """Take the leading ": " that generators leave, and white space, off a question; shorten a result."""
    text = turn.text
    if turn.role == USER:
        text = text.strip()
        if bare := re.match(r":\s+", text):
            text = text[bare.end() :]
            cleaned.append("leading-colon")
        elif text != turn.text:
            cleaned.append("white-space")
    elif turn.role == RESULT and len(text) > max_observation:
        left_out = len(text) - max_observation
        text = f"{text[:max_observation]}\n[… {left_out} more characters]"
        cleaned.append("shortened-result")
    if drop_reasoning and turn.reasoning:
        cleaned.append("dropped-reasoning")
        turn = turn._replace(reasoning="")
    return turn if text == turn.text else turn._replace(text=text)


def _joined(turns: list[Turn]) -> list[Turn]:
    """Join what stands one after another in one role: parallel calls, a text and the call after it, texts.

    Results come in the order of the calls that they belong to.
    """
    joined: list[Turn] = []
    for turn in turns:
        if turn.role == ANSWER and not turn.text.strip() and not turn.reasoning:
            continue
        last = joined[-1] if joined else Turn("")
        beside = last.role == ANSWER and turn.role == CALL and last.trained == turn.trained
        if beside or (last.role == turn.role and turn.role != RESULT and last.trained == turn.trained):
            joined[-1] = Turn(
                turn.role,
                "\n\n".join(filter(None, (last.text, turn.text))),
                last.calls + turn.calls,
                last.ids + turn.ids,
                "\n\n".join(filter(None, (last.reasoning, turn.reasoning))),
                trained=turn.trained,
            )
        else:
            joined.append(turn)
    joined = [turn for turn in joined if turn.role != ANSWER or turn.text.strip()]
    for place, turn in enumerate(joined):
        if turn.role == CALL:
            end = place + 1
            while end < len(joined) and joined[end].role == RESULT:
                end += 1
            order = {name: number for number, name in enumerate(turn.ids) if name}
            joined[place + 1 : end] = sorted(
                joined[place + 1 : end], key=lambda one: order.get(one.ids[0] if one.ids else "", len(order))
            )
    return joined
