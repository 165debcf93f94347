"""`c_abstractor`: convolution, pooling, convolution (Honeybee, CVPR 2024)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .base import Connector, VisionFeatures
from .checks import require_fixed_grid, require_positive
from .layers import ConvNorm, SqueezeExcite, mlp
from .published import Names, drop_cls_position


class RegNetBlock(nn.Module):
    """RegNet bottleneck: 1x1, depthwise 3x3, squeeze-and-excite, 1x1; residual (RegNet, and timm's weights)."""

    def __init__(self, in_dim: int, out_dim: int):
        super().__init__()
        self.conv1 = ConvNorm(in_dim, out_dim, activation=nn.SiLU)
        self.conv2 = ConvNorm(out_dim, out_dim, kernel=3, groups=out_dim, activation=nn.SiLU)
        self.se = SqueezeExcite(out_dim, max(1, round(in_dim / 4)), nn.SiLU, nn.Sigmoid)
        self.conv3 = ConvNorm(out_dim, out_dim)
        self.downsample = nn.Identity() if in_dim == out_dim else ConvNorm(in_dim, out_dim)
        self.activation = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.conv3(self.se(self.conv2(self.conv1(x)))) + self.downsample(x))


class CAbstractor(Connector):
    """Positions, `depth` RegNet blocks, pooling to `grid` x `grid`, `depth` blocks and an MLP (Honeybee, section 4.2).

    ``(B, H, W, in_dim)`` -> ``(B, grid**2, out_dim)``. The position table has a fixed size, so H x W must
    equal `input_grid`. The readout has `mlp_depth` linear layers with SiLU.
    """

    PUBLISHED = (
        Names(
            "abstractor.",
            (
                (r"^stage(\d)\.(\d)", lambda match: f"net.{2 * int(match[1]) - 2}.b{int(match[2]) + 1}"),
                (r"\.(conv\d|downsample)\.0\.", r".\1.conv."),
                (r"\.(conv\d|downsample)\.1\.", r".\1.bn."),
            ),
        ),
    )

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        input_grid: tuple[int, int] | None = None,
        grid: int = 12,
        hidden_size: int = 1024,
        depth: int = 3,
        mlp_depth: int = 2,
    ):
        super().__init__(in_dim, out_dim)
        require_positive(grid=grid, hidden_size=hidden_size, depth=depth, mlp_depth=mlp_depth)
        self.grid, self.input_grid = grid, require_fixed_grid(input_grid, input_grid, "c_abstractor")
        self.pos_emb = nn.Parameter(torch.empty(1, self.input_grid[0] * self.input_grid[1], in_dim))
        self.stage1 = nn.Sequential(*(RegNetBlock(hidden_size if i else in_dim, hidden_size) for i in range(depth)))
        self.pool = nn.AdaptiveAvgPool2d(grid)
        self.stage2 = nn.Sequential(*(RegNetBlock(hidden_size, hidden_size) for _ in range(depth)))
        self.readout = mlp([hidden_size, *[out_dim] * mlp_depth], nn.SiLU)
        nn.init.trunc_normal_(self.pos_emb, std=0.02)

    def output_grid(self, height: int, width: int) -> tuple[int, int]:
        require_fixed_grid((height, width), self.input_grid, "c_abstractor")
        return self.grid, self.grid

    def forward(self, features: VisionFeatures) -> Tensor:
        patches = self.check(features)
        x = patches + self.pos_emb.unflatten(1, self.input_grid)
        x = self.stage2(self.pool(self.stage1(x.permute(0, 3, 1, 2))))
        return self.readout(x.flatten(2).transpose(1, 2))

    def load_published(self, state_dict: dict[str, Tensor]) -> None:
        super().load_published(drop_cls_position(state_dict, self.pos_emb.shape[1]))
