"""What other modules use of DeepSpeed's ZeRO, without importing DeepSpeed."""

from __future__ import annotations

import torch
from torch import nn

BUCKET = 500_000_000  # DeepSpeed's reduce_bucket_size: elements
LIVE = 1_000_000_000  # DeepSpeed's stage3_max_live_parameters


def full_shape(parameter: nn.Parameter) -> torch.Size:
    """The full shape of a parameter, of which a rank holds only a partition under ZeRO-3."""
    return getattr(parameter, "ds_shape", parameter.shape)
