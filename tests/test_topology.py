import sys
from pathlib import Path

import pytest
from conftest import ROOT, run

from mcp_lora.engine import topology
from mcp_lora.engine.topology import Topology
from mcp_lora.errors import McpLoraError


def test_the_first_process_of_a_launch_trains_on_all_gpus_of_its_node() -> None:
    assert topology.launched({}) == {}
    assert topology.launched({"RANK": "0"}) == {}  # a scheduler's, not a launcher's
    deepspeed = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "4", "LOCAL_SIZE": "4", "MASTER_PORT": "29500"}
    variables = {"NPROC_PER_NODE": "4", "NNODES": "1", "NODE_RANK": "0", "MASTER_PORT": "29501"}
    assert topology.launched(deepspeed) == variables
    assert topology.launched(deepspeed | {"RANK": "1", "LOCAL_RANK": "1"}) is None
    assert topology.launched({"RANK": "-1", "LOCAL_RANK": "-1", "WORLD_SIZE": "1"}) == {}
    unknown = topology.launched({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "0"})
    assert unknown and unknown["NPROC_PER_NODE"] == "1"
    torchrun = {
        "RANK": "8",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "16",
        "LOCAL_WORLD_SIZE": "8",
        "MASTER_ADDR": "a",
    }
    found = topology.launched(torchrun)
    assert found is not None
    assert topology.find(torchrun | found, 8) == Topology(8, 2, 1, ("a", "29501"))


def test_a_launchers_variable_that_is_no_number_is_named(tmp_path: Path) -> None:
    launched = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_PORT": "two"}
    done = run([sys.executable, ROOT / "train_lora.py"], tmp_path, **launched)
    assert done.returncode and "MASTER_PORT=two" in done.stderr and "Traceback" not in done.stderr


def test_one_machine_trains_on_the_gpus_that_it_shows() -> None:
    assert [topology.find({}, visible) for visible in (0, 4)] == [Topology(1), Topology(4)]
    assert topology.find({"NPROC_PER_NODE": "2"}, 4) == Topology(2)
    assert topology.find({"NPROC_PER_NODE": "2"}, 4, gpus=3) == Topology(3)
    with pytest.raises(McpLoraError, match="has 4 visible GPUs, not 5 .*mcp-lora train --gpus 5 --dry-run"):
        topology.find({}, 4, gpus=5)


def test_several_machines_meet_at_the_first() -> None:
    second = Topology(8, 2, 1, ("10.0.0.1", "29500"))
    assert second.processes == 16 and not second.is_main
    assert topology.find({}, 8, nodes=2, node_rank=1, master="10.0.0.1") == second
    variables = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
    assert topology.find(variables, 8) == second
    found = topology.find(variables | {"MASTER_ADDR": "fe80::1"}, 8)
    assert found.master == ("fe80::1", "29500")
    found = topology.find(variables, 8, node_rank=0, master="other:1")
    assert found == Topology(8, 2, 0, ("other", "1")) and found.is_main


@pytest.mark.parametrize(
    ("master", "expected"),
    [
        ("a:1", ("a", "1")),
        ("a:", ("a", "29500")),
        ("fe80::1", ("fe80::1", "29500")),
        ("[fe80::1]:2", ("[fe80::1]", "2")),
    ],
)
def test_the_first_node_is_named_with_or_without_a_port(master: str, expected: tuple[str, str]) -> None:
    assert topology.find({}, 8, nodes=2, node_rank=1, master=master).master == expected


@pytest.mark.parametrize(
    ("environment", "options", "said"),
    [
        ({}, {"nodes": 2}, "--nodes 2 --node-rank 0 --master HOST:PORT"),
        ({"MASTER_ADDR": "a"}, {"nodes": 2, "node_rank": 2}, "node ranks are 0 to 1, not 2"),
        ({"NNODES": "two"}, {}, "NNODES=two"),
    ],
)
def test_a_world_that_cannot_be_is_refused(
    environment: dict[str, str], options: dict[str, int], said: str
) -> None:
    with pytest.raises(McpLoraError, match=said):
        topology.find(environment, 1, **options)
