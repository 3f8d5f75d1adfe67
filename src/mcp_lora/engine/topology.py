"""The topology of a training: the nodes, and the processes on each."""

from collections.abc import Mapping
from dataclasses import dataclass

from mcp_lora.errors import McpLoraError

_PORT = "29500"  # torchrun's own default


@dataclass(frozen=True)
class Topology:
    """The processes of one training: `per_node` on each of `nodes` nodes, one per GPU.

    `node_rank` is this node's, from 0; `master` is the first node's (host, port), None if there is only one.
    """

    per_node: int = 1
    nodes: int = 1
    node_rank: int = 0
    master: tuple[str, str] | None = None

    @property
    def processes(self) -> int:
        """Total number of processes."""
        return self.per_node * self.nodes

    @property
    def is_main(self) -> bool:
        """Whether this node writes files for all."""
        return not self.node_rank


def find(
    environment: Mapping[str, str],
    visible: int,
    gpus: int | None = None,
    nodes: int | None = None,
    node_rank: int | None = None,
    master: str | None = None,
    command: str | None = None,
) -> Topology:
    """Return the topology that the options, or else LLaMA-Factory's variables, describe.

    `visible` is the number of GPUs on this machine, `master` is HOST:PORT of the first node, `command` what
    to run instead of a training if there are fewer GPUs.

    Raises McpLoraError if there are fewer GPUs, the first node is not named, or node_rank is out of range.
    """
    if gpus and gpus > visible:
        what = f"this machine has {visible} visible GPUs, not {gpus} (CUDA_VISIBLE_DEVICES, nvidia-smi)"
        plan = f"omit --gpus, or plan for {gpus}: mcp-lora train --gpus {gpus} --dry-run"
        raise McpLoraError(f"{what}: " + (f"omit --gpus: {command}" if command else plan))
    per_node = gpus or _number(environment, "NPROC_PER_NODE") or visible or 1
    nodes = nodes or _number(environment, "NNODES") or 1
    if node_rank is None:
        node_rank = _number(environment, "NODE_RANK")
    host, port = environment.get("MASTER_ADDR"), environment.get("MASTER_PORT", _PORT)
    if master:
        before, _, after = master.rpartition(":")
        has_port = after.isdigit() and (":" not in before or before.endswith("]"))  # IPv6 has colons, too
        host, port = (before, after) if has_port else (master.rstrip(":"), _PORT)
    if nodes > 1 and not host:
        options = f"--nodes {nodes} --node-rank {node_rank} --master HOST:PORT"
        raise McpLoraError(f"{nodes} nodes require the address of the first one: mcp-lora train {options}")
    if not 0 <= node_rank < nodes:
        options = f"--nodes {nodes} --node-rank {nodes - 1}"
        raise McpLoraError(f"node ranks are 0 to {nodes - 1}, not {node_rank}: mcp-lora train {options}")
    return Topology(per_node, nodes, node_rank, (host, port) if host and nodes > 1 else None)


def launched(environment: Mapping[str, str]) -> dict[str, str] | None:
    """Return LLaMA-Factory's variables for a launch by deepspeed or torchrun; none if there was none.

    They start a process for each GPU. The first on each node starts the engine, which starts its own
    processes and can be restarted when memory runs out; the result for the others is None.
    """
    values = [environment.get(name, "") for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")]
    if not all(value.isdigit() for value in values):
        return {}
    rank, local_rank, processes = map(int, values)
    if local_rank:
        return None
    named = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE")  # by torchrun, and by deepspeed
    per_node = next(filter(None, (_number(environment, name) for name in named)), processes or 1)
    node_rank = rank // per_node
    variables = {"NPROC_PER_NODE": str(per_node), "NNODES": str(processes // per_node)}
    # the launcher may listen on its own port
    port = _number(environment, "MASTER_PORT") or int(_PORT)
    return variables | {"NODE_RANK": str(node_rank), "MASTER_PORT": str(port + 1)}


def _number(environment: Mapping[str, str], name: str) -> int:
    value = environment.get(name, "0")
    if not value.isdigit():
        raise McpLoraError(f"{name}={value} in the environment is not a number: unset {name}")
    return int(value)
