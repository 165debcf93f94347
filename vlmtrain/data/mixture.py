"""Sources mixed: an endless stream of records, each epoch with the same share of every source.

source  --permutation after permutation-->  a source's draws  --shuffled together-->  an epoch
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor

from .records import Conversation


class Source(Protocol):
    """A sequence of conversations; a broken one raises BadSample when it is asked for."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Conversation: ...


class Subset:
    """Some records of a source, by their indices."""

    def __init__(self, source: Source, indices: Sequence[int]):
        self.source, self.indices = source, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Conversation:
        return self.source[int(self.indices[index])]


class Mixture:
    """Named sources as one: a sequence of all their records, and an order in which training draws them.

    counts: records that an epoch draws of each source, by name; None draws each record once. A source that is
    drawn from less than once an epoch goes on where the epoch before left off, so all its records come equally often.

    The stream depends on (seed, epoch, position) alone.
    """

    def __init__(self, sources: Mapping[str, Source], counts: Mapping[str, int] | None = None, seed: int = 0):
        self.sources = dict(sources)
        self.counts = {name: counts[name] if counts else len(source) for name, source in self.sources.items()}
        self.seed = seed
        self.epoch_size = sum(self.counts.values())
        self._ends = list(accumulate(len(source) for source in self.sources.values()))
        # a process reads at most the end of one epoch and the beginning of the next
        self._epoch = lru_cache(maxsize=2)(self._draw_epoch)

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Conversation:
        number = self.source_number(index)
        start = self._ends[number] - len(self._source(number))
        return self._source(number)[index - start]

    def source_number(self, index: int) -> int:
        """Which of `sources`, in order, a record belongs to."""
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        return bisect_right(self._ends, index)

    def draw(self, position: int) -> int:
        """Index of the record at a position of the endless stream of epochs."""
        epoch, within = divmod(position, self.epoch_size)
        return int(self._epoch(epoch)[within])

    def _source(self, number: int) -> Source:
        return list(self.sources.values())[number]

    def _draw_epoch(self, epoch: int) -> Tensor:
        drawn, start = [], 0
        for name, source in self.sources.items():
            first = epoch * self.counts[name]
            drawn.append(start + self._draws(name, len(source), first, first + self.counts[name]))
            start += len(source)
        together = torch.cat(drawn)
        return together[torch.randperm(len(together), generator=self._generator("epoch", epoch))]

    def _draws(self, name: str, size: int, first: int, last: int) -> Tensor:
        """Draws `first` to ``last - 1`` of a source: one permutation of its records after another."""
        rounds = range(first // size, -(-last // size))
        orders = [torch.randperm(size, generator=self._generator(name, number)) for number in rounds]
        joined = torch.cat(orders) if orders else torch.empty(0, dtype=torch.long)
        return joined[first - first // size * size :][: last - first]

    def _generator(self, *purpose: object) -> torch.Generator:
        digest = hashlib.sha256("/".join(map(str, (self.seed, *purpose))).encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") % 2**63)
