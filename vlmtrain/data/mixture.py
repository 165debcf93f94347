"""Mixing of sources: an endless stream of records in which every epoch has the same share of each source.

source  --permutation after permutation-->  a source's draws  --shuffled together-->  an epoch
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import lru_cache

import torch
from torch import Tensor

from .records import Conversation, Source
from .subsets import Concatenation


class Mixture:
    """Named sources combined: a sequence of all their records, and the order in which training draws them.

    counts: number of records drawn from each source per epoch, by name; None draws each record once. A source that is
    only partly drawn in an epoch continues in the next epoch where it stopped, so all its records are drawn equally
    often.

    The stream depends only on (seed, epoch, position).
    """

    def __init__(self, sources: Mapping[str, Source], counts: Mapping[str, int] | None = None, seed: int = 0):
        self.sources = dict(sources)
        self.counts = {name: counts[name] if counts else len(source) for name, source in self.sources.items()}
        self.seed = seed
        self.epoch_size = sum(self.counts.values())
        self._all = Concatenation(list(self.sources.values()))
        # a process reads at most two epochs at once: the end of one and the beginning of the next
        self._epoch = lru_cache(maxsize=2)(self._draw_epoch)

    def __len__(self) -> int:
        return len(self._all)

    def __getitem__(self, index: int) -> Conversation:
        return self._all[index]

    def source_number(self, index: int) -> int:
        """Position in `sources` of the source to which a record belongs."""
        return self._all.number(index)

    def draw(self, position: int) -> int:
        """Index of the record at a position of the endless stream."""
        epoch, within = divmod(position, self.epoch_size)
        return int(self._epoch(epoch)[within])

    def _draw_epoch(self, epoch: int) -> Tensor:
        drawn, start = [], 0
        for name, source in self.sources.items():
            first = epoch * self.counts[name]
            drawn.append(start + self._draws(name, len(source), first, first + self.counts[name]))
            start += len(source)
        together = torch.cat(drawn)
        return together[torch.randperm(len(together), generator=self._generator("epoch", epoch))]

    def _draws(self, name: str, size: int, first: int, last: int) -> Tensor:
        """Draws `first` to ``last - 1`` of a source, from successive permutations of its records."""
        rounds = range(first // size, -(-last // size))
        orders = [torch.randperm(size, generator=self._generator(name, number)) for number in rounds]
        joined = torch.cat(orders) if orders else torch.empty(0, dtype=torch.long)
        return joined[first - first // size * size :][: last - first]

    def _generator(self, *purpose: object) -> torch.Generator:
        digest = hashlib.sha256("/".join(map(str, (self.seed, *purpose))).encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") % 2**63)
