"""Gathering a step's samples from all ranks, for objectives that compare them with each other."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.nn.functional import all_gather
from torch.nn import functional as F


def all_numbers(numbers: list[int], device: torch.device) -> list[list[int]]:
    """Gather a few integers from every rank, in rank order."""
    mine = torch.tensor(numbers, device=device)
    if _is_alone():
        return [numbers]
    found = mine.new_empty(dist.get_world_size() * len(numbers))
    dist.all_gather_into_tensor(found, mine)
    return found.view(-1, len(numbers)).tolist()


class Share(NamedTuple):
    """This rank's rows among those of a step.

    counts: number of rows on each rank. Ranks may hold different numbers, including none. Rows are ordered as they were
    distributed, one to each rank in turn, so the order does not depend on the number of ranks.
    """

    counts: list[int]
    rank: int

    @classmethod
    def of(cls, counts: list[int]) -> Share:
        return cls(counts, 0 if _is_alone() else dist.get_rank())

    @property
    def total(self) -> int:
        return sum(self.counts)

    def mine(self, device: torch.device) -> Tensor:
        """Positions of this rank's rows among all rows."""
        place = {pair: place for place, pair in enumerate(self._dealt())}
        return torch.tensor([place[i, self.rank] for i in range(self.counts[self.rank])], device=device).long()

    def gather(self, rows: Tensor) -> Tensor:
        """Gather this rank's rows ``(n, ...)`` into the rows of all ranks ``(N, ...)``, with gradients to each rank."""
        if _is_alone():
            return rows
        most = max(self.counts)
        padded = F.pad(rows, (0, 0) * (rows.ndim - 1) + (0, most - len(rows)))
        found = torch.cat(all_gather(padded))
        return found[torch.tensor([rank * most + i for i, rank in self._dealt()], device=rows.device)]

    def _dealt(self) -> list[tuple[int, int]]:
        return sorted((i, rank) for rank, count in enumerate(self.counts) for i in range(count))


def _is_alone() -> bool:
    return not dist.is_initialized() or dist.get_world_size() == 1
