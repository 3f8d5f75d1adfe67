"""What a question is asked for, training or one of the tests, and with which tools on offer."""

import hashlib
import random
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

from mcp_lora.catalogue import Catalogue
from mcp_lora.records import Tool

if TYPE_CHECKING:
    import numpy

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


class Question(NamedTuple):
    """What tools are drawn for.

    Attributes:
        own: the tools that the row brings.
        called: the names of those that are called; none where the right answer is not to call.
        content: a hash of the row, of 64 bits, which draws: other rows may come and go.
        unseen_server: this tests a held-out server, whose tools may then be offered.
    """

    own: Sequence[Offer]
    called: Collection[str]
    content: int
    unseen_server: bool = False


class Drawn(NamedTuple):
    """What a question is offered: the tools that are called, and the distractors, nearest first.

    `order` is a shuffle of the places in the two together, or of more: each tool is equally likely to
    stand in any place, with fewer distractors too.
    """

    right: list[Offer]
    distractors: list[Offer]
    order: list[int]

    def offered(self) -> list[Offer]:
        """Return the tools in the order in which they are offered."""
        offers = self.right + self.distractors
        count = len(offers)
        return [offers[place] for place in self.order if place < count]


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

    def draw(self, questions: Sequence[Question], count: int) -> list[Drawn]:
        """Draw `count` tools in all for each question.

        A row that brings more tools than it calls is offered these first. Otherwise half of the
        distractors are of the right tool's server, where it has them, and the rest of others.
        """
        tries = 2 * (count + _SPARE)
        most = max([count, *(len(question.called) for question in questions)])
        numbers = _random([question.content for question in questions], tries + most)
        orders = numbers[:, tries:].argsort(axis=1).tolist()
        return [
            Drawn(*self._draw(question, count, iter(drawn)), order)
            for question, drawn, order in zip(questions, numbers[:, :tries].tolist(), orders, strict=True)
        ]

    def _draw(self, question: Question, count: int, drawn: Iterator[int]) -> tuple[list[Offer], list[Offer]]:
        own, called, content, unseen_server = question
        right: list[Offer] = []
        near: list[Offer] = []
        for tool in own:
            (right if self._name(tool) in called else near).append(tool)
        wanted = share = max(count - len(right), 0)
        if right and not near:
            server = self._of(right[0]).server
            near = list(self._by_server.get(server, [])) if server else []
            share = (wanted + 1) // 2
        others = self._seen if right else []
        all_may = unseen_server or not self._holds_out
        taken = set(called)
        found: list[Offer] = []
        self._take(share, _shuffled(near, drawn), found, taken, all_may)
        if others and len(found) < wanted:
            size = len(others)
            some = [others[number % size] for number in islice(drawn, wanted - len(found) + _SPARE)]
            self._take(wanted, some, found, taken, True)
        if len(found) < wanted:  # so few tools, or so many of one name, that all have to be tried
            shuffle = random.Random(content)
            self._take(share, shuffle.sample(near, len(near)), found, taken, all_may)
            self._take(wanted, shuffle.sample(others, len(others)), found, taken, True)
            self._take(wanted, near, found, taken, all_may)
        return right, found

    def _take(
        self, count: int, offers: Iterable[Offer], found: list[Offer], taken: set[str], all_may: bool
    ) -> None:
        """Add offers until `count` are found: those that may be offered, of names that are not taken yet."""
        missing = count - len(found)
        if missing <= 0:
            return
        names = self._names
        for offer in offers:
            name = names[offer] if isinstance(offer, int) else offer.name
            if name not in taken and (all_may or self._may_be_offered(offer)):
                taken.add(name)
                found.append(offer)
                missing -= 1
                if not missing:
                    return

    def _may_be_offered(self, offer: Offer) -> bool:
        return offer in self._may_be_seen if isinstance(offer, int) else not self._held_out(offer)

    def _name(self, offer: Offer) -> str:
        return self._names[offer] if isinstance(offer, int) else offer.name

    def _held_out(self, tool: Tool) -> bool:
        return self._split.server(tool.server) or self._split.tool(tool.server, tool.name)

    def _of(self, offer: Offer) -> Tool:
        return self._tools[offer] if isinstance(offer, int) else offer


def _shuffled(offers: list[Offer], drawn: Iterator[int]) -> Iterator[Offer]:
    """Shuffle a list as far as it is asked for, and as there are numbers (Fisher and Yates)."""
    for left in range(len(offers), 0, -1):
        number = next(drawn, None)
        if number is None:
            return
        place = number % left
        offer = offers[place]
        offers[place] = offers[left - 1]
        offers[left - 1] = offer
        yield offer


def _random(seeds: list[int], count: int) -> "numpy.ndarray[Any, Any]":
    """Return `count` random numbers of 32 bits for each seed of 64, (seeds, count): what SplitMix64 gives.

    Steele, Lea and Flood, Fast splittable pseudorandom number generators, OOPSLA 2014, figure 17. A
    generator a row would take longer to seed than to draw with.
    """
    import numpy

    steps = numpy.arange(1, count + 1, dtype=numpy.uint64) * numpy.uint64(0x9E3779B97F4A7C15)
    mixed = numpy.array(seeds, numpy.uint64)[:, None] + steps
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> numpy.uint64(shift))) * numpy.uint64(factor)
    found: numpy.ndarray[Any, Any] = (mixed ^ (mixed >> numpy.uint64(31))) >> numpy.uint64(32)
    return found
