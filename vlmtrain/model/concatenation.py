"""Token concatenation: visual tokens are inserted into the text embeddings."""

from __future__ import annotations

from torch import Tensor


def concatenate(text: Tensor, visual: Tensor, is_image: Tensor | None) -> Tensor:
    """Put visual tokens at the image positions of the text.

    text:     ``(B, T, D)`` embeddings of the token ids; values at image positions are ignored.
    visual:   ``(N, n, D)`` tokens of all images of the batch, or ``(K, D)``, in reading order.
    is_image: ``(B, T)`` bool, True at one position per visual token; None for a batch without images, whose
              `visual` comes from a dummy image and must have no effect.

    Returns ``(B, T, D)``.
    """
    if is_image is None:
        # The connector runs anyway, so that every rank makes the same calls. Adding zero times its output
        # keeps it in the graph, so its gradients are reduced on every rank.
        return text + 0.0 * visual.sum().to(text.dtype)
    visual = visual.reshape(-1, visual.shape[-1]).to(text.dtype)
    return text.masked_scatter(is_image.unsqueeze(-1), visual)
