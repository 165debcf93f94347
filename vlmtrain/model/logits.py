"""Logits at some positions only."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def logits_at(llm: nn.Module, keep: Tensor | None, shape: torch.Size) -> Iterator[int | Tensor]:
    """Let a language model compute logits ``(K, V)`` only at the positions `keep`; all logits for None.

    keep: positions ``(K,)`` in the flattened batch of `shape` ``(B, T)``. Yields the model's argument
    ``logits_to_keep``: a mask for a model without output embeddings of its own, where a GPU has to search it.
    """
    head = llm.get_output_embeddings()
    if keep is None:
        yield 0
        return
    if head is None:
        mask = torch.zeros(shape.numel(), dtype=torch.bool, device=keep.device)
        yield mask.index_fill(0, keep, True).view(shape)
        return

    def select(head: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        states, *others = arguments
        return states.flatten(0, 1).index_select(0, keep), *others

    hook = head.register_forward_pre_hook(select)
    try:
        yield 0
    finally:
        hook.remove()
