"""What other modules use of DeepSpeed's ZeRO, without importing DeepSpeed."""

from __future__ import annotations

import torch
from torch import nn


def full_shape(parameter: nn.Parameter) -> torch.Size:
    """The full shape of a parameter, of which a rank holds only a partition under ZeRO-3."""
    return getattr(parameter, "ds_shape", parameter.shape)
