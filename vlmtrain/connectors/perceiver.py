"""`perceiver_resampler` and `idefics_resampler`: latents that repeatedly attend to patches and to themselves."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Features, QueryConnector
from .checks import require_positive
from .layers import Attention, padded, sequences
from .published import Names


class PerceiverLayer(nn.Module):
    """Latents attend to [patches; latents], followed by a feed-forward layer; pre-norm, residual, no biases."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        head_dim: int,
        intermediate_size: int,
        activation: type[nn.Module] = nn.GELU,
        qk_norm: bool = False,
    ):
        super().__init__()
        self.norm_media, self.norm_latents = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = Attention(dim, dim, num_heads, head_dim, dim, bias=False, qk_norm=qk_norm)
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(dim),
            nn.Linear(dim, intermediate_size, bias=False),
            activation(),
            nn.Linear(intermediate_size, dim, bias=False),
        )

    def forward(self, latents: Tensor, x: Tensor, mask: Tensor | None) -> Tensor:
        normed = self.norm_latents(latents)
        keys = torch.cat([self.norm_media(x), normed], dim=1)
        latents = latents + self.attention(normed, keys, keys, mask)
        return latents + self.feed_forward(latents)


class Resampler(QueryConnector):
    """`num_queries` latents pass through `depth` layers of width in_dim, then a linear layer unless that is out_dim."""

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        num_queries: int,
        depth: int,
        num_heads: int,
        head_dim: int,
        intermediate_size: int | None = None,
        activation: type[nn.Module] = nn.GELU,
        qk_norm: bool = False,
    ):
        super().__init__(in_dim, out_dim)
        intermediate_size = 4 * in_dim if intermediate_size is None else intermediate_size
        require_positive(
            num_queries=num_queries,
            depth=depth,
            num_heads=num_heads,
            head_dim=head_dim,
            intermediate_size=intermediate_size,
        )
        self.num_queries = num_queries
        self.latents = nn.Parameter(torch.randn(num_queries, in_dim))
        self.layers = nn.ModuleList(
            PerceiverLayer(in_dim, num_heads, head_dim, intermediate_size, activation, qk_norm) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(in_dim)
        self.proj = nn.Identity() if in_dim == out_dim else nn.Linear(in_dim, out_dim)

    def resample(self, x: Tensor, real: Tensor | None) -> Tensor:
        """Tokens ``(B, num_queries, out_dim)`` from sequences ``(B, S, in_dim)`` and their mask, see `padded`."""
        # The keys are [patches; latents].
        mask = None if real is None else F.pad(real, (0, self.num_queries), value=True)[:, None, None]
        latents = self.latents.expand(len(x), -1, -1)
        for layer in self.layers:
            latents = layer(latents, x, mask)
        return self.proj(self.norm(latents))


class PerceiverResampler(Resampler):
    """`num_queries` latents pass through `depth` layers (Flamingo, section 3.1.1 and appendix A.1.1).

    ``(B, H, W, in_dim)`` -> ``(B, num_queries, out_dim)``, for any grid. The layers have width in_dim, their
    feed-forward parts `intermediate_size` (None: 4 * in_dim). Flamingo has no linear layer to out_dim, because its
    cross-attention reads latents of width in_dim. Here such a layer follows unless in_dim equals out_dim, and
    `load_published` does not change it.
    """

    PUBLISHED = (
        Names(
            "perceiver.",
            (
                (r"^layers\.(\d+)\.feed_forward\.", r"layers.\1.1."),
                (r"^layers\.(\d+)\.norm_", r"layers.\1.0.norm_"),
                (r"^layers\.(\d+)\.attention\.q\.", r"layers.\1.0.to_q."),
                (r"^layers\.(\d+)\.attention\.[kv]\.", r"layers.\1.0.to_kv."),
                (r"^layers\.(\d+)\.attention\.out\.", r"layers.\1.0.to_out."),
            ),
            unpublished=r"^proj\.",
        ),
    )

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        num_queries: int = 64,
        depth: int = 6,
        num_heads: int = 8,
        head_dim: int = 64,
        intermediate_size: int | None = None,
    ):
        super().__init__(in_dim, out_dim, num_queries, depth, num_heads, head_dim, intermediate_size)

    def tokens(self, features: Features) -> Tensor:
        return self.resample(*padded(self.check(features), features.grids))


class IdeficsResampler(Resampler):
    """`PerceiverResampler` with ReLU, and if `qk_norm` LayerNorm of the queries and keys of each head (IDEFICS, 2023).

    Source: published code. ``features.prefix`` (CLS) is read as well, before the patches. Feed-forward parts are
    4 * in_dim wide.
    """

    PUBLISHED = (
        Names(
            "model.perceiver_resampler.",
            (
                (r"^layers\.(\d+)\.feed_forward\.0\.", r"blocks.\1.1.ln."),
                (r"^layers\.(\d+)\.feed_forward\.1\.", r"blocks.\1.1.fc."),
                (r"^layers\.(\d+)\.feed_forward\.3\.", r"blocks.\1.1.c_proj."),
                (r"^layers\.(\d+)\.norm_media\.", r"blocks.\1.0.context_layer_norm."),
                (r"^layers\.(\d+)\.norm_latents\.", r"blocks.\1.0.latents_layer_norm."),
                (r"^layers\.(\d+)\.attention\.out\.", r"blocks.\1.0.output_proj."),
                (r"^layers\.(\d+)\.attention\.([qk])_norm\.", r"blocks.\1.0.\2_layer_norm."),
                (r"^layers\.(\d+)\.attention\.([qkv])\.", r"blocks.\1.0.\2_proj."),
                (r"^norm\.", "layer_norm."),
            ),
            unpublished=r"^proj\.",
        ),
    )

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        num_queries: int = 64,
        depth: int = 6,
        num_heads: int = 16,
        head_dim: int = 96,
        qk_norm: bool = True,
    ):
        sizes = (num_queries, depth, num_heads, head_dim)
        super().__init__(in_dim, out_dim, *sizes, activation=nn.ReLU, qk_norm=qk_norm)

    def tokens(self, features: Features) -> Tensor:
        self.check(features)
        return self.resample(*sequences(features))
