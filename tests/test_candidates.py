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


def test_half_of_the_distractors_are_the_right_tools_mates() -> None:
    tools, catalogue = pool(SERVERS)
    right, distractors, _ = tools.draw([0], {"s0_0"}, 10, content=7)
    servers = [catalogue.tools[tool].server for tool in distractors if isinstance(tool, int)]
    assert right == [0]
    assert servers[:5] == ["s0"] * 5  # the nearest first
    assert "s0" not in servers[5:] and len(servers) == 9


def test_every_place_is_equally_likely() -> None:
    tools, _ = pool(SERVERS)
    places = Counter(
        tools.draw([0], {"s0_0"}, 10, content=k * 7919).offered().index(0) for k in range(10_000)
    )
    assert sorted(places) == list(range(10))
    assert all(850 < count < 1150 for count in places.values())  # 5 standard deviations


def test_every_tool_is_drawn_equally_often() -> None:
    tools, catalogue = pool(SERVERS)
    drawn = Counter(
        tool for k in range(4000) for tool in tools.draw([0], {"s0_0"}, 10, content=k * 7919).distractors
    )
    mates = [drawn[number] for number in catalogue.by_server["s0"][1:]]
    others = [drawn[number] for number in range(8, len(catalogue.tools))]
    assert min(mates) > 0.9 * max(mates)
    assert min(others) > 0 and max(others) < 2 * 4000 * 4 / len(others)


def test_no_two_tools_of_one_name() -> None:
    tools, catalogue = pool({f"s{i}": ["search", f"other{i % 3}"] for i in range(50)})
    for content in range(100):
        _, distractors, _ = tools.draw([0], {"search"}, 10, content)
        names = [catalogue.tools[tool].name for tool in distractors if isinstance(tool, int)]
        assert sorted(names) == ["other0", "other1", "other2"]


def test_a_small_pool_is_offered_whole() -> None:
    tools, _ = pool({"s": ["a", "b", "c", "d", "e"]})
    _, distractors, _ = tools.draw([0], {"a"}, 10, content=1)
    assert sorted(tool for tool in distractors if isinstance(tool, int)) == [1, 2, 3, 4]
    assert tools.draw([0], {"a"}, 1, content=1).distractors == []


def test_every_tool_is_offered_once_and_what_is_left_out_moves_no_other() -> None:
    tools, _ = pool(SERVERS)
    own: list[Offer] = [Tool("", f"own{k}", "", {}) for k in range(30)]
    for drawn in (
        *(tools.draw([8 * k], {f"s{k}_0"}, 10, content=k) for k in range(30)),
        tools.draw(own, {f"own{k}" for k in range(12)}, 10, 5),  # more calls than tools were asked for
    ):
        offered = drawn.offered()
        assert sorted(map(offered.index, drawn.right + drawn.distractors)) == list(range(len(offered)))
        for some, kept in (
            (drawn.only([0, 2, 3][: len(drawn.distractors)]), drawn.distractors[:1] + drawn.distractors[2:4]),
            (drawn.without_right(), drawn.distractors),
        ):
            assert some.distractors == kept
            assert some.offered() == [tool for tool in offered if tool in some.right + kept]
    assert len(drawn.right) == 12 and not drawn.distractors


def test_a_rows_own_tools_are_offered_first() -> None:
    tools, _ = pool(SERVERS)
    own: list[Offer] = [Tool("", f"own{k}", "", {}) for k in range(4)]
    right, distractors, _ = tools.draw(own, {"own0", "own1"}, 6, content=1)
    assert right == own[:2]
    assert {tool.name for tool in distractors[:2] if isinstance(tool, Tool)} == {"own2", "own3"}
    assert len(distractors) == 4
    _, fewer, _ = tools.draw(own, {"own0"}, 3, content=1)
    assert len(fewer) == 2 and all(isinstance(tool, Tool) for tool in fewer)


def test_where_nothing_is_to_be_called_nothing_is_added() -> None:
    tools, _ = pool(SERVERS)
    right, distractors, _ = tools.draw([0, 1], set(), 10, content=1)
    assert right == [] and sorted(tool for tool in distractors if isinstance(tool, int)) == [0, 1]


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
    drawn = {
        tool
        for content in range(500)
        for tool in tools.draw([seen], {catalogue.tools[seen].name}, 10, content).distractors
    }
    assert len(drawn) > 50 and not drawn & held_out
    # a row's own definition of a held-out tool neither
    gone = catalogue.tools[min(held_out)]
    again = Tool(gone.server, gone.name, "as the row has it", {})
    assert tools.draw([seen, again], {catalogue.tools[seen].name}, 2, 1).distractors[0] != again


def test_a_held_out_server_is_tested_among_its_own_tools() -> None:
    split = Split(0.5, 0, 0, 5)
    tools, catalogue = pool(SERVERS, split)
    server = next(server for server in SERVERS if split.server(server))
    right = catalogue.by_server[server][0]
    _, distractors, _ = tools.draw([right], {f"{server}_0"}, 10, 1, unseen_server=True)
    servers = [catalogue.tools[tool].server for tool in distractors if isinstance(tool, int)]
    assert servers[:5] == [server] * 5
    assert not any(map(split.server, servers[5:]))


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
