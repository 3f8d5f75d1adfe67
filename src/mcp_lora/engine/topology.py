"""Who trains together: the machines, the processes on each, and the batch that all of them share."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mcp_lora.engine.api import number
from mcp_lora.errors import McpLoraError

_PORT = "29500"  # torchrun's own default


@dataclass(frozen=True)
class World:
    """The processes of one training: `per_node` on each of `nodes` machines, one a GPU.

    `node_rank` is this machine's, from 0, `master` the first one's (host, port), None if there is only one;
    `rank` is this process's, if deepspeed or torchrun started it.
    """

    per_node: int = 1
    nodes: int = 1
    node_rank: int = 0
    master: tuple[str, str] | None = None
    rank: int | None = None

    @property
    def processes(self) -> int:
        """How many train in all."""
        return self.per_node * self.nodes

    @property
    def leads(self) -> bool:
        """Whether this process speaks and writes for all."""
        return not self.rank and not self.node_rank


def find(
    environment: Mapping[str, str],
    visible: int,
    gpus: int | None = None,
    nodes: int | None = None,
    node_rank: int | None = None,
    master: str | None = None,
) -> World:
    """Return the world that the options, or else LLaMA-Factory's variables, describe.

    RANK and WORLD_SIZE in `environment` are a launcher's, and win; `visible` is how many GPUs this machine
    shows, `master` HOST:PORT of the first machine.

    Raises McpLoraError where there are fewer GPUs, the first machine is not named, or this one is none of
    them.
    """
    if (rank := worker_rank(environment)) is not None:
        return World(_number(environment, "WORLD_SIZE"), rank=rank)
    if gpus and gpus > visible:
        raise McpLoraError(
            f"this machine shows {visible} GPUs, not {gpus} (CUDA_VISIBLE_DEVICES, nvidia-smi): leave --gpus "
            f"out, or see what {gpus} would do: mcp-lora train --gpus {gpus} --dry-run"
        )
    per_node = gpus or _number(environment, "NPROC_PER_NODE") or visible or 1
    nodes = nodes or _number(environment, "NNODES") or 1
    if node_rank is None:
        node_rank = _number(environment, "NODE_RANK")
    host, port = environment.get("MASTER_ADDR"), environment.get("MASTER_PORT", _PORT)
    if master:
        before, _, after = master.rpartition(":")
        host, port = (before, after) if before else (after, _PORT)
    if nodes > 1 and not host:
        options = f"--nodes {nodes} --node-rank {node_rank} --master HOST:PORT"
        raise McpLoraError(f"{nodes} machines have to meet at the first of them: mcp-lora train {options}")
    if not 0 <= node_rank < nodes:
        options = f"--nodes {nodes} --node-rank {nodes - 1}"
        raise McpLoraError(f"the ranks are 0 to {nodes - 1}, not {node_rank}: mcp-lora train {options}")
    return World(per_node, nodes, node_rank, (host, port) if host and nodes > 1 else None)


def worker_rank(environment: Mapping[str, str]) -> int | None:
    """Return this process's rank if deepspeed or torchrun started it, else None."""
    launched = {"RANK", "LOCAL_RANK", "WORLD_SIZE"} <= environment.keys()
    return _number(environment, "RANK") if launched else None


def share_batch(
    config: Mapping[str, Any], processes: int, wanted: int | None = None
) -> tuple[dict[str, Any], str]:
    """Divide the batch of one optimizer step among processes.

    A recipe's per_device_train_batch_size × gradient_accumulation_steps (8 × 1 where left out, as in
    transformers) is its global batch size, or `wanted` is. It stays the same on any number of processes, as
    the learning rate belongs to it:

        per device × accumulation × processes = batch

    Where the processes do not divide the batch it is the nearest that they can have, with at least half the
    batch per device. Returns the two keys, and what came out in words.

    Raises McpLoraError where one of the two keys is no whole number from 1.
    """
    most = _size(config, "per_device_train_batch_size", 8)
    batch = wanted or most * _size(config, "gradient_accumulation_steps", 1)
    most = min(most, max(1, batch // processes))
    sizes = [(size, max(1, round(batch / (size * processes)))) for size in range(most, (most - 1) // 2, -1)]
    per_device, steps = min(sizes, key=lambda pair: abs(pair[0] * pair[1] * processes - batch))
    found = per_device * steps * processes
    words = f"batch {found} = {per_device} per device × {steps} accumulated × {processes} processes"
    if found != batch:
        words = f"warning: {words}, as {processes} do not divide {batch}"
    return {"per_device_train_batch_size": per_device, "gradient_accumulation_steps": steps}, words


def _size(config: Mapping[str, Any], key: str, default: int) -> int:
    value = number(config, key, default)
    if value < 1 or value != int(value):
        raise McpLoraError(f"{key}={value} is no whole number from 1: mcp-lora train {key}={default}")
    return int(value)


def _number(environment: Mapping[str, str], name: str) -> int:
    value = environment.get(name, "0")
    if not value.isdigit():
        raise McpLoraError(f"{name}={value} in the environment is no number: unset {name}")
    return int(value)
