"""Patch mergers of the Qwen family and `pixel_shuffle`: each square of patches becomes one wide token.

In the published Qwen code the processor has already put patches into block order, and consecutive rows are merged.
Here patches are in raster order and the squares are extracted explicitly, with the same result.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from .base import Features, OneCallConnector
from .checks import require_choice, require_multiple, require_not_negative, require_positive
from .layers import blocks, each_image, mlp
from .published import Names


def merge(x: Tensor, factor: int, grids: Sequence[tuple[int, int]] | None = None) -> Tensor:
    """(B, H, W, C) -> (B, H*W / factor**2, factor**2 * C); the patches of a square are in raster order.

    With `grids`, x is packed: (N, C) -> (N / factor**2, factor**2 * C).
    """
    return each_image(lambda image: blocks(image, factor).flatten(3).flatten(1, 2), x, grids)


class BlockMerge(OneCallConnector):
    """One token per square of `factor` x `factor` patches. Both sides of the grid must be multiples of `factor`."""

    def __init__(self, in_dim: int, out_dim: int, factor: int):
        super().__init__(in_dim, out_dim)
        require_positive(factor=factor)
        self.factor = self.multiple = factor
        self.merged_dim = in_dim * factor**2

    def output_grid(self, height: int, width: int) -> tuple[int, int]:
        require_multiple(height, width, self.factor, "factor")
        return height // self.factor, width // self.factor


class Qwen2VLMerger(BlockMerge):
    """LayerNorm per patch, merge, two linear layers with GELU (Qwen2-VL, 2024, published code).

    ``(B, H, W, in_dim)`` -> ``(B, H*W / factor**2, out_dim)``.
    """

    PUBLISHED = (Names("model.visual.merger."),)
    norm: type[nn.Module] = nn.LayerNorm

    def __init__(self, in_dim: int, out_dim: int, factor: int = 2):
        super().__init__(in_dim, out_dim, factor)
        self.ln_q = self.norm(in_dim, eps=1e-6)
        self.mlp = mlp([self.merged_dim, self.merged_dim, out_dim])

    def tokens(self, features: Features) -> Tensor:
        return self.mlp(merge(self.ln_q(self.check(features)), self.factor, features.grids))


class Qwen25VLMerger(Qwen2VLMerger):
    """`qwen2_vl_merger` with RMSNorm (Qwen2.5-VL, 2025, section 2.1 and published code)."""

    norm = nn.RMSNorm


class Qwen3Merger(nn.Module):
    """Merge and two linear layers with GELU; LayerNorm before the merge, or after it (DeepStack)."""

    def __init__(self, in_dim: int, out_dim: int, factor: int, norm_after: bool):
        super().__init__()
        merged_dim = in_dim * factor**2
        self.factor, self.norm_after = factor, norm_after
        self.norm = nn.LayerNorm(merged_dim if norm_after else in_dim, eps=1e-6)
        self.linear_fc1 = nn.Linear(merged_dim, merged_dim)
        self.linear_fc2 = nn.Linear(merged_dim, out_dim)

    def forward(self, x: Tensor, grids: Sequence[tuple[int, int]] | None = None) -> Tensor:
        x = self.norm(merge(x, self.factor, grids)) if self.norm_after else merge(self.norm(x), self.factor, grids)
        return self.linear_fc2(F.gelu(self.linear_fc1(x)))


class Qwen3VLMerger(BlockMerge):
    """Merger with DeepStack (Qwen3-VL, 2025, section 2 and published code).

    ``(B, H, W, in_dim)`` -> ``(B, H*W / factor**2, out_dim)``; with `levels` above 0 (Qwen3-VL: 3) it returns a
    pair: these tokens, and a tuple of `levels` tensors of the same shape made from ``features.levels``, which are
    added to the hidden states of the first layers of the language model.
    """

    PUBLISHED = (Names("model.visual."), Names("", ((r"^merger\.", ""),)))

    def __init__(self, in_dim: int, out_dim: int, factor: int = 2, levels: int = 0):
        super().__init__(in_dim, out_dim, factor)
        require_not_negative(levels=levels)
        self.num_levels = self.num_added = levels
        self.merger = Qwen3Merger(in_dim, out_dim, factor, norm_after=False)
        self.deepstack_merger_list = nn.ModuleList(
            Qwen3Merger(in_dim, out_dim, factor, norm_after=True) for _ in range(levels)
        )

    def tokens(self, features: Features) -> Tensor | tuple[Tensor, tuple[Tensor, ...]]:
        tokens = self.merger(self.check(features), features.grids)
        if not self.num_levels:
            return tokens
        levels = zip(self.deepstack_merger_list, features.levels, strict=True)
        return tokens, tuple(merger(level, features.grids) for merger, level in levels)


class PixelShuffle(BlockMerge):
    """Space to channels, then a projection. The channel order differs from torch's `pixel_unshuffle`.

    ``(B, H, W, in_dim)`` -> ``(B, H*W / factor**2, out_dim)``. head=linear is one layer without bias (Idefics3,
    2024, section 3.1; nanoVLM); head=internvl is LayerNorm and two layers with GELU (InternVL 1.5, 2024).
    """

    PUBLISHED = (
        Names("model.connector.modality_projection.", ((r"^head\.", "proj."),)),
        Names("MP.proj.", ((r"^head\.", ""),)),
        Names(
            "model.multi_modal_projector.",
            ((r"^head\.0", "layer_norm"), (r"^head\.1\.0", "linear_1"), (r"^head\.1\.2", "linear_2")),
        ),
        Names("mlp1.", ((r"^head\.0", "0"), (r"^head\.1\.0", "1"), (r"^head\.1\.2", "3"))),
    )

    def __init__(self, in_dim: int, out_dim: int, factor: int = 2, head: str = "linear"):
        super().__init__(in_dim, out_dim, factor)
        require_choice(head, ("linear", "internvl"), "head")
        if head == "linear":
            self.head: nn.Module = nn.Linear(self.merged_dim, out_dim, bias=False)
        else:
            self.head = nn.Sequential(nn.LayerNorm(self.merged_dim), mlp([self.merged_dim, out_dim, out_dim]))

    def tokens(self, features: Features) -> Tensor:
        return self.head(merge(self.check(features), self.factor, features.grids))
