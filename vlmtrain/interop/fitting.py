"""Checks whether a class of another library can represent a model."""

from __future__ import annotations

import torch
from torch import Tensor

TOLERANCE = 1e-4


class DoesNotFit(ValueError):
    """A class of another library cannot represent the model; the message gives the reason and an alternative."""


def relative_difference(one: Tensor, other: Tensor) -> float:
    """The largest absolute difference, relative to the largest absolute value of `other`."""
    return float((one.float() - other.float()).abs().max() / other.float().abs().max().clamp_min(1e-30))


def tolerance(dtype: torch.dtype) -> float:
    """Tolerance for results that differ only in the order of additions."""
    return max(TOLERANCE, 16 * torch.finfo(dtype).eps)
