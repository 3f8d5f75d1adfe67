"""What a question is asked for, training or one of the tests, and with which candidate tools."""

import hashlib
import random
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace

from rapidfuzz import fuzz

from mcp_lora.data.catalogue import Catalogue
from mcp_lora.data.records import Tool


@dataclass(frozen=True)
class Split:
    """What is held out: servers, tools, and a share of the rows of all others, from 0 to 1.

    Hashes decide, of the names and of a row's content: more data moves nothing that was tested on
    into training.
    """

    servers: float
    tools: float
    rows: float
    seed: int

    def within(self, tools: Collection[tuple[str, str]]) -> "Split":
        """Return this split without the parts for which the tools, (server, name), are too few.

        A share has to be one server, or one tool, at least.
        """
        servers = {server for server, _ in tools if server}
        return replace(
            self,
            servers=self.servers if self.servers * len(servers) >= 1 else 0.0,
            tools=self.tools if self.tools * len(tools) >= 1 else 0.0,
        )

    def server(self, server: str) -> bool:
        """Whether a server is held out; an unknown one never is."""
        return bool(server) and self._below(self.servers, "server", server)

    def tool(self, server: str, name: str) -> bool:
        """Whether a tool is held out for itself, whatever becomes of its server."""
        return self._below(self.tools, "tool", server, name)

    def row(self, content: int) -> bool:
        """Whether a row of a tool that is trained on is held out; `content` is a hash of 64 bits."""
        return content < self.rows * 2**64

    def _below(self, share: float, *words: str) -> bool:
        if not share:
            return False
        key = "\0".join((str(self.seed), *words)).encode(errors="surrogatepass")
        return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest()) < share * 2**64


_ALIKE = 90  # of 100: names, word by word, or descriptions that are as similar say the same


class Pool:
    """The tools of a catalogue, to sample candidates from.

    Attributes:
        synonyms: how often a tool was left out as it does what the gold tool does.
    """

    def __init__(self, catalogue: Catalogue, split: Split) -> None:
        self.synonyms = 0
        self._random = random.Random()
        self._by_server = catalogue.by_server
        # A row's own definition of a tool is known by the same names.
        self._held_out = {
            (tool.server, tool.name)
            for tool in catalogue.tools
            if split.server(tool.server) or split.tool(tool.server, tool.name)
        }
        self._seen = [tool for tool in catalogue.tools if (tool.server, tool.name) not in self._held_out]

    def sample(
        self,
        own: Sequence[Tool],
        called: Collection[str],
        count: int,
        content: int,
        unseen_server: bool = False,
    ) -> list[Tool]:
        """Sample the candidate tools of one question, the gold tools among them, in random order.

        A row that brings more tools than it calls has these as distractors first. Otherwise half of the
        distractors are of the gold tool's server, where it has them, and the rest of others, without those
        that are named or described as a gold tool is: to call them would be right.

        Args:
            own: the tools that the row brings.
            called: the names of those that are called; none where the right answer is not to call.
            count: how many candidates in all.
            content: a hash of the row, which seeds: other rows may come and go.
            unseen_server: the row tests a held-out server, whose tools may then be distractors.
        """
        self._random.seed(content)
        gold = [tool for tool in own if tool.name in called]
        near: Sequence[Tool] = [tool for tool in own if tool.name not in called]
        offered = {tool.name: tool for tool in gold}
        first = size = max(count, len(offered))
        if gold and not near:
            near = self._by_server.get(gold[0].server, []) if gold[0].server else []
            first = (len(offered) + size + 1) // 2
        barred = set() if unseen_server else self._held_out
        self._fill(offered, first, near, barred)
        if gold:
            self._fill(offered, size, self._seen, set(), gold)
        self._fill(offered, size, near, barred)
        return sorted(offered.values(), key=lambda tool: self._random.random())

    def _fill(
        self,
        offered: dict[str, Tool],
        size: int,
        tools: Sequence[Tool],
        barred: set[tuple[str, str]],
        gold: Sequence[Tool] = (),
    ) -> None:
        """Offer more tools, up to a size: of names that are not on offer yet, and none that is barred."""
        if len(offered) >= size:
            return
        for tool in self._shuffled(tools, size - len(offered)):
            if tool.name not in offered and (tool.server, tool.name) not in barred:
                if any(_are_alike(tool, other) for other in gold):
                    self.synonyms += 1
                    continue
                offered[tool.name] = tool
                if len(offered) == size:
                    return

    def _shuffled(self, tools: Sequence[Tool], count: int) -> Iterator[Tool]:
        """Yield all in random order; some twice, as all are shuffled only where a few draws do not do."""
        if len(tools) > count:
            yield from self._random.choices(tools, k=2 * count)
        yield from self._random.sample(tools, len(tools))


def _are_alike(one: Tool, other: Tool) -> bool:
    """Tell whether tools of two servers do the same; those of one server are meant to be told apart."""
    if one.server and one.server == other.server:
        return False
    if fuzz.ratio(one.words, other.words, score_cutoff=_ALIKE):
        return True
    described = len(one.description) > 20 and len(other.description) > 20
    return described and bool(fuzz.ratio(one.description, other.description, score_cutoff=_ALIKE))
