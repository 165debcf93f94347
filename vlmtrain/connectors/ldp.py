"""Lightweight downsample projectors: `ldp` (MobileVLM, 2023) and `ldpv2` (MobileVLM V2, 2024)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from .base import Connector, VisionFeatures
from .checks import require_grid, require_positive
from .layers import ConvNorm, SqueezeExcite, mlp
from .published import Names


def _squeezed(dim: int) -> int:
    """A quarter of `dim`, rounded to a multiple of 8 that is at most 10% smaller (MobileNet's rule)."""
    quarter = dim // 4
    rounded = max(8, (quarter + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * quarter else rounded


class DepthwiseBlock(nn.Module):
    """Depthwise 3x3, hard-swish, squeeze-and-excite, 1x1; residual at stride 1 (MobileNetV3 with LayerNorm)."""

    def __init__(self, dim: int, stride: int):
        super().__init__()
        self.residual = stride == 1
        self.block = nn.Sequential(
            ConvNorm(dim, dim, kernel=3, stride=stride, groups=dim, activation=nn.Hardswish),
            SqueezeExcite(dim, _squeezed(dim), nn.ReLU, nn.Hardsigmoid),
            ConvNorm(dim, dim),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.block(x) if self.residual else self.block(x)


class LDP(Connector):
    """Two linear layers, then two depthwise blocks, the second with stride 2 (MobileVLM, section 3.4).

    ``(B, H, W, in_dim)`` -> ``(B, ceil(H/2) * ceil(W/2), out_dim)``.
    """

    PUBLISHED = (
        Names(
            "model.mm_projector.model.",
            (
                # The published nn.Sequential starts with an identity.
                (r"^(mlp|mb_block)\.(\d)\.", lambda match: f"{match[1]}.{int(match[2]) + 1}."),
            ),
        ),
    )

    def __init__(self, in_dim: int, out_dim: int):
        super().__init__(in_dim, out_dim)
        self.mlp = mlp([in_dim, out_dim, out_dim])
        self.mb_block = nn.Sequential(DepthwiseBlock(out_dim, stride=1), DepthwiseBlock(out_dim, stride=2))

    def output_grid(self, height: int, width: int) -> tuple[int, int]:
        require_grid(height, width)
        return -(-height // 2), -(-width // 2)

    def forward(self, features: VisionFeatures) -> Tensor:
        x = self.mlp(self.check(features)).permute(0, 3, 1, 2)
        return self.mb_block(x).flatten(2).transpose(1, 2)


class LDPv2(Connector):
    """Two linear layers, pooling to `grid` x `grid`, then a depthwise 3x3 added (MobileVLM V2, section 3.3).

    ``(B, H, W, in_dim)`` -> ``(B, grid**2, out_dim)``; a smaller patch grid is upsampled.
    """

    PUBLISHED = (Names("model.mm_projector.", ((r"^mlp\.", "mlp.mlp."), (r"^peg\.", "peg.peg.0."))),)

    def __init__(self, in_dim: int, out_dim: int, grid: int = 12):
        super().__init__(in_dim, out_dim)
        require_positive(grid=grid)
        self.grid = grid
        self.mlp = mlp([in_dim, out_dim, out_dim])
        self.peg = nn.Conv2d(out_dim, out_dim, 3, padding=1, groups=out_dim)

    def output_grid(self, height: int, width: int) -> tuple[int, int]:
        require_grid(height, width)
        return self.grid, self.grid

    def forward(self, features: VisionFeatures) -> Tensor:
        x = self.mlp(self.check(features)).permute(0, 3, 1, 2)
        x = F.adaptive_avg_pool2d(x, self.grid)
        return (self.peg(x) + x).flatten(2).transpose(1, 2)
