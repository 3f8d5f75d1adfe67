from collections import Counter

from mcp_lora.candidates import Offer, Pool, Split
from mcp_lora.catalogue import Catalogue
from mcp_lora.records import Tool

NOTHING = Split(0, 0, 0, 1)


def pool(tools: dict[str, list[str]], split: Split = NOTHING) -> tuple[Pool, Catalogue]:
    catalogue = Catalogue()
    for server, names in tools.items():
        for name in names:
            catalogue.number(Tool(server, name, "", {"type": "object", "properties": {}}))
    return Pool(catalogue, split), catalogue


SERVERS = {f"s{i}": [f"s{i}_{k}" for k in range(8)] for i in range(30)}


def test_half_of_the_distractors_are_of_the_gold_tools_server() -> None:
    tools, catalogue = pool(SERVERS)
    for content in range(100):
        sampled = tools.sample([0], {"s0_0"}, 10, content)
        assert 0 in sampled and len(set(sampled)) == len(sampled) == 10
        servers = [catalogue.tools[tool].server for tool in sampled if isinstance(tool, int)]
        assert 5 <= servers.count("s0") - 1 <= 7  # the others are sampled of all servers
        assert tools.sample([0], {"s0_0"}, 10, content) == sampled


def test_every_place_and_every_tool_is_equally_likely() -> None:
    tools, catalogue = pool(SERVERS)
    samples = [tools.sample([0], {"s0_0"}, 10, content=k * 7919) for k in range(10_000)]
    places = Counter(sampled.index(0) for sampled in samples)
    assert sorted(places) == list(range(10))
    assert all(850 < count < 1150 for count in places.values())  # 5 standard deviations
    sampled = Counter(tool for tools_ in samples for tool in tools_)
    mates = [sampled[number] for number in catalogue.by_server["s0"][1:]]
    others = [sampled[number] for number in range(8, len(catalogue.tools))]
    assert min(mates) > 0.9 * max(mates)
    assert min(others) > 0.5 * max(others)


def test_no_two_tools_of_one_name() -> None:
    tools, catalogue = pool({f"s{i}": ["search", f"other{i % 3}"] for i in range(50)})
    for content in range(100):
        sampled = tools.sample([0], {"search"}, 10, content)
        names = [catalogue.tools[tool].name for tool in sampled if isinstance(tool, int)]
        assert 0 in sampled and sorted(names) == ["other0", "other1", "other2", "search"]


def test_a_small_pool_is_sampled_whole() -> None:
    tools, _ = pool({"s": ["a", "b", "c", "d", "e"]})
    assert set(tools.sample([0], {"a"}, 10, content=1)) == {0, 1, 2, 3, 4}
    assert tools.sample([0], {"a"}, 1, content=1) == [0]


def test_a_rows_own_tools_come_first() -> None:
    tools, _ = pool(SERVERS)
    own: list[Offer] = [Tool("", f"own{k}", "", {}) for k in range(30)]

    def sampled(own: list[Offer], called: int, count: int) -> tuple[set[str], int]:
        """The names of the row's own tools, and the number of others."""
        found = tools.sample(own, {f"own{k}" for k in range(called)}, count, content=1)
        mine = [tool.name for tool in found if isinstance(tool, Tool)]
        assert len(mine) == len(set(mine))
        return set(mine), len(found) - len(mine)

    assert sampled(own[:4], 2, 6) == ({"own0", "own1", "own2", "own3"}, 2)
    mine, others = sampled(own[:4], 1, 3)
    assert "own0" in mine and (len(mine), others) == (3, 0)
    # more calls than candidates were asked for
    assert sampled(own, 12, 10) == ({f"own{k}" for k in range(12)}, 0)


def test_where_nothing_is_to_be_called_nothing_is_added() -> None:
    tools, _ = pool(SERVERS)
    assert sorted(tools.sample([0, 1], set(), 10, content=1)) == [0, 1]


def test_what_is_held_out_is_no_candidate() -> None:
    split = Split(0.2, 0.2, 0, 5)
    tools, catalogue = pool(SERVERS, split)
    held_out = {
        number
        for number, tool in enumerate(catalogue.tools)
        if split.server(tool.server) or split.tool(tool.server, tool.name)
    }
    assert 20 < len(held_out) < 160
    seen = next(number for number in range(len(catalogue.tools)) if number not in held_out)
    name = catalogue.tools[seen].name
    sampled = {tool for content in range(500) for tool in tools.sample([seen], {name}, 10, content)}
    assert len(sampled) > 50 and not sampled & held_out
    # a row's own definition of a held-out tool neither
    gone = catalogue.tools[min(held_out)]
    again = Tool(gone.server, gone.name, "as the row has it", {})
    assert again not in tools.sample([seen, again], {name}, 2, 1)


def test_a_held_out_server_is_tested_among_its_own_tools() -> None:
    split = Split(0.5, 0, 0, 5)
    tools, catalogue = pool(SERVERS, split)
    server = next(server for server in SERVERS if split.server(server))
    gold = catalogue.by_server[server][0]
    sampled = tools.sample([gold], {f"{server}_0"}, 10, 1, unseen_server=True)
    servers = Counter(catalogue.tools[tool].server for tool in sampled if isinstance(tool, int))
    assert servers.pop(server) == 6 and servers.total() == 4
    assert not any(map(split.server, servers))


def test_shares_are_kept_and_names_alone_decide() -> None:
    split = Split(0.1, 0.3, 0.2, 42)
    assert 70 < sum(split.server(f"server {k}") for k in range(1000)) < 130
    assert 250 < sum(split.tool("s", f"tool {k}") for k in range(1000)) < 350
    assert not split.server("")
    assert [split.tool("s", "a"), split.tool("s", "b")] == [split.tool("s", "a"), split.tool("s", "b")]
    assert Split(0.1, 0.3, 0.2, 43) != split
    other = Split(0.1, 0.3, 0.2, 43)
    assert [split.tool("s", str(k)) for k in range(99)] != [other.tool("s", str(k)) for k in range(99)]


def test_a_share_of_less_than_one_is_too_little() -> None:
    tools = [(f"s{k % 9}", f"t{k}") for k in range(18)]
    assert Split(0.1, 0.1, 0.1, 1).within(tools) == Split(0, 0.1, 0.1, 1)
    assert Split(0.12, 0.05, 0.1, 1).within(tools) == Split(0.12, 0, 0.1, 1)
