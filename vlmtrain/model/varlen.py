"""Variable-length attention on GPUs: PyTorch's kernels for segments of one row."""

from __future__ import annotations

import torch
from torch import Tensor


def has_kernel(query: Tensor, dropout: float = 0.0) -> bool:
    """Whether `varlen_attention` runs on the device and in the dtype of `query`."""
    in_half = query.dtype in (torch.float16, torch.bfloat16)
    fits = query.shape[-1] <= 256 and query.shape[-1] % 8 == 0
    if not query.is_cuda or not in_half or not fits or dropout:
        return False
    return torch.cuda.get_device_capability(query.device) >= (8, 0)


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    boundaries: Tensor,
    longest: int,
    scale: float | None,
    window: tuple[int, int] = (-1, -1),
) -> Tensor:
    """Attention within each segment.

    query ``(N, H, d)``; key, value ``(N, G, d)`` with G groups of heads; boundaries ``(S + 1,)`` int32; longest: length
    of the longest segment; window: how many positions back and ahead each query sees, -1 for all. Returns
    ``(N, H, d)``.
    """
    from torch.nn.attention.varlen import varlen_attn  # registers operators, which takes time

    grouped = query.shape[1] != key.shape[1]
    bounds = boundaries, boundaries, longest, longest
    return varlen_attn(query, key, value, *bounds, scale=scale, window_size=window, enable_gqa=grouped)
