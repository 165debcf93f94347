"""Fusion: how visual tokens enter the language model.

    fuse(text embeddings, visual tokens, visual) -> Fused

`FUSIONS` maps exact names to the classes. A fusion with weights of its own is trained as the part ``fusion``.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from ..registry import Registry
from ..visual import Visual


class VisualTokens(NamedTuple):
    """Output of the connector for a batch.

    tokens: ``(K, D)``, those of all placements in reading order. levels: each ``(K, D)``, for the first blocks of the
    language model.
    """

    tokens: Tensor
    levels: tuple[Tensor, ...] = ()


class Fused(NamedTuple):
    """Input of the language model.

    embeddings: ``(B, T, D)``. added: each ``(K, D)``, added to the output of the first, second, ... block at the K
    positions of visual_mask ``(B, T)``, in training and when a prompt is first read. media, media_index: what deeper
    layers attend to, ``(N, M, D)``, and the medium that each position may see, ``(B, T)``; no language model reads them
    yet.
    """

    embeddings: Tensor
    added: tuple[Tensor, ...] = ()
    visual_mask: Tensor | None = None
    media: Tensor | None = None
    media_index: Tensor | None = None


class Fusion(nn.Module):
    """Base class of fusions.

    A subclass implements `forward`. It may have weights and options; `width` is that of the language model.
    """

    def __init__(self, width: int):
        super().__init__()
        self.width = width
        self.config: dict = {}  # name and options, set by `build_fusion`

    def num_added(self, levels: int) -> int:
        """Number of levels in `Fused.added`, for a connector with that many `levels`."""
        return levels

    def forward(self, text: Tensor, tokens: VisualTokens, visual: Visual) -> Fused:
        """Fuse the embeddings `text` ``(B, T, D)`` of the token ids with the visual tokens of the batch.

        A batch without images has tokens of a stand-in. They must have no effect, but must stay in the graph, and as
        many tensors must be returned as for other batches, so that all ranks make the same calls in both passes.
        """
        raise NotImplementedError


class Concatenation(Fusion):
    """Visual tokens take the place of the text embeddings at their positions (LLaVA, 2023, section 4.1).

    Levels are added to the outputs of the first blocks at the same positions (DeepStack, Meng et al., 2024;
    Qwen3-VL, published code). attention: which positions see each other, one of `vlmtrain.visual.ATTENTION`, which the
    processor says in each batch.
    """

    def __init__(self, width: int, attention: str | None = None):
        super().__init__(width)
        self.attention = attention

    def forward(self, text: Tensor, tokens: VisualTokens, visual: Visual) -> Fused:
        if visual.items:
            embeddings = text.masked_scatter(visual.mask.unsqueeze(-1), tokens.tokens.to(text.dtype))
        else:
            embeddings = text + 0.0 * tokens.tokens.sum().to(text.dtype)
        return Fused(embeddings, tokens.levels, visual.mask)


CONCATENATION = "concatenation"
FUSIONS: Registry[Fusion] = Registry("fusion", Fusion, {CONCATENATION: Concatenation}, "__init__", fixed=("width",))
register = FUSIONS.register


def build_fusion(name: str, width: int, **options) -> Fusion:
    """Build the fusion `name` for a language model of `width`. Raises ValueError for unknown names and options."""
    FUSIONS.check_options(name, options)
    fusion = FUSIONS[name](width, **options)
    fusion.config = {"name": name, "width": width, **options}
    return fusion
