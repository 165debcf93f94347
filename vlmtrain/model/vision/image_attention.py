"""Attention within each image, or each window of an image, of a packed row."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, groupby
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..varlen import has_kernel, varlen_attention

NAME = "vlmtrain_images"


class Segments(NamedTuple):
    """Which patches of a packed row see each other: those of one segment.

    groups: ``(count, length)`` of the segments, those of one length together. order, inverse: ``(N,)``, which brings
    the patches into the order of the groups, and back; None if they are in that order. boundaries: ``(S + 1,)`` int32,
    and the longest length, for variable-length flash attention.
    """

    groups: tuple[tuple[int, int], ...]
    order: Tensor | None
    inverse: Tensor | None
    boundaries: Tensor
    longest: int

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device) -> Segments:
        """Segments of these lengths, one after another. Everything is made on the host: a GPU is not waited for."""
        groups, order = [(len(list(run)), length) for length, run in groupby(lengths)], None
        if len(groups) > len(set(lengths)):
            by_length = sorted(range(len(lengths)), key=lambda number: lengths[number])
            groups = [(len(list(run)), length) for length, run in groupby(sorted(lengths))]
            pieces = torch.arange(sum(lengths), device="cpu").split(list(lengths))
            order = torch.cat([pieces[number] for number in by_length])
        boundaries = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device="cpu")
        inverse = None if order is None else order.argsort()
        order, inverse, boundaries = (sent(each, device) for each in (order, inverse, boundaries))
        return cls(tuple(groups), order, inverse, boundaries, max(lengths))


def sent(tensor: Tensor | None, device: torch.device) -> Tensor | None:
    """A tensor of the host on `device`, without waiting for it."""
    return None if tensor is None else tensor.to(device, non_blocking=True)


def register_image_attention() -> None:
    """Make `attend_in_images` known to transformers as `NAME`."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, attend_in_images)


def attend_in_images(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Segments | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    segments: Segments | None = None,
    **unused,
) -> tuple[Tensor, None]:
    """Attention in both directions within each segment, with the signature that Hugging Face models expect.

    query, key, value ``(1, H, N, d)``. The segments are passed as `segments`, or as `attention_mask` where a model
    passes on nothing else. Returns ``(1, N, H, d)``.
    """
    segments = attention_mask if segments is None else segments
    rows = [tensor[0].transpose(0, 1) for tensor in (query, key, value)]
    if has_kernel(query, dropout):
        return varlen_attention(*rows, segments.boundaries, segments.longest, scaling)[None], None
    if segments.order is not None:
        rows = [tensor.index_select(0, segments.order) for tensor in rows]
    pieces = zip(*(tensor.split([count * length for count, length in segments.groups]) for tensor in rows))
    found = []
    for group, piece in zip(segments.groups, pieces, strict=True):
        batch = (tensor.unflatten(0, group).transpose(1, 2) for tensor in piece)
        attended = F.scaled_dot_product_attention(*batch, dropout_p=dropout, scale=scaling)
        found.append(attended.transpose(1, 2).flatten(0, 1))
    output = torch.cat(found)
    return (output if segments.inverse is None else output.index_select(0, segments.inverse))[None], None
