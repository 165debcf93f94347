"""The processes of a run: ranks, device, and the few things that they say to each other."""

from __future__ import annotations

import os
import signal
import socket
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

OUTSIDE_STEPS = 10  # times as long as in a step, ranks may wait for each other: starting, saving, validating


@dataclass(frozen=True)
class World:
    """One process's place among the ranks of a run."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, values: list[float]) -> list[float]:
        """Element-wise sum over ranks, in float64."""
        return self._reduce(values, dist.ReduceOp.SUM)

    def max(self, values: list[float]) -> list[float]:
        """Element-wise maximum over ranks, in float64."""
        return self._reduce(values, dist.ReduceOp.MAX)

    def _reduce(self, values: list[float], op: dist.ReduceOp) -> list[float]:
        if self.size == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor, op)
        return tensor.tolist()

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in the order of ranks."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def from_main(self, value: Any) -> Any:
        """The main rank's value, on every rank."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()


def prepare_process() -> bool:
    """Settings that libraries read when they are imported; call it before they are. Returns whether there is a GPU.

    Products are the same in every command: features computed ahead are those that training would compute.
    """
    has_gpu = torch.cuda.is_available()
    if has_gpu:
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
    else:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed warns where it has to find out itself
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # data workers are forked
    return has_gpu


def join_world(timeout: float = 3600.0) -> World:
    """Join the process group that torchrun describes; without torchrun, a group of one.

    timeout: seconds that a rank waits for the others, at most.
    """
    has_gpu = prepare_process()
    if "RANK" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        alone = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update({key: str(value) for key, value in alone.items()})
    import deepspeed

    if not has_gpu:
        # gloo alone will do: the shared-memory kernel would be compiled for a minute first
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    local = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", local) if has_gpu else torch.device("cpu")
    if has_gpu:
        torch.cuda.set_device(device)
    limit = timedelta(seconds=timeout)
    _rejoin_behind_a_restart("nccl" if has_gpu else "gloo", device, limit)
    deepspeed.init_distributed(dist_backend="nccl" if has_gpu else "gloo", verbose=False, timeout=limit)
    return World(dist.get_rank(), dist.get_world_size(), device)


def _rejoin_behind_a_restart(backend: str, device: torch.device, timeout: timedelta) -> None:
    """Where torchrun has replaced the ranks of its one node, form their group apart from what the dead ones left.

    torchrun keeps its store over restarts, and with it the addresses of dead ranks (PyTorch issue 135712). Of several
    nodes each counts its own restarts: there TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 makes torchrun open a new store.
    """
    attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    shared = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if not attempt or not shared or os.environ.get("GROUP_WORLD_SIZE") != "1":
        return
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), size, is_master=False)
    store = dist.PrefixStore(f"attempt-{attempt}", store)
    options = {"device_id": device} if device.type == "cuda" and size > 1 else {}
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout, **options)


def leave_world() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


class StopSignal:
    """Remembers SIGTERM or SIGUSR1, so that the loop can save at the end of its step."""

    def __init__(self) -> None:
        self.received = False
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._remember)

    def _remember(self, number: int, frame: object) -> None:
        self.received = True


class Stopped(Exception):
    """The run was asked to stop, and has saved its state."""
