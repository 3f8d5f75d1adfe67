"""Several questions of single-turn rows in one training sample.

The tools are most of a sample: with ten candidates the shipped sample's have 1,235 tokens on average, of
which the answer is 37. Eight questions about the same candidates train eight calls for one reading of them.
Each answer has the prompt that a server would send at that moment (see ChatTemplate.encode).
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice, product
from typing import Any

from mcp_lora.data.records import Tool
from mcp_lora.data.sampling import are_alike

_AHEAD = 8  # conversations' worth of questions from which the next one is made


@dataclass(frozen=True, eq=False)
class Exchange:
    """The question and answer of a single-turn row.

    Attributes:
        key: a hash of the question.
        messages: the system message, the question, and the gold calls or a refusal.
        own: the tools that the row brings.
        gold: the gold tools; if the answer is a refusal, they are not among the candidates.
        refuses: whether it is a refusal.
    """

    key: int
    messages: list[dict[str, Any]]
    own: list[Tool]
    gold: list[Tool]
    refuses: bool = False


def fits(one: Exchange, others: list[Exchange], size: int, candidates: int) -> bool:
    """Tell whether a question fits into a conversation of at most `size` about `candidates` tools.

    No question is asked twice, none can be answered by a tool that another's refusal lacks, no tool is called
    more than `size` / 2 times, and half of the candidates are gold at most. The first always fits.
    """
    if not others:
        return True
    if len(others) == size or one.messages[0] != others[0].messages[0]:
        return False
    if one.key in {other.key for other in others}:
        return False
    for other in others:
        for tool, known in product(one.gold, other.gold):
            is_same = tool == known and one.refuses == other.refuses
            if not is_same and (tool.name == known.name or are_alike(tool, known)):
                return False
    called = Counter(tool.name for each in (*others, one) if not each.refuses for tool in each.gold)
    return len(called) <= candidates // 2 and max(called.values(), default=0) <= size // 2


def conversations(
    exchanges: Iterable[Exchange], size: int, candidates: Callable[[int], int]
) -> Iterator[list[Exchange]]:
    """Yield conversations that contain every exchange once, those of one server together.

    Args:
        exchanges: all of them are held in memory.
        size: exchanges in a conversation, at most.
        candidates: returns the number of candidates for a hash.
    """

    def place(one: Exchange) -> tuple[str, int]:
        return one.gold[0].server if one.gold else "", one.key

    ordered, waiting = iter(sorted(exchanges, key=place)), list[Exchange]()
    while waiting := [*waiting, *islice(ordered, max(0, _AHEAD * size - len(waiting)))]:
        made, rest = list[Exchange](), list[Exchange]()
        tools = candidates(waiting[0].key)
        for one in waiting:
            (made if fits(one, made, size, tools) else rest).append(one)
        waiting = rest
        yield made
