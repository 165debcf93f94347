"""What other modules use of DeepSpeed's ZeRO, without importing DeepSpeed."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from ...model.llm import hidden_width

LEAST_BUCKET = 2**24  # elements; smaller messages would not fill a network
LIVE = 1_000_000_000  # DeepSpeed's stage3_max_live_parameters


def bucket_elements(parts: Mapping[str, nn.Module]) -> int:
    """Number of gradient elements that DeepSpeed communicates at once.

    A square matrix of the model's width, as with Hugging Face's ``reduce_bucket_size: auto``.
    """
    return max(LEAST_BUCKET, hidden_width(parts["llm"]) ** 2 if "llm" in parts else 0)


def full_shape(parameter: nn.Parameter) -> torch.Size:
    """The full shape of a parameter, of which a rank holds only a partition under ZeRO-3."""
    return getattr(parameter, "ds_shape", parameter.shape)
