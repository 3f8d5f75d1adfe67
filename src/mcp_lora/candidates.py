"""What a question is asked for, training or one of the tests, and with which tools on offer."""

import hashlib
import random
from array import array
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import NamedTuple, Self

from mcp_lora.catalogue import Catalogue
from mcp_lora.records import Tool

Offer = int | Tool  # a tool of the catalogue by its number, or a row's own definition

_SPARE = 4  # draws beyond what is wanted: some hit a name that is taken


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


class Drawn(NamedTuple):
    """What a question is offered: the tools that are called, and the distractors, nearest first.

    `order` has the places in the two together, shuffled: each tool is equally likely to stand anywhere.
    """

    right: list[Offer]
    distractors: list[Offer]
    order: list[int]

    def offered(self) -> list[Offer]:
        """Return the tools in the order in which they are offered."""
        offers = self.right + self.distractors
        return [offers[place] for place in self.order]

    def only(self, kept: Sequence[int]) -> Self:
        """Return it with the distractors in these places only, in the same order."""
        if len(kept) == len(self.distractors):
            return self
        first = len(self.right)
        places = [*range(first), *(first + place for place in kept)]
        moved = {before: now for now, before in enumerate(places)}
        order = [moved[place] for place in self.order if place in moved]
        return self._replace(distractors=[self.distractors[place] for place in kept], order=order)

    def without_right(self) -> Self:
        """Return it without the tools that are called, the others in the same order."""
        gone = len(self.right)
        return self._replace(right=[], order=[place - gone for place in self.order if place >= gone])


class Pool:
    """The tools of a catalogue, to draw candidates from."""

    def __init__(self, catalogue: Catalogue, split: Split) -> None:
        self._tools = catalogue.tools
        self._names = [tool.name for tool in catalogue.tools]
        self._by_server = catalogue.by_server
        self._split = split
        self._holds_out = bool(split.servers or split.tools)
        self._seen = [number for number, tool in enumerate(self._tools) if not self._held_out(tool)]
        self._may_be_seen = set(self._seen)

    def draw(
        self, own: Sequence[Offer], called: set[str], count: int, content: int, unseen_server: bool = False
    ) -> Drawn:
        """Draw what one question is offered.

        A row that brings more tools than it calls is offered these first. Otherwise half of the
        distractors are of the right tool's server, where it has them, and the rest of others.

        Args:
            own: the tools that the row brings.
            called: the names of those that are called; none where the right answer is not to call.
            count: how many tools to offer in all.
            content: a hash of the row, which draws: other rows may come and go.
            unseen_server: this tests a held-out server, whose tools may then be offered.
        """
        right: list[Offer] = []
        near: list[Offer] = []
        for tool in own:
            (right if self._name(tool) in called else near).append(tool)
        wanted = share = max(count - len(right), 0)
        if right and not near:
            server = self._of(right[0]).server
            near = list(self._by_server.get(server, [])) if server else []
            share = (wanted + 1) // 2
        # A generator would take longer to seed than this takes to draw.
        size = len(near) + 2 * wanted + len(right) + _SPARE
        drawn = iter(array("I", hashlib.shake_128(content.to_bytes(8)).digest(4 * size)))
        shuffled = _shuffled(near, drawn)
        taken = set(called)
        distractors = self._take(share, shuffled, taken, unseen_server)
        missing = wanted - len(distractors)
        if right and self._seen and missing:
            size = len(self._seen)
            some = [self._seen[number % size] for number in islice(drawn, missing + _SPARE)]
            distractors += self._take(missing, some, taken, True)
            if len(distractors) < wanted:  # so few tools, or so many of one name, that all have to be tried
                everything = random.Random(content).sample(self._seen, size)
                distractors += self._take(wanted - len(distractors), everything, taken, True)
        distractors += self._take(wanted - len(distractors), shuffled, taken, unseen_server)
        numbers = list(islice(drawn, len(right) + len(distractors)))
        return Drawn(right, distractors, sorted(range(len(numbers)), key=numbers.__getitem__))

    def _take(self, count: int, offers: Iterable[Offer], taken: set[str], all_may: bool) -> list[Offer]:
        """Take up to `count` of the offers that may be offered, of names that are not taken yet."""
        found: list[Offer] = []
        if count > 0:
            names, all_may = self._names, all_may or not self._holds_out
            for offer in offers:
                name = names[offer] if isinstance(offer, int) else offer.name
                if name not in taken and (all_may or self._may_be_offered(offer)):
                    taken.add(name)
                    found.append(offer)
                    if len(found) == count:
                        break
        return found

    def _may_be_offered(self, offer: Offer) -> bool:
        return offer in self._may_be_seen if isinstance(offer, int) else not self._held_out(offer)

    def _name(self, offer: Offer) -> str:
        return self._names[offer] if isinstance(offer, int) else offer.name

    def _held_out(self, tool: Tool) -> bool:
        return self._split.server(tool.server) or self._split.tool(tool.server, tool.name)

    def _of(self, offer: Offer) -> Tool:
        return self._tools[offer] if isinstance(offer, int) else offer


def _shuffled(offers: list[Offer], drawn: Iterator[int]) -> Iterator[Offer]:
    """Shuffle a list as far as it is asked for (Fisher and Yates)."""
    for left in range(len(offers), 0, -1):
        place = next(drawn) % left
        offers[place], offers[left - 1] = offers[left - 1], offers[place]
        yield offers[left - 1]
