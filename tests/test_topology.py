import pytest

from mcp_lora.engine import topology
from mcp_lora.engine.topology import World, share_batch
from mcp_lora.errors import McpLoraError


def sizes(per_device: int, accumulated: int) -> dict[str, int]:
    return {"per_device_train_batch_size": per_device, "gradient_accumulation_steps": accumulated}


RECIPE = sizes(16, 8)


@pytest.mark.parametrize(
    ("processes", "per_device", "accumulated"),
    [(1, 16, 8), (2, 16, 4), (4, 16, 2), (8, 16, 1), (16, 8, 1), (128, 1, 1)],
)
def test_the_batch_is_the_same_on_any_number_of_gpus(
    processes: int, per_device: int, accumulated: int
) -> None:
    words = f"batch 128 = {per_device} per device × {accumulated} accumulated × {processes} processes"
    assert share_batch(RECIPE, processes) == (sizes(per_device, accumulated), words)


@pytest.mark.parametrize(("processes", "batch"), [(3, 126), (5, 130), (6, 132), (7, 126), (256, 256)])
def test_a_batch_that_is_not_divided_is_rounded_and_said(processes: int, batch: int) -> None:
    keys, words = share_batch(RECIPE, processes)
    made = keys["per_device_train_batch_size"] * keys["gradient_accumulation_steps"] * processes
    assert made == batch and words.startswith(f"warning: batch {batch} = ")
    assert words.endswith(f"as {processes} do not divide 128")


def test_another_batch_can_be_wanted() -> None:
    assert share_batch(RECIPE, 4, 256)[0] == sizes(16, 4)
    assert share_batch(RECIPE, 1, 4)[0] == sizes(4, 1)
    assert share_batch({}, 2)[0] == sizes(4, 1)  # the engine's defaults


@pytest.mark.parametrize("value", ["two", 0, -1, 1.5, True])
def test_a_batch_that_is_no_number_is_refused(value: object) -> None:
    for key in RECIPE:
        with pytest.raises(McpLoraError, match=f"{key}={value} is no .*mcp-lora train {key}="):
            share_batch(RECIPE | {key: value}, 1)


def test_a_worker_belongs_to_its_launchers_world() -> None:
    assert topology.worker_rank({}) is None
    assert topology.worker_rank({"RANK": "0"}) is None  # a scheduler's, not a launcher's
    launched = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "NPROC_PER_NODE": "2"}
    assert topology.find(launched, 2) == World(4, rank=3)
    assert not topology.find(launched, 2).leads


def test_one_machine_trains_on_the_gpus_that_it_shows() -> None:
    assert [topology.find({}, visible) for visible in (0, 4)] == [World(1), World(4)]
    assert topology.find({"NPROC_PER_NODE": "2"}, 4) == World(2)
    assert topology.find({"NPROC_PER_NODE": "2"}, 4, gpus=3) == World(3)
    with pytest.raises(McpLoraError, match="shows 4 GPUs, not 5 .*mcp-lora train --gpus 5 --dry-run"):
        topology.find({}, 4, gpus=5)


def test_several_machines_meet_at_the_first() -> None:
    second = World(8, 2, 1, ("10.0.0.1", "29500"))
    assert second.processes == 16 and not second.leads
    assert topology.find({}, 8, nodes=2, node_rank=1, master="10.0.0.1") == second
    variables = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
    assert topology.find(variables, 8) == second
    found = topology.find(variables | {"MASTER_ADDR": "fe80::1"}, 8)
    assert found.master == ("fe80::1", "29500")
    found = topology.find(variables, 8, node_rank=0, master="other:1")
    assert found == World(8, 2, 0, ("other", "1")) and found.leads


@pytest.mark.parametrize(
    ("environment", "options", "said"),
    [
        ({}, {"nodes": 2}, "--nodes 2 --node-rank 0 --master HOST:PORT"),
        ({"MASTER_ADDR": "a"}, {"nodes": 2, "node_rank": 2}, "the ranks are 0 to 1, not 2"),
        ({"NNODES": "two"}, {}, "NNODES=two"),
    ],
)
def test_a_world_that_cannot_be_is_refused(
    environment: dict[str, str], options: dict[str, int], said: str
) -> None:
    with pytest.raises(McpLoraError, match=said):
        topology.find(environment, 1, **options)
