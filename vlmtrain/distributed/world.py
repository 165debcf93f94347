"""The ranks of a run, their devices and the collective operations between them."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

OUTSIDE_STEPS = 10  # factor on the timeout of a step while starting, saving or validating


@dataclass(frozen=True)
class World:
    """This process's rank, the number of ranks and the device."""

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
        """The values of all ranks, in rank order."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def from_main(self, value: Any) -> Any:
        """The value of the main rank, broadcast to all ranks."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()


def prepare_process() -> bool:
    """Configure settings that libraries read on import; call it before importing them. Returns whether there is a GPU.

    All commands use the same TF32 settings, so that precomputed features equal those that training would compute.
    """
    has_gpu = torch.cuda.is_available()
    if has_gpu:
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
    else:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed warns if it has to detect the accelerator
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # data workers are forked
    return has_gpu


def leave_world() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


class StopSignal:
    """Records SIGTERM or SIGUSR1, so that the training loop can save a checkpoint at the end of the step."""

    def __init__(self) -> None:
        self.received = False
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._remember)

    def _remember(self, number: int, frame: object) -> None:
        self.received = True


class Stopped(Exception):
    """The run was told to stop and has saved its state."""
