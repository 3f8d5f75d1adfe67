"""The checks that every row must pass, whatever its format: normalized, in order, with valid calls."""

import re
from collections.abc import Iterator
from itertools import groupby, takewhile
from typing import Any

from mcp_lora.data.catalogue import Catalogue
from mcp_lora.data.records import ANSWER, CALL, RESULT, SYSTEM, USER, Content, RowError, Settings, Turn
from mcp_lora.data.tools import takes_null

# The roles that each role may follow.
_FOLLOWS = {USER: ("", CALL, ANSWER), RESULT: (CALL, RESULT), CALL: (USER, RESULT), ANSWER: (USER, RESULT)}
_ERROR = re.compile(r"\W*(?:error|exception|traceback|failed|failure|invalid)\b", re.IGNORECASE)


def check(content: Content, catalogue: Catalogue, settings: Settings) -> list[Turn]:
    """Return a row's turns, ready to be trained on; what was normalized is added to `content.cleaned`.

    Args:
        content: as a reader returns it.
        catalogue: checks arguments against schemas.
        settings: how much of the conversation is kept, and what is rejected.

    Returns:
        A conversation that starts with the user, after a system message if there is one, alternates (USER, or
        the RESULTs of a CALL) with (CALL or ANSWER) and ends with one of the latter. Later system messages
        keep their place. Everything after a message that is broken or out of order is dropped.

    Raises RowError if the row cannot be used.
    """
    cleaned, whole = content.cleaned, settings.turns != "call"
    turns = content.turns if settings.keep_failed else list(_without_failed(content.turns))
    turns = turns if whole else _up_to_the_call(turns)
    failed = sum(was.trained and not now.trained for was, now in zip(content.turns, turns, strict=False))
    cleaned += ["failed-call"] * failed
    turns = _joined([_clean(turn, settings, cleaned) for turn in turns])
    first = next((turn for turn in turns if turn.role != SYSTEM), Turn(USER))
    if first.role == USER and not first.text:
        raise RowError("no-instruction", "there is no question")
    before = ""
    for place, turn in enumerate(turns):
        if turn.role != SYSTEM and before not in _FOLLOWS[turn.role]:
            error = RowError("bad-order", f"a {turn.role} comes after {before or 'nothing'}")
            if not whole:
                raise error
            content.error, turns = error, turns[:place]
            break
        before = before if turn.role == SYSTEM else turn.role
    while turns and turns[-1].role in (SYSTEM, USER, RESULT):
        cleaned.append(f"trailing-{turns.pop().role}")
    trained = [turn for turn in turns if turn.role in (CALL, ANSWER) and turn.trained]
    if content.error and not trained:
        raise content.error
    if content.error and (whole or not any(turn.calls for turn in turns)):
        cleaned.append("ends-at-a-broken-message")
    if not turns:
        raise RowError("no-instruction", "there is no question with an answer")
    if not trained:
        raise RowError("failed-call", "every call failed, and there is nothing else to train on")
    if not content.tools and (not settings.keep_plain or any(turn.calls for turn in turns)):
        raise RowError("no-tool", "there is no candidate tool")
    return [_checked(turn, content, catalogue, settings.strict_schema) for turn in turns]


def _checked(turn: Turn, content: Content, catalogue: Catalogue, strict: bool) -> Turn:
    """Return a turn with valid calls, without the nulls that tabular formats add."""
    checked = []
    for call in turn.calls:
        tool = next((tool for tool in content.tools if tool.name == call.name), None)
        if tool is None:
            raise RowError("unknown-tool", f"{call.name} is called, but not among the tools")
        arguments = _without_nulls(call.arguments, tool.parameters)
        if arguments != call.arguments:
            content.cleaned.append("null-argument")
        if problem := catalogue.problem(tool, arguments):
            raise RowError("schema", f"the arguments of {call.name} do not match its schema: {problem}")
        unknown = [key for key in arguments if key not in tool.parameters["properties"]]
        if unknown and "additionalProperties" not in tool.parameters:
            if strict:
                raise RowError("schema", f"the schema of {call.name} has no {', '.join(unknown)}")
            content.cleaned.append("unknown-parameter")
        checked.append(call._replace(arguments=arguments))
    return turn._replace(calls=tuple(checked))


