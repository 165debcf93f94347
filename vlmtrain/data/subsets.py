"""Sources composed of other sources: a subset of the records of one source, and the concatenation of several."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

from .records import Conversation, Source


class Subset:
    """Some records of a source, by their indices."""

    def __init__(self, source: Source, indices: Sequence[int]):
        self.source, self.indices = source, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Conversation:
        return self.source[int(self.indices[index])]


class Concatenation:
    """All records of the first source, then all of the second, and so on."""

    def __init__(self, sources: Sequence[Source]):
        self.sources = tuple(sources)
        self._ends = list(accumulate(len(source) for source in sources))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> Conversation:
        number = self.number(index)
        return self.sources[number][index - (self._ends[number - 1] if number else 0)]

    def number(self, index: int) -> int:
        """Position of the source to which a record belongs."""
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        return bisect_right(self._ends, index)
