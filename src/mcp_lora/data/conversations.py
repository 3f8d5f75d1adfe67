"""Several questions of single-turn rows in one training sample.

The tools are most of a sample: with ten candidates the shipped sample's have 1,235 tokens on average, of
which the answer is 37. Eight questions about the same candidates train eight calls for one reading of them.
Each answer has the prompt that a server would send at that moment (see ChatTemplate.encode).
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import count, islice, product
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


@dataclass(frozen=True)
class Conversation:
    """At most `size` questions with the same `candidates` (their number); half of these are gold at most."""

    size: int
    candidates: int
    exchanges: list[Exchange] = field(default_factory=list)

    def add(self, one: Exchange) -> bool:
        """Add a question if it fits; tell whether it did.

        No question is asked twice, none can be answered by a tool that another's refusal lacks, and no tool
        is called more than `size` / 2 times.
        """
        if len(self.exchanges) == self.size or one.key in (other.key for other in self.exchanges):
            return False
        if self.exchanges and one.messages[0] != self.exchanges[0].messages[0]:
            return False
        for other in self.exchanges:
            for tool, known in product(one.gold, other.gold):
                is_same = tool == known and one.refuses == other.refuses
                if not is_same and (tool.name == known.name or are_alike(tool, known)):
                    return False
        called = Counter(
            tool.name for each in (*self.exchanges, one) if not each.refuses for tool in each.gold
        )
        most = max(called.values(), default=0)
        if self.exchanges and (len(called) > self.candidates // 2 or most > self.size // 2):
            return False
        self.exchanges.append(one)
        return True

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The whole conversation, in OpenAI's format."""
        made, numbers = [self.exchanges[0].messages[0]], count(1)
        for one in self.exchanges:
            _, question, answer = one.messages
            calls = [call | {"id": f"call_{next(numbers)}"} for call in answer.get("tool_calls", ())]
            made += [question, answer | {"tool_calls": calls} if calls else answer]
        return made


def conversations(
    exchanges: Iterable[Exchange], size: int, candidates: Callable[[int], int]
) -> Iterator[Conversation]:
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
        made = Conversation(size, candidates(waiting[0].key))
        waiting = [one for one in waiting if not made.add(one)]
        yield made
