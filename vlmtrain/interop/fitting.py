"""What a class of another library can hold, and how that is shown."""

from __future__ import annotations

import torch
from torch import Tensor

TOLERANCE = 1e-4


class DoesNotFit(ValueError):
    """A model that a class of another library cannot hold; the message says why, and what would work."""


def relative_difference(one: Tensor, other: Tensor) -> float:
    """The largest difference, in units of the largest value of `other`."""
    return float((one.float() - other.float()).abs().max() / other.float().abs().max().clamp_min(1e-30))


def tolerance(dtype: torch.dtype) -> float:
    """How far two orders of the same additions may lie apart."""
    return max(TOLERANCE, 16 * torch.finfo(dtype).eps)
