"""Cross-entropy per position, without a float32 copy of all logits."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK = 2**24  # number of logits held in float32 at once: 64 MiB


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Per-row cross-entropy ``(K,)`` in float32 of logits ``(K, V)`` in any precision and targets ``(K,)``.

    Only the logits are saved for the backward pass, in their own precision, and the backward pass allocates a gradient
    of the same size: 4 bytes per logit in bf16, where ``cross_entropy(logits.float())`` needs up to 16.
    """
    return _TokenLosses.apply(logits, targets)


class _TokenLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits: Tensor, targets: Tensor) -> Tensor:
        normalisers = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
        chosen = torch.empty_like(normalisers)
        for rows in _chunks(logits):
            chunk = logits[rows].float()
            normalisers[rows] = chunk.logsumexp(-1)
            chosen[rows] = chunk.gather(-1, targets[rows, None])[:, 0]
        ctx.save_for_backward(logits, targets, normalisers)
        return normalisers - chosen

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        logits, targets, normalisers = ctx.saved_tensors
        out = torch.empty_like(logits)
        for rows in _chunks(logits):
            chunk = logits[rows].float().sub_(normalisers[rows, None]).exp_()
            chunk.scatter_add_(-1, targets[rows, None], chunk.new_full((len(chunk), 1), -1.0))
            out[rows] = chunk.mul_(gradient[rows, None])
        return out, None


def _chunks(logits: Tensor) -> Iterator[slice]:
    count, size = logits.shape
    rows = max(1, CHUNK // size)
    return (slice(start, start + rows) for start in range(0, count, rows))
