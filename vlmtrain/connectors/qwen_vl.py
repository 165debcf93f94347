"""`qwen_vl_resampler`: one cross-attention layer from learned queries on a grid (Qwen-VL, 2023)."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Features, QueryConnector
from .checks import require_divisible, require_grid, require_positive
from .layers import (
    MULTIHEAD_ATTENTION,
    Attention,
    init_linears,
    init_multihead_attention,
    padded,
    sincos_positions,
)
from .published import Names


class QwenVLResampler(QueryConnector):
    """`grid` x `grid` learned queries attend to all patches (Qwen-VL, section 2.1, and its published code).

    ``(B, H, W, in_dim)`` -> ``(B, grid**2, out_dim)``. A frozen 2-D sine-cosine table, resized bicubically
    to the grid, is added to the keys but not to the values. The attention is followed by ``ln_post`` and ``@ proj``,
    which are part of the vision tower in Qwen-VL. `num_heads` None: out_dim / 128 heads, at least one. The first half
    of the table encodes the column, as in MAE's code, from which Qwen-VL's is derived (unverified).
    """

    PUBLISHED = (
        Names(
            "transformer.visual.",
            ((r"^(?!ln_post|proj$)", "attn_pool."), (r"positions", "pos_embed"), *MULTIHEAD_ATTENTION),
        ),
    )

    def __init__(self, in_dim: int, out_dim: int, grid: int = 16, num_heads: int | None = None):
        super().__init__(in_dim, out_dim)
        num_heads = max(1, out_dim // 128) if num_heads is None else num_heads
        require_positive(grid=grid, num_heads=num_heads)
        require_divisible(out_dim, "out_dim", num_heads, "num_heads")
        if out_dim % 4:
            raise ValueError(
                f"out_dim={out_dim}: expected a multiple of 4 for the sine-cosine positions of qwen_vl_resampler"
            )
        self.grid, self.num_queries = grid, grid * grid
        norm = partial(nn.LayerNorm, out_dim, eps=1e-6)
        self.query = nn.Parameter(torch.empty(self.num_queries, out_dim))
        self.register_buffer("positions", sincos_positions(out_dim, grid, grid))
        self.kv_proj = nn.Identity() if in_dim == out_dim else nn.Linear(in_dim, out_dim, bias=False)
        self.attn = Attention(out_dim, out_dim, num_heads, out_dim // num_heads, out_dim)
        self.ln_q, self.ln_kv, self.ln_post = norm(), norm(), norm()
        self.proj = nn.Parameter(torch.randn(out_dim, out_dim) * out_dim**-0.5)
        init_linears(self, truncated=True)
        init_multihead_attention(self.attn)
        nn.init.trunc_normal_(self.query, std=0.02)

    def output_grid(self, height: int, width: int) -> tuple[int, int]:
        require_grid(height, width)
        return self.grid, self.grid

    def resized_positions(self, height: int, width: int) -> Tensor:
        """Position table of the patches, ``(height*width, out_dim)``."""
        if (height, width) == (self.grid, self.grid):
            return self.positions
        table = self.positions.float().T.reshape(1, self.out_dim, self.grid, self.grid)
        table = F.interpolate(table, size=(height, width), mode="bicubic", align_corners=False)
        return table.flatten(2)[0].T

    def key_positions(self, features: Features) -> Tensor:
        """Position tables of all images, padded as their patches are, or of the grid that they share."""
        if features.grids is None:
            return self.resized_positions(*features.patches.shape[1:3])
        tables = {grid: self.resized_positions(*grid) for grid in set(features.grids)}
        return padded(torch.cat([tables[grid] for grid in features.grids]), features.grids)[0]

    def tokens(self, features: Features) -> Tensor:
        x, real = padded(self.check(features), features.grids)
        x = self.ln_kv(self.kv_proj(x))
        keys = x + self.key_positions(features).to(x.dtype)
        query = (self.ln_q(self.query) + self.positions.to(x.dtype)).expand(len(x), -1, -1)
        mask = None if real is None else real[:, None, None]
        return self.ln_post(self.attn(query, keys, x, mask)) @ self.proj
