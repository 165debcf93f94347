"""Several sources as one: concatenated, or mixed into an endless stream in which every epoch has the same shares.

each source --successive permutations--> its draws for an epoch
the draws of all sources --concatenated and shuffled--> the order of the epoch
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from functools import lru_cache
from itertools import accumulate
from random import Random

import torch
from torch import Tensor

from .records import Conversation, Source, Stream

ATTEMPTS = 1000
"""Number of records that are tried in place of one that the rules of its source leave out."""


class Concatenation:
    """All records of the first source, then all of the second, and so on."""

    def __init__(self, sources: Sequence[Source]):
        self.parts = tuple(sources)
        self._ends = list(accumulate(len(source) for source in sources))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> Conversation:
        number = self.source_number(index)
        return self.parts[number][index - self._start(number)]

    def _start(self, number: int) -> int:
        return self._ends[number - 1] if number else 0

    def source_number(self, index: int) -> int:
        """Position of the source to which a record belongs."""
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        return bisect_right(self._ends, index)


class Mixture(Concatenation):
    """Named sources combined: a sequence of all their records, and the order in which training draws them.

    counts: number of records drawn from each source per epoch, by name; None draws each record once. A source that is
    only partly drawn in an epoch continues in the next epoch where it stopped, so all its records are drawn equally
    often. A `Stream` keeps its own order; its records of epoch e have the indices from ``e * len(self)`` on.

    groups: for each record, a number that it shares with the records next to which it is drawn; None for none.
    identities: of the sources, equal only for sources with equal records; None if they are not known.
    loss_weights: weights of the sources' mean losses; None if the loss is the mean over the targets of all sources.
    weighing: for each source, its own way to weigh the targets of a sample, or None, and a factor, see
    `Rendered.weighed`; empty if no source has one. one_image_shares: for each source of documents, the share of those
    with one image that are kept; None for other sources; empty if there are no documents.

    The order depends only on (seed, epoch, position).
    """

    def __init__(
        self,
        sources: Mapping[str, Source],
        counts: Mapping[str, int] | None = None,
        seed: int = 0,
        identities: Mapping[str, object] | None = None,
        loss_weights: Sequence[float] | None = None,
        weighing: Sequence[tuple[str | None, float]] = (),
        one_image_shares: Sequence[float | None] = (),
    ):
        super().__init__(list(sources.values()))
        self.identities, self.loss_weights = dict(identities or {}), loss_weights
        self.weighing = tuple(weighing) or ((None, 1.0),) * len(sources)
        self.one_image_shares = tuple(one_image_shares) or (None,) * len(sources)
        self.sources = dict(sources)
        self.streams = {name: source for name, source in self.sources.items() if isinstance(source, Stream)}
        self.counts = {name: counts[name] if counts else len(source) for name, source in self.sources.items()}
        self.seed = seed
        self.epoch_size = sum(self.counts.values())
        # a process reads at most two epochs at once: the end of one and the beginning of the next
        self.groups: Tensor | None = None
        self._epoch = lru_cache(maxsize=2)(self._draw_epoch)

    def keeping_together(self, groups: Tensor) -> Mixture:
        """The same mixture, which draws the records of one of the `groups` one after the other."""
        other = copy(self)
        other.groups, other._epoch = groups, lru_cache(maxsize=2)(other._draw_epoch)
        return other

    def __getitem__(self, index: int) -> Conversation:
        number = self.source_number(index)
        epoch, within = divmod(index, len(self))
        source = self.parts[number]
        return source[epoch * len(source) + within - self._start(number)]

    def source_number(self, index: int) -> int:
        """Position of the source to which a record belongs. Only streams have records in later epochs."""
        if index < len(self) or not self.streams:
            return super().source_number(index)
        number = super().source_number(index % len(self))
        if not isinstance(self.parts[number], Stream):
            raise IndexError(f"record {index} of {len(self)}")
        return number

    def draw(self, position: int) -> int:
        """Index of the record at a position of the endless stream."""
        epoch, within = divmod(position, self.epoch_size)
        return int(self._epoch(epoch)[within])

    def candidates(self, position: int) -> Iterator[int]:
        """Index of the record at a position, then of records of its source to take its place if it is left out.

        Only documents may be left out (`records.Dropped`, `keeps`), and only they have others.
        """
        index = self.draw(position)
        yield index
        number = self.source_number(index)
        if self.one_image_shares[number] is not None:
            rng = Random(f"{self.seed}/instead/{position}")
            for _ in range(ATTEMPTS):
                yield self._start(number) + rng.randrange(len(self.parts[number]))

    def keeps(self, position: int, index: int, images: int) -> bool:
        """Whether a document with so many images is trained on at this position."""
        share = self.one_image_shares[self.source_number(index)]
        return share is None or images != 1 or Random(f"{self.seed}/keeps/{position}/{index}").random() < share

    def _draw_epoch(self, epoch: int) -> Tensor:
        drawn, start = [], 0
        for name, source in self.sources.items():
            first = epoch * self.counts[name]
            if name in self.streams:
                drawn.append(epoch * len(self) + start + torch.arange(len(source)))
            else:
                drawn.append(start + self._draws(name, len(source), first, first + self.counts[name]))
            start += len(source)
        together = torch.cat(drawn)
        generator = self._generator("epoch", epoch)
        order = together[torch.randperm(len(together), generator=generator)]
        if self.groups is not None:
            numbers = self.groups[order].unique(return_inverse=True)[1]
            places = torch.randperm(int(numbers.max()) + 1, generator=generator)
            order = order[places[numbers].argsort(stable=True)]
        for draws in (each for name, each in zip(self.sources, drawn) if name in self.streams):
            # only the places of a stream's records are shuffled: a stream is read from front to back
            places = (order >= draws[0]) & (order <= draws[-1])
            order[places] = draws
        return order

    def _draws(self, name: str, size: int, first: int, last: int) -> Tensor:
        """Draws `first` to ``last - 1`` of a source, from successive permutations of its records."""
        rounds = range(first // size, -(-last // size))
        orders = [torch.randperm(size, generator=self._generator(name, number)) for number in rounds]
        joined = torch.cat(orders) if orders else torch.empty(0, dtype=torch.long)
        return joined[first - first // size * size :][: last - first]

    def place(self, position: int) -> float:
        """A random number in [0, 1) for the sample at a position of the stream."""
        return float(torch.rand((), generator=self._generator("place", position)))

    def _generator(self, *purpose: object) -> torch.Generator:
        digest = hashlib.sha256("/".join(map(str, (self.seed, *purpose))).encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") % 2**63)
