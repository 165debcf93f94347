"""Several sources as one: concatenated, or mixed into an endless stream in which every epoch has the same shares.

each source --successive permutations--> its draws for an epoch
the draws of all sources --concatenated and shuffled--> the order of the epoch
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import accumulate

import torch
from torch import Tensor

from .records import Conversation, Source


class Concatenation:
    """All records of the first source, then all of the second, and so on."""

    def __init__(self, sources: Sequence[Source]):
        self._parts = tuple(sources)
        self._ends = list(accumulate(len(source) for source in sources))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> Conversation:
        number = self.source_number(index)
        return self._parts[number][index - (self._ends[number - 1] if number else 0)]

    def source_number(self, index: int) -> int:
        """Position of the source to which a record belongs."""
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        return bisect_right(self._ends, index)


class Mixture(Concatenation):
    """Named sources combined: a sequence of all their records, and the order in which training draws them.

    counts: number of records drawn from each source per epoch, by name; None draws each record once. A source that is
    only partly drawn in an epoch continues in the next epoch where it stopped, so all its records are drawn equally
    often.

    The stream depends only on (seed, epoch, position).
    """

    def __init__(self, sources: Mapping[str, Source], counts: Mapping[str, int] | None = None, seed: int = 0):
        super().__init__(list(sources.values()))
        self.sources = dict(sources)
        self.counts = {name: counts[name] if counts else len(source) for name, source in self.sources.items()}
        self.seed = seed
        self.epoch_size = sum(self.counts.values())
        # a process reads at most two epochs at once: the end of one and the beginning of the next
        self._epoch = lru_cache(maxsize=2)(self._draw_epoch)

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
