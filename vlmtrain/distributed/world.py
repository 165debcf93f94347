"""The processes of a run: ranks, device, and the few things that they say to each other."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
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
