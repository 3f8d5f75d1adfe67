from collections import Counter

import pytest

from mcp_lora.data.catalogue import Catalogue
from mcp_lora.data.records import Tool
from mcp_lora.data.sampling import Pool, Split

NOTHING = Split(0, 0, 0, 1)
SERVERS = {f"s{i}": [f"s{i}_{k}" for k in range(8)] for i in range(30)}


def pool(tools: dict[str, list[str]], split: Split = NOTHING) -> tuple[Pool, list[Tool]]:
    catalogue = Catalogue()
    for server, names in tools.items():
        for name in names:
            catalogue.number(Tool(server, name, "", {"type": "object", "properties": {}}))
    return Pool(catalogue, split), catalogue.tools


def names(sampled: list[Tool]) -> list[str]:
    return [tool.name for tool in sampled]


def test_half_of_the_distractors_are_of_the_gold_tools_server() -> None:
    tools, (gold, *_) = pool(SERVERS)
    for content in range(100):
        sampled = tools.sample([gold], {"s0_0"}, 10, content)
        assert gold in sampled and len(set(names(sampled))) == len(sampled) == 10
        mates = [tool.server for tool in sampled].count("s0") - 1
        assert 5 <= mates <= 7  # the others are sampled of all servers
        assert tools.sample([gold], {"s0_0"}, 10, content) == sampled


def test_every_place_and_every_tool_is_equally_likely() -> None:
    tools, (gold, *others) = pool(SERVERS)
    samples = [names(tools.sample([gold], {"s0_0"}, 10, content=k * 7919)) for k in range(10_000)]
    places = Counter(sampled.index("s0_0") for sampled in samples)
    assert sorted(places) == list(range(10))
    assert all(850 < count < 1150 for count in places.values())  # 5 standard deviations
    counts = Counter(name for sampled in samples for name in sampled)
    mates, far = ([counts[tool.name] for tool in some] for some in (others[:7], others[7:]))
    assert min(mates) > 0.9 * max(mates)
    assert min(far) > 0.5 * max(far)


def test_no_two_tools_of_one_name() -> None:
    tools, (gold, *_) = pool({f"s{i}": ["search", f"other{i % 3}"] for i in range(50)})
    for content in range(100):
        sampled = tools.sample([gold], {"search"}, 10, content)
        assert gold in sampled and sorted(names(sampled)) == ["other0", "other1", "other2", "search"]


def test_a_tool_that_does_what_the_gold_tool_does_is_no_distractor() -> None:
    catalogue = Catalogue()
    schema = {"type": "object", "properties": {}}
    text = "Converts an amount from one currency to another at the rate of the day"
    described = {
        "currency_convert": "",
        "convertCurrency": "",
        "exchange": f"{text}.",
        "translate": "Translates a text",
        "查询天气": "",
    }
    for name, description in described.items():
        catalogue.number(Tool(f"of {name}", name, description, schema))
    gold = Tool("bank", "convert_currency", text, schema)
    chinese = Tool("bank", "预订酒店", "", schema)
    sibling = Tool("bank", "convert_currencies", text, schema)
    for tool in (gold, sibling):
        catalogue.number(tool)
    tools = Pool(catalogue, NOTHING)
    sampled = names(tools.sample([gold], {"convert_currency"}, 10, content=1))
    assert sorted(sampled) == ["convert_currencies", "convert_currency", "translate", "查询天气"]
    assert "查询天气" in names(tools.sample([chinese], {"预订酒店"}, 10, content=1))


def test_a_small_pool_is_sampled_whole() -> None:
    tools, (gold, *_) = pool({"s": ["a", "b", "c", "d", "e"]})
    assert sorted(names(tools.sample([gold], {"a"}, 10, content=1))) == ["a", "b", "c", "d", "e"]
    assert tools.sample([gold], {"a"}, 1, content=1) == [gold]


@pytest.mark.parametrize(
    ("brought", "called", "count", "own", "others"),
    [(4, 2, 6, 4, 2), (4, 1, 3, 3, 0), (30, 12, 10, 12, 0), (2, 0, 10, 2, 0)],
    ids=["more wanted", "enough", "more calls than candidates", "no call, so nothing is added"],
)
def test_a_rows_own_tools_come_first(brought: int, called: int, count: int, own: int, others: int) -> None:
    tools, _ = pool(SERVERS)
    row = [Tool("", f"own{k}", "", {}) for k in range(brought)]
    gold = {f"own{k}" for k in range(called)}
    found = names(tools.sample(row, gold, count, content=1))
    mine = {name for name in found if name.startswith("own")}
    assert gold <= mine and (len(mine), len(found)) == (own, own + others)


def test_what_is_held_out_is_no_candidate() -> None:
    split = Split(0.2, 0.2, 0, 5)
    tools, known = pool(SERVERS, split)
    held_out = {
        tool.name for tool in known if split.server(tool.server) or split.tool(tool.server, tool.name)
    }
    assert 20 < len(held_out) < 160
    seen = next(tool for tool in known if tool.name not in held_out)
    sampled = {name for k in range(500) for name in names(tools.sample([seen], {seen.name}, 10, k))}
    assert len(sampled) > 50 and not sampled & held_out
    # a row's own definition of a held-out tool neither
    gone = next(tool for tool in known if tool.name in held_out)
    again = Tool(gone.server, gone.name, "as the row has it", {})
    assert again not in tools.sample([seen, again], {seen.name}, 2, 1)


def test_a_held_out_server_is_tested_among_its_own_tools() -> None:
    split = Split(0.5, 0, 0, 5)
    tools, known = pool(SERVERS, split)
    gold = next(tool for tool in known if split.server(tool.server))
    servers = Counter(tool.server for tool in tools.sample([gold], {gold.name}, 10, 1, unseen_server=True))
    assert servers.pop(gold.server) == 6 and servers.total() == 4
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


def test_a_tool_of_the_first_gold_tools_server_does_not_do_what_another_gold_tool_does() -> None:
    """Parallel calls of two servers: s0 also has a tool that does the same as s1's."""
    tools, known = pool({"s0": ["add", "weather_get", "echo"], "s1": ["get_weather"]})
    gold = [tool for tool in known if tool.name in ("add", "get_weather")]
    for content in range(50):
        sampled = names(tools.sample(gold, {"add", "get_weather"}, 4, content))
        assert sorted(sampled) == ["add", "echo", "get_weather"]
