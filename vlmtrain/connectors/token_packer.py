"""`token_packer`: coarse queries that each attend to their own region of several layers (TokenPacker, 2024)."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Features
from .checks import require_divisible, require_positive
from .layers import (
    MULTIHEAD_ATTENTION,
    Attention,
    blocks,
    each_image,
    init_linears,
    init_multihead_attention,
    mlp,
)
from .mergers import BlockMerge
from .published import Names


class TokenPacker(BlockMerge):
    """Point-to-region attention (TokenPacker, section 3.2 and published code).

    ``(B, H, W, in_dim)`` -> ``(B, H*W / factor**2, out_dim)``. The queries are ``features.patches``, resized
    bilinearly to 1/factor; the keys and values of a query come from its `factor` x `factor` patches in the
    `levels` layers of ``features.levels``, concatenated shallow to deep (published: layers 12, 16, 22 and 23 of CLIP
    ViT-L). Attention has width `hidden_size`; `num_heads` None: hidden_size / 128 heads, at least one.
    """

    PUBLISHED = (
        Names(
            "model.mm_projector.",
            (
                (r"^(q|k|v)_proj\.", r"\1_proj_1."),
                (r"^ln_(q|k|v)\.", r"ln_\1_1."),
                *MULTIHEAD_ATTENTION,
                (r"^attn\.", "clip_attn."),
            ),
        ),
    )

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        factor: int = 2,
        hidden_size: int = 1024,
        num_heads: int | None = None,
        levels: int = 4,
    ):
        super().__init__(in_dim, out_dim, factor)
        require_positive(hidden_size=hidden_size, levels=levels)
        num_heads = max(1, hidden_size // 128) if num_heads is None else num_heads
        require_positive(num_heads=num_heads)
        require_divisible(hidden_size, "connector.hidden_size", num_heads, "num_heads")
        self.num_levels = levels
        norm = partial(nn.LayerNorm, hidden_size, eps=1e-6)
        self.q_proj = nn.Linear(in_dim, hidden_size, bias=False)
        self.k_proj = mlp([levels * in_dim, hidden_size, hidden_size])
        self.v_proj = mlp([levels * in_dim, hidden_size, hidden_size])
        self.ln_q, self.ln_k, self.ln_v = norm(), norm(), norm()
        self.attn = Attention(hidden_size, hidden_size, num_heads, hidden_size // num_heads, hidden_size)
        self.mlp = mlp([hidden_size, out_dim, out_dim])
        init_linears(self, truncated=True)
        init_multihead_attention(self.attn)

    def coarse(self, x: Tensor) -> Tensor:
        """Resize to one patch per region: ``(B, H, W, C)`` -> ``(B, regions, C)``."""
        grid = self.output_grid(*x.shape[1:3])
        coarse = F.interpolate(x.permute(0, 3, 1, 2).float(), size=grid, mode="bilinear").to(x.dtype)
        return coarse.permute(0, 2, 3, 1).flatten(1, 2)

    def regions(self, x: Tensor) -> Tensor:
        """``(B, H, W, C)`` -> ``(B, regions, factor**2, C)``."""
        return blocks(x, self.factor).flatten(1, 2)

    def tokens(self, features: Features) -> Tensor:
        patches, grids = self.check(features), features.grids
        query = self.ln_q(self.q_proj(each_image(self.coarse, patches, grids)))
        levels = torch.cat(features.levels, dim=-1)
        key, value = (
            each_image(self.regions, norm(proj(levels)), grids).flatten(0, -3)  # all regions as one batch
            for norm, proj in ((self.ln_k, self.k_proj), (self.ln_v, self.v_proj))
        )
        return self.mlp(self.attn(query.flatten(0, -2).unsqueeze(1), key, value).reshape(query.shape))
