"""What every row must pass, whatever its shape: cleaned, in order, its calls valid."""

import re

from mcp_lora.catalogue import Catalogue
from mcp_lora.records import ANSWER, CALL, RESULT, USER, Content, Fault, Turn

# What each role may follow.
_FOLLOWS = {USER: ("", CALL, ANSWER), RESULT: (CALL, RESULT), CALL: (USER, RESULT), ANSWER: (USER, RESULT)}


def check(content: Content, catalogue: Catalogue, whole: bool, max_observation: int) -> list[Turn]:
    """Return a row's turns as they can be trained on; what is normalized is added to `content.cleaned`.

    They begin with the user, alternate (USER, or the RESULTs of a CALL) with (CALL or ANSWER) and end with
    one of the latter. `whole` keeps what comes after the first call too; a tool's result is shortened to
    `max_observation` characters; a system message that lists the tools is taken out of `content`.

    Raises:
        Fault: it cannot be used.
    """
    cleaned = content.cleaned
    turns = content.turns if whole else _up_to_the_call(content.turns)
    turns = _joined([_clean(turn, max_observation, cleaned) for turn in turns])
    while turns and turns[-1].role in (USER, RESULT):
        cleaned.append(f"trailing-{turns.pop().role}")
    if not turns or (turns[0].role == USER and not turns[0].text):
        raise Fault("no-instruction", "there is no question with an answer")
    before = ""
    for place, turn in enumerate(turns, start=1):
        if before not in _FOLLOWS[turn.role]:
            raise Fault("bad-order", f"turn {place} is a {turn.role}, after {before or 'nothing'}")
        before = turn.role
    calls = [call for turn in turns for call in turn.calls]
    if not calls and not content.tools:
        raise Fault("no-tool", "no tool is called and none is on offer")
    tools = {tool.name: tool for tool in content.tools}
    for call in calls:
        if call.name not in tools:
            raise Fault("unknown-tool", f"{call.name} is called, but not among the tools")
        if problem := catalogue.problem(tools[call.name], call.arguments):
            raise Fault("schema", f"the arguments of {call.name} break its schema: {problem}")
    content.system = content.system.strip()
    if '"parameters"' in content.system or "<tools>" in content.system:
        content.system = ""  # it lists the tools, and the template does that itself
        cleaned.append("system-with-tools")
    return turns


def _up_to_the_call(turns: list[Turn]) -> list[Turn]:
    """Return the turns up to the first call, and those in parallel; without one, to the first answer."""
    roles = [turn.role for turn in turns]
    if CALL in roles:
        end = roles.index(CALL) + 1
        while end < len(turns) and roles[end] == CALL:
            end += 1
        return turns[:end]
    answers = [place for place, turn in enumerate(turns) if turn.role == ANSWER and turn.text.strip()]
    return turns[: answers[0] + 1] if answers else turns


def _clean(turn: Turn, max_observation: int, cleaned: list[str]) -> Turn:
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
    return turn if text == turn.text else turn._replace(text=text)


def _joined(turns: list[Turn]) -> list[Turn]:
    """Join what stands one after another in one role: parallel calls, a text and the call after it, texts."""
    joined: list[Turn] = []
    for turn in turns:
        if turn.role == ANSWER and not turn.text.strip():
            continue
        last = joined[-1] if joined else Turn("")
        beside = last.role == ANSWER and turn.role == CALL
        if beside or (last.role == turn.role and turn.role != RESULT):
            joined[-1] = Turn(
                turn.role,
                "\n\n".join(filter(None, (last.text, turn.text))),
                last.calls + turn.calls,
                last.ids + turn.ids,
                "\n\n".join(filter(None, (last.reasoning, turn.reasoning))),
            )
        else:
            joined.append(turn)
    return joined
