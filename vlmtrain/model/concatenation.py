"""Token concatenation: visual tokens take their places among the text's embeddings."""

from __future__ import annotations

from torch import Tensor


def concatenate(text: Tensor, visual: Tensor, is_image: Tensor | None) -> Tensor:
    """Put visual tokens where the text has image positions.

    text:     ``(B, T, D)`` embeddings of the token ids; what stands at image positions is ignored.
    visual:   ``(N, n, D)`` tokens of all the batch's pictures, or ``(K, D)``, in reading order.
    is_image: ``(B, T)`` bool, true at as many positions; None for a batch without pictures, whose
              `visual` then comes from a stand-in and must not count.

    Returns ``(B, T, D)``.
    """
    if is_image is None:
        # The connector has run all the same: every rank makes the same calls. Zero times its output
        # keeps it in the graph, so its gradients are reduced on every rank too.
        return text + 0.0 * visual.sum().to(text.dtype)
    visual = visual.reshape(-1, visual.shape[-1]).to(text.dtype)
    return text.masked_scatter(is_image.unsqueeze(-1), visual)