def _without_nulls(value: Any, schema: Any) -> Any:
    """Return arguments without the nulls that the schema neither allows nor requires."""
    if isinstance(value, list) and isinstance(schema, dict):
        return [_without_nulls(item, schema.get("items")) for item in value]
    if not isinstance(value, dict) or not isinstance(schema, dict):
        return value
    properties, required = schema.get("properties"), schema.get("required")
    if not isinstance(properties, dict):
        return value
    required = required if isinstance(required, list) else ()
    return {
        key: _without_nulls(item, properties.get(key))
        for key, item in value.items()
        if item is not None or key in required or takes_null(properties.get(key))
    }


def _without_failed(turns: list[Turn]) -> Iterator[Turn]:
    """Yield the turns, with each call whose result is an error as context, not trained on.

    A result that only starts like an error counts as one if the same tool is called again right after it.
    """
    for place, turn in enumerate(turns):
        if turn.role == CALL:
            results = list(takewhile(lambda one: one.role == RESULT, turns[place + 1 :]))
            after = turns[place + 1 + len(results) : place + 2 + len(results)]
            next_calls = {call.name for one in after for call in one.calls}
            again = not next_calls.isdisjoint(call.name for call in turn.calls)
            if any(one.failed or (again and _ERROR.match(one.text)) for one in results):
                turn = turn._replace(trained=False)
        yield turn


def _up_to_the_call(turns: list[Turn]) -> list[Turn]:
    """Return the turns up to the first trained call and those parallel to it, or else to the first answer."""
    for role in (CALL, ANSWER):
        for place, turn in enumerate(turns):
            if turn.role == role and turn.trained and (turn.calls or turn.text.strip()):
                parallel = takewhile(lambda one: one.role == CALL, turns[place + 1 :])
                return [*turns[: place + 1], *(parallel if role == CALL else ())]
    return turns


def _clean(turn: Turn, settings: Settings, cleaned: list[str]) -> Turn:
    """Strip white space and the leading ": " that generators leave from a question; shorten a result."""
    text = turn.text
    if turn.role == USER:
        text = text.strip()
        if bare := re.match(r":\s+", text):
            text = text[bare.end() :]
            cleaned.append("leading-colon")
        elif text != turn.text:
            cleaned.append("white-space")
    elif turn.role == RESULT and (left_out := len(text) - settings.max_observation) > 0:
        text = f"{text[: settings.max_observation]}\n[… {left_out} more characters]"
        cleaned.append("shortened-result")
    if settings.drop_reasoning and turn.reasoning:
        cleaned.append("dropped-reasoning")
        turn = turn._replace(reasoning="")
    return turn if text == turn.text else turn._replace(text=text)


def _joined(turns: list[Turn]) -> list[Turn]:
    """Join adjacent turns of one role: parallel calls, a text and the call after it, texts.

    Results are put in the order of their calls.
    """
    joined: list[Turn] = []
    for turn in turns:
        if turn.role == ANSWER and not turn.text.strip() and not turn.reasoning:
            continue
        last = joined[-1] if joined else Turn("")
        beside = last.role == ANSWER and turn.role == CALL and last.trained == turn.trained
        if beside or (last.role == turn.role and turn.role != RESULT and last.trained == turn.trained):
            text = "\n\n".join(filter(None, (last.text, turn.text)))
            reasoning = "\n\n".join(filter(None, (last.reasoning, turn.reasoning)))
            calls, ids = last.calls + turn.calls, last.ids + turn.ids
            joined[-1] = turn._replace(text=text, calls=calls, ids=ids, reasoning=reasoning)
        else:
            joined.append(turn)
    joined = [turn for turn in joined if turn.role != ANSWER or turn.text.strip()]
    order: dict[str, int] = {}
    ordered: list[Turn] = []
    for role, group in groupby(joined, key=lambda turn: turn.role):
        found = list(group)
        if role == RESULT:
            found.sort(key=lambda one: order.get(one.ids[0] if one.ids else "", len(order)))
        ordered += found
        order = {name: number for number, name in enumerate(found[-1].ids) if name}
    return ordered
