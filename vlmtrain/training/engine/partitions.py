"""Access to parameters that ZeRO partitions over ranks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable

import torch
from torch import Tensor, nn


def full_shape(parameter: nn.Parameter) -> torch.Size:
    """The full shape of a parameter, of which a rank holds only a partition under ZeRO-3."""
    return getattr(parameter, "ds_shape", parameter.shape)


def gathered(tensors: Iterable[Tensor]) -> contextlib.AbstractContextManager:
    import deepspeed

    partitioned = [tensor for tensor in tensors if hasattr(tensor, "ds_id")]
    return deepspeed.zero.GatheredParameters(partitioned) if partitioned else contextlib.nullcontext()
