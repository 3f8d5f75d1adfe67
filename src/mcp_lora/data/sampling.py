"""Which questions are held out, and the candidate tools of each."""

import hashlib
import random
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace

from rapidfuzz import fuzz

from mcp_lora.data.catalogue import Catalogue
from mcp_lora.data.records import Tool

_ALIKE = 90  # of 100: similarity of names or descriptions from which two tools count as synonyms


@dataclass(frozen=True)
class Split:
    """The fractions to hold out, from 0 to 1: of servers, of tools, and of the rows of all others.

    Hashes of names and of a row's content decide, so that adding data never moves a held-out question into
    training.
    """

    servers: float
    tools: float
    rows: float
    seed: int

    def within(self, tools: Collection[tuple[str, str]]) -> "Split":
        """Return this split without the fractions that amount to less than one of the servers or tools.

        `tools` are (server, name).
        """
        servers = {server for server, _ in tools if server}
        return replace(
            self,
            servers=self.servers if self.servers * len(servers) >= 1 else 0.0,
            tools=self.tools if self.tools * len(tools) >= 1 else 0.0,
        )

    def server(self, server: str) -> bool:
        """Whether a server is held out; an unknown server never is."""
        return bool(server) and self._below(self.servers, "server", server)

    def tool(self, server: str, name: str) -> bool:
        """Whether a tool is held out, regardless of its server."""
        return self._below(self.tools, "tool", server, name)

    def row(self, content: int) -> bool:
        """Whether a row of a tool that is trained on is held out; `content` is a 64-bit hash."""
        return content < self.rows * 2**64

    def _below(self, fraction: float, *words: str) -> bool:
        if not fraction:
            return False
        key = "\0".join((str(self.seed), *words)).encode(errors="surrogatepass")
        return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest()) < fraction * 2**64


class Pool:
    """The tools of a catalogue, to sample candidates from."""

    def __init__(self, catalogue: Catalogue, split: Split) -> None:
        self._random = random.Random()
        self._by_server = catalogue.by_server
        # A row's own definition of a tool has the same (server, name).
        every = ((tool.server, tool.name) for tool in catalogue.tools)
        self._held_out = {key for key in every if split.server(key[0]) or split.tool(*key)}
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

        The tools that a row brings and does not call are its first distractors. If there are none, half of
        the distractors are from the gold tool's server, if it has enough, and the rest from other servers,
        without those whose name or description is like a gold tool's: calling them would be right, too.

        Args:
            own: the tools that the row brings.
            called: the names of the gold tools; empty if the gold answer is not to call.
            count: total number of candidates.
            content: a hash of the row, used as the seed, so that other rows do not matter.
            unseen_server: the row tests a held-out server, so that held-out tools may be distractors.
        """
        self._random.seed(content)
        gold = [tool for tool in own if tool.name in called]
        near: Sequence[Tool] = [tool for tool in own if tool.name not in called]
        candidates = {tool.name: tool for tool in gold}
        first = size = max(count, len(candidates))
        unlike: Sequence[Tool] = ()
        if gold and not near:
            near, unlike = (self._by_server.get(gold[0].server, []) if gold[0].server else []), gold
            first = (len(candidates) + size + 1) // 2
        excluded = set() if unseen_server else self._held_out
        self._fill(candidates, first, near, excluded, unlike)
        if gold:
            self._fill(candidates, size, self._seen, set(), gold)
        self._fill(candidates, size, near, excluded, unlike)
        return sorted(candidates.values(), key=lambda tool: self._random.random())

    def _fill(
        self,
        candidates: dict[str, Tool],
        size: int,
        tools: Sequence[Tool],
        excluded: set[tuple[str, str]],
        gold: Sequence[Tool] = (),
    ) -> None:
        """Add tools with new names that are not excluded, until there are `size` candidates."""
        if len(candidates) >= size:
            return
        for tool in self._shuffled(tools, size - len(candidates)):
            is_new = tool.name not in candidates and (tool.server, tool.name) not in excluded
            if is_new and not any(are_alike(tool, other) for other in gold):
                candidates[tool.name] = tool
                if len(candidates) == size:
                    return

    def _shuffled(self, tools: Sequence[Tool], count: int) -> Iterator[Tool]:
        """Yield all in random order, some twice: all are shuffled only if a few random picks fail."""
        if len(tools) > count:
            yield from self._random.choices(tools, k=2 * count)
        yield from self._random.sample(tools, len(tools))


def are_alike(one: Tool, other: Tool) -> bool:
    """Tell whether tools of two servers do the same; tools of one server never count as alike."""
    if one.server and one.server == other.server:
        return False
    if fuzz.ratio(one.words, other.words, score_cutoff=_ALIKE):
        return True
    described = len(one.description) > 20 and len(other.description) > 20
    return described and bool(fuzz.ratio(one.description, other.description, score_cutoff=_ALIKE))
