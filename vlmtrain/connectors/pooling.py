"""Window pooling: `avgpool` and `attentional_pool` (Molmo2)."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Features, OneCallConnector
from .checks import require_choice, require_divisible, require_not_negative, require_positive, require_window
from .layers import Attention, blocks, each_image, init_linears
from .published import Names


class WindowPool(OneCallConnector):
    """One token per window of `window` x `window` patches; windows at the edges may be partial.

    `forward` takes another `window`, for the frames of a video.
    """

    takes_window = True

    def __init__(self, in_dim: int, out_dim: int, window: int):
        super().__init__(in_dim, out_dim)
        require_positive(window=window)
        self.window = self.multiple = window

    def output_grid(self, height: int, width: int, window: int | None = None) -> tuple[int, int]:
        """Grid of the output tokens; `window` replaces the connector's own."""
        window = self.window if window is None else window
        require_window(height, width, window, "window")
        return -(-height // window), -(-width // window)


class AvgPool(WindowPool):
    """Mean over the patches of each window, then one linear layer (KempnerForge's adapter).

    ``(B, H, W, in_dim)`` -> ``(B, ceil(H/window) * ceil(W/window), out_dim)``.
    """

    def __init__(self, in_dim: int, out_dim: int, window: int = 2):
        super().__init__(in_dim, out_dim, window)
        self.proj = nn.Linear(in_dim, out_dim)

    def tokens(self, features: Features, window: int | None = None) -> Tensor:
        pooled = partial(_means, window or self.window)
        return self.proj(each_image(pooled, self.check(features), features.grids))


def _means(window: int, x: Tensor) -> Tensor:
    """Means of the windows: ``(B, H, W, C)`` -> ``(B, windows, C)``."""
    x = x.permute(0, 3, 1, 2)
    x = F.avg_pool2d(x, window, ceil_mode=True)  # the divisor does not count cells outside the grid
    return x.flatten(2).transpose(1, 2)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)), no biases."""

    def __init__(self, in_dim: int, hidden_dim: int, out_dim: int):
        super().__init__()
        self.gate = nn.Linear(in_dim, hidden_dim, bias=False)
        self.down = nn.Linear(hidden_dim, out_dim, bias=False)
        self.up = nn.Linear(in_dim, hidden_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class AttentionalPool(WindowPool):
    """Attention within each window, with the window's mean as query (Molmo2, 2025, and its published code).

    Reads `levels` hidden layers from ``features.levels``, concatenated deepest first (Molmo2 uses the
    ninth- and third-from-last, so levels=2; ``features.patches`` then only provides the grid). levels=0 reads only
    ``features.patches``. The head is a SwiGLU projector of width `intermediate_size` (None: 3 * out_dim, as in
    Molmo2-8B), or one linear layer with head=linear (KempnerForge's adapter, with levels=0). token_bias: whether a
    learned vector is added to each token, as Molmo2 adds the embedding of the token that stands for an image.
    ``(B, H, W, in_dim)`` -> ``(B, ceil(H/window) * ceil(W/window), out_dim)``; Molmo2 uses window 2 for images
    and 3 for video with the same weights. All linear layers are initialized from a normal distribution with std 0.02.
    """

    PUBLISHED = (
        Names(
            "model.vision_backbone.",
            (
                (r"^pool\.([qkv])\.", r"image_pooling_2d.w\1."),
                (r"^pool\.out\.", "image_pooling_2d.wo."),
                (r"^head\.gate\.", "image_projector.w1."),
                (r"^head\.down\.", "image_projector.w2."),
                (r"^head\.up\.", "image_projector.w3."),
            ),
        ),
        Names(  # Hugging Face
            "model.multi_modal_projector.",
            (
                (r"^pool\.([qkv])\.", r"image_pooling_2d.\1_proj."),
                (r"^pool\.out\.", "image_pooling_2d.o_proj."),
                (r"^head\.(gate|down|up)\.", r"image_projector.\1_proj."),
            ),
        ),
    )

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        window: int = 2,
        num_heads: int = 16,
        head_dim: int | None = None,
        intermediate_size: int | None = None,
        levels: int = 2,
        head: str = "swiglu",
        token_bias: bool = False,
    ):
        super().__init__(in_dim, out_dim, window)
        require_positive(num_heads=num_heads)
        require_not_negative(levels=levels)
        require_choice(head, ("swiglu", "linear"), "head")
        if head_dim is None:
            require_divisible(in_dim, "in_dim", num_heads, "num_heads")
            head_dim = in_dim // num_heads
        intermediate_size = 3 * out_dim if intermediate_size is None else intermediate_size
        require_positive(head_dim=head_dim, intermediate_size=intermediate_size)
        self.num_levels = levels
        width = in_dim * max(levels, 1)
        self.pool = Attention(width, width, num_heads, head_dim, in_dim)
        self.head = SwiGLU(in_dim, intermediate_size, out_dim) if head == "swiglu" else nn.Linear(in_dim, out_dim)
        init_linears(self)
        self.token_bias = nn.Parameter(0.02 * torch.randn(out_dim)) if token_bias else None

    def tokens(self, features: Features, window: int | None = None) -> Tensor:
        patches, grids, window = self.check(features), features.grids, window or self.window
        are_partial = any(side % window for grid in grids or (patches.shape[1:3],) for side in grid)
        x = torch.cat(features.levels[::-1], dim=-1) if self.num_levels else patches
        windows = partial(_windows, window)
        # 1 at patches inside the grid: (..., window**2, 1)
        real = each_image(windows, torch.ones_like(x[..., :1]), grids).flatten(0, -3)
        x = each_image(windows, x, grids)
        shape, x = x.shape[:-2], x.flatten(0, -3)  # all windows as one batch
        query = x.sum(1, keepdim=True) / real.sum(1, keepdim=True)
        mask = real.bool().transpose(1, 2)[:, None] if are_partial else None
        tokens = self.head(self.pool(query, x, x, mask)).reshape(*shape, self.out_dim)
        return tokens if self.token_bias is None else tokens + self.token_bias


def _windows(window: int, x: Tensor) -> Tensor:
    """Windows of a grid padded with zeros: ``(B, H, W, C)`` -> ``(B, windows, window**2, C)``.

    The grid is in the center; of an odd number of padded rows or columns, the last one is below or right (Molmo2).
    """
    edges = [edge for side in (x.shape[2], x.shape[1]) for edge in _edges(-side % window)]
    return blocks(F.pad(x, (0, 0, *edges)), window).flatten(1, 2)


def _edges(missing: int) -> tuple[int, int]:
    return missing // 2, missing - missing // 2
