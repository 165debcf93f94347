"""Demonstrations by similar images: RICES (Yang et al., 2021; Alayrac et al., 2022, appendix A.2).

media of a record -> features of the encoder -> their mean, a unit vector -> the records of the highest cosines
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..connectors.base import are_several
from ..data.records import IMAGE_MARK, Conversation, Source, Turn
from ..model import VLMWrapper
from ..model.vision.base import rows_of
from .few_shot import Demonstrations, asks_the_same
from .held_out import HeldOutBatch

GROUP = 32
"""Number of demonstrations that are encoded at once."""


@dataclass(frozen=True)
class MediaOf:
    """The conversations of a source with their media, and without their text."""

    source: Source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Conversation:
        found = self.source[index]
        turns = Turn("user", f"{IMAGE_MARK * len(found.media)} media"), Turn("assistant", "media")
        return Conversation(found.id, turns, found.media)


def vectors(model: VLMWrapper, held: HeldOutBatch, device: torch.device, dtype: torch.dtype) -> dict[int, Tensor]:
    """A unit vector ``(C,)`` for each conversation with media in a batch, by index, float64 on the host.

    It is the mean over the items of the mean over their patches; of several encoders, their unit vectors in a row.
    """
    visual = held.batch.visual.to(device, dtype)
    if not visual.items:
        return {}
    items = [
        torch.cat([F.normalize(each.patches.flatten(0, -2).double().mean(0), dim=0) for each in encoders])
        for encoders in (row if are_several(row) else (row,) for row in rows_of(model.encode(visual)))
    ]
    found = {}
    for index, row in zip(held.indices, visual.index):
        places = row[row >= 0].unique().tolist()
        own = [items[number] for place in places for number in visual.placements[place].items]
        if own:
            found[index] = F.normalize(torch.stack(own).mean(0), dim=0).cpu()
    return found


class Nearest:
    """The nearest demonstrations of questions, at most `count` each.

    asked: conversations with their vectors, by index. found: for each of them, the negative cosines and numbers of
    demonstrations, nearest first; of equally near ones, the first.
    """

    def __init__(self, asked: Mapping[int, tuple[Conversation, Tensor]], count: int):
        self.indices, self.count = list(asked), count
        self.conversations = [conversation for conversation, _ in asked.values()]
        self.vectors = torch.stack([vector for _, vector in asked.values()])
        self.least = torch.full((len(asked),), -torch.inf, dtype=torch.double)
        self.found: dict[int, list[tuple[float, int]]] = {index: [] for index in asked}

    def add(self, shots: Demonstrations, given: Mapping[int, Tensor]) -> None:
        """Take the vectors of further demonstrations, with ascending numbers, into account."""
        if not given:
            return
        numbers = list(given)
        cosines = self.vectors @ torch.stack(list(given.values())).T
        for row, column in (cosines > self.least[:, None]).nonzero().tolist():
            best, entry = self.found[self.indices[row]], (-float(cosines[row, column]), numbers[column])
            if len(best) == self.count and entry > best[-1]:
                continue
            if not asks_the_same(shots[numbers[column]], self.conversations[row]):
                insort(best, entry)
                del best[self.count :]
                if len(best) == self.count:
                    self.least[row] = -best[-1][0]


def merged(ranks: Sequence[Mapping[int, list[tuple[float, int]]]], count: int) -> Iterator[tuple[int, list[int]]]:
    """The numbers of the nearest demonstrations of each question, given those that the ranks found."""
    for index in ranks[0]:
        yield index, [number for _, number in sorted(entry for rank in ranks for entry in rank[index])[:count]]
