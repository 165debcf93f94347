"""Robot actions as tokens: the numbers of a vector are put into uniform bins, each of which is a token.

vector --Binning.encode--> "<action_17><action_130>" --Binning.decode--> centers of the bins
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

Action = tuple[float, ...]
ACTION_MARK = "<action>"
_TOKEN = re.compile(r"<action_(\d{1,9})>")


def _token(number: int) -> str:
    return f"<action_{number}>"


@dataclass(frozen=True)
class Binning:
    """Uniform bins from `low` to `high`, which are a number for all dimensions or one for each."""

    bins: int
    low: float | tuple[float, ...]
    high: float | tuple[float, ...]

    @classmethod
    def of(cls, values: Mapping) -> Binning:
        """A binning from its values as JSON has them."""
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})

    @property
    def tokens(self) -> tuple[str, ...]:
        """The tokens of all bins, which are the same for all dimensions."""
        return tuple(map(_token, range(self.bins)))

    @property
    def dimensions(self) -> int | None:
        """The length of a vector; None if it may have any."""
        return next((len(ends) for ends in (self.low, self.high) if isinstance(ends, tuple)), None)

    def encode(self, vector: Sequence[float]) -> str:
        """The tokens of a vector, whose numbers are clipped to the ends. Raises ValueError for a wrong length."""
        if self.dimensions not in (None, len(vector)):
            raise ValueError(
                f"an action has {len(vector)} numbers, expected the {self.dimensions} of actions.low and actions.high"
            )
        low, high = np.array(self.low), np.array(self.high)
        places = (np.clip(vector, low, high) - low) / (high - low) * self.bins
        return "".join(_token(min(int(place), self.bins - 1)) for place in places)

    def decode(self, text: str) -> np.ndarray:
        """The vectors of all actions in a text, one after another, ``(N,)``."""
        return self.centers(self.numbers(text))

    def numbers(self, text: str) -> list[int]:
        """The bins of all tokens of actions in a text."""
        return [number for number in map(int, _TOKEN.findall(text)) if number < self.bins]

    def centers(self, numbers: Sequence[int]) -> np.ndarray:
        """The centers ``(N,)`` of bins, the first of which belongs to the first dimension."""
        low, high = (np.resize(ends, len(numbers)) for ends in (self.low, self.high))
        return low + (np.array(numbers) + 0.5) / self.bins * (high - low)
