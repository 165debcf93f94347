"""Logits at some positions only."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def logits_at(llm: nn.Module, keep: Tensor | None, shape: torch.Size) -> Iterator[int | Tensor]:
    """Let a language model compute logits ``(K, V)`` only at the positions `keep`; all logits for None.

    keep: positions ``(K,)`` in the flattened batch, or ``(B, T)`` bool, which a GPU has to search. shape: ``(B, T)``.
    Yields the model's argument ``logits_to_keep``.
    """
    head = llm.get_output_embeddings()
    if keep is not None and keep.ndim == 1 and head is None:
        mask = torch.zeros(shape, dtype=torch.bool, device=keep.device)
        keep = mask.flatten().index_fill(0, keep, True).view(shape)
    if keep is None or keep.ndim == 2:
        yield 0 if keep is None else keep
        return

    def select(head: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        states, *others = arguments
        return states.flatten(0, 1).index_select(0, keep), *others

    hook = head.register_forward_pre_hook(select)
    try:
        yield 0
    finally:
        hook.remove()
