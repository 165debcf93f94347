"""`hunyuan_merger`: convolutional merge with newline, begin and end tokens (HunyuanOCR, 2025)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .base import Connector, VisionFeatures
from .checks import require_positive, require_window
from .published import Names


class HunyuanMerger(Connector):
    """RMSNorm, strided convolution, one newline per row, linear, begin and end, RMSNorm (HunyuanOCR, published code).

    ``(B, H, W, in_dim)`` -> ``(B, 2 + (H//factor) * (W//factor + 1), out_dim)``; an incomplete last row or column
    is dropped. The published ``image_sep`` is not used in the computation and is kept as a buffer. The special
    tokens are initialized from a normal distribution with std out_dim**-0.5 (unverified).
    """

    PUBLISHED = (
        Names("vit.perceive."),
        Names("model.vision_tower.patch_merger.", ((r"^proj\.0\.", "proj_conv."), (r"^proj\.2\.", "proj_out."))),
    )

    def __init__(self, in_dim: int, out_dim: int, factor: int = 2):
        super().__init__(in_dim, out_dim)
        require_positive(factor=factor)
        self.factor = self.multiple = factor
        self.before_rms = nn.RMSNorm(in_dim, eps=1e-5)
        self.proj = nn.Sequential(
            nn.Conv2d(in_dim, 2 * in_dim, factor, stride=factor), nn.GELU(), nn.Conv2d(2 * in_dim, 4 * in_dim, 1)
        )
        self.mlp = nn.Linear(4 * in_dim, out_dim)
        scale = out_dim**-0.5
        self.image_newline = nn.Parameter(torch.randn(4 * in_dim) * scale)
        self.image_begin = nn.Parameter(torch.randn(out_dim) * scale)
        self.image_end = nn.Parameter(torch.randn(out_dim) * scale)
        self.register_buffer("image_sep", torch.randn(out_dim) * scale)
        self.after_rms = nn.RMSNorm(out_dim, eps=1e-5)

    def output_grid(self, height: int, width: int) -> None:
        require_window(height, width, self.factor, "factor")

    def framed_grid(self, height: int, width: int) -> tuple[int, int]:
        self.output_grid(height, width)
        return height // self.factor, width // self.factor + 1

    def num_tokens(self, height: int, width: int) -> int:
        rows, columns = self.framed_grid(height, width)
        return 2 + rows * columns

    def forward(self, features: VisionFeatures) -> Tensor:
        x = self.before_rms(self.check(features)).permute(0, 3, 1, 2)
        x = self.proj(x).permute(0, 2, 3, 1)  # (B, h, w, 4C)
        newline = self.image_newline.expand(*x.shape[:2], 1, -1)
        x = self.mlp(torch.cat([x, newline], dim=2).flatten(1, 2))
        begin, end = (token.expand(len(x), 1, -1) for token in (self.image_begin, self.image_end))
        return self.after_rms(torch.cat([begin, x, end], dim=1))
