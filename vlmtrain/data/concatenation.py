"""Several sources as one sequence."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

from .records import Conversation

if TYPE_CHECKING:
    from .mixture import Source


class Concatenation:
    """All records of the first source, then all of the second, and so on."""

    def __init__(self, sources: Sequence[Source]):
        self.sources = tuple(sources)
        self._ends = list(accumulate(len(source) for source in sources))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> Conversation:
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = bisect_right(self._ends, index)
        return self.sources[number][index - (self._ends[number - 1] if number else 0)]
