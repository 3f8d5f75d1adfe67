"""What a question is asked for, training or one of the tests, and with which candidate tools."""

import hashlib
import random
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace

from mcp_lora.catalogue import Catalogue
from mcp_lora.records import Tool

Offer = int | Tool  # a tool of the catalogue by its number, or a row's own definition


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


class Pool:
    """The tools of a catalogue, to sample candidates from."""

    def __init__(self, catalogue: Catalogue, split: Split) -> None:
        self._tools = catalogue.tools
        self._by_server = catalogue.by_server
        self._split = split
        self._held_out = {number for number, tool in enumerate(self._tools) if self._is_held_out(tool)}
        self._seen = [number for number in range(len(self._tools)) if number not in self._held_out]

    def sample(
        self, own: Sequence[Offer], called: set[str], count: int, content: int, unseen_server: bool = False
    ) -> list[Offer]:
        """Sample the candidate tools of one question, the gold tools among them, in random order.

        A row that brings more tools than it calls has these as distractors first. Otherwise half of the
        distractors are of the gold tool's server, where it has them, and the rest of others.

        Args:
            own: the tools that the row brings.
            called: the names of those that are called; none where the right answer is not to call.
            count: how many candidates in all.
            content: a hash of the row, which seeds: other rows may come and go.
            unseen_server: this tests a held-out server, whose tools may then be distractors.
        """
        random_ = random.Random(content)
        gold = [offer for offer in own if self._of(offer).name in called]
        near = [offer for offer in own if self._of(offer).name not in called]
        wanted = share = max(count - len(gold), 0)
        if gold and not near:
            server = self._of(gold[0]).server
            near = list(self._by_server.get(server, [])) if server else []
            share = (wanted + 1) // 2
        taken = set(called)
        distractors = self._take(random_, near, share, taken, unseen_server)
        if gold:
            distractors += self._take(random_, self._seen, wanted - len(distractors), taken, True)
        distractors += self._take(random_, near, wanted - len(distractors), taken, unseen_server)
        offered = gold + distractors
        return sorted(offered, key=lambda offer: random_.random())

    def _take(
        self, random_: random.Random, offers: Sequence[Offer], count: int, taken: set[str], all_may: bool
    ) -> list[Offer]:
        """Take up to `count` tools that may be distractors, of names that are not taken yet."""
        found: list[Offer] = []
        for offer in _shuffled(random_, offers, count) if count > 0 else ():
            tool = self._of(offer)
            if tool.name not in taken and (all_may or not self._is_held_out(offer)):
                taken.add(tool.name)
                found.append(offer)
                if len(found) == count:
                    break
        return found

    def _is_held_out(self, offer: Offer) -> bool:
        if isinstance(offer, int):
            return offer in self._held_out
        return self._split.server(offer.server) or self._split.tool(offer.server, offer.name)

    def _of(self, offer: Offer) -> Tool:
        return self._tools[offer] if isinstance(offer, int) else offer


def _shuffled(random_: random.Random, offers: Sequence[Offer], count: int) -> Iterator[Offer]:
    """Yield all in random order; some twice, as all are shuffled only where a few draws do not suffice."""
    if len(offers) > count:
        yield from random_.choices(offers, k=2 * count)
    yield from random_.sample(offers, len(offers))
