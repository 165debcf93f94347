"""Honeybee's abstractors (CVPR 2024): `c_abstractor`, convolution, pooling, convolution; and `d_abstractor`, deformable
attention from queries on a grid (Deformable DETR, 2021).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Connector, VisionFeatures
from .checks import (
    require_built_grid,
    require_divisible,
    require_fraction,
    require_grid,
    require_input_grid,
    require_positive,
)
from .layers import Attention, ConvNorm, SqueezeExcite, mlp
from .published import Names


class Abstractor(Connector):
    """Tokens on a `grid` x `grid` from patches with learned positions (Honeybee, section 4.2).

    The position table has a fixed size, so H x W must equal `input_grid`.
    """

    name: str

    def __init__(self, in_dim: int, out_dim: int, input_grid: tuple[int, int] | None, grid: int):
        super().__init__(in_dim, out_dim)
        require_positive(grid=grid)
        require_input_grid(input_grid, self.name)
        require_grid(*input_grid)
        self.grid, self.input_grid = grid, tuple(input_grid)

    def output_grid(self, height: int, width: int) -> tuple[int, int]:
        require_built_grid(height, width, self.input_grid, self.name)
        return self.grid, self.grid

    def load_published(self, state_dict: dict[str, Tensor]) -> None:
        """Load weights under their published names; the CLS position in the tables of older ones is dropped."""
        with_cls = self.input_grid[0] * self.input_grid[1] + 1

        def has_cls(name: str, tensor: Tensor) -> bool:
            return name.endswith("pos_emb") and tensor.ndim == 3 and tensor.shape[1] == with_cls

        super().load_published({name: t[:, 1:] if has_cls(name, t) else t for name, t in state_dict.items()})


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


class CAbstractor(Abstractor):
    """Positions, `depth` RegNet blocks, pooling to `grid` x `grid`, `depth` blocks and an MLP (Honeybee, section 4.2).

    ``(B, H, W, in_dim)`` -> ``(B, grid**2, out_dim)``. The readout has `mlp_depth` linear layers with SiLU.
    """

    name = "c_abstractor"
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
        super().__init__(in_dim, out_dim, input_grid, grid)
        require_positive(hidden_size=hidden_size, depth=depth, mlp_depth=mlp_depth)
        self.pos_emb = nn.Parameter(torch.empty(1, self.input_grid[0] * self.input_grid[1], in_dim))
        self.stage1 = nn.Sequential(*(RegNetBlock(hidden_size if i else in_dim, hidden_size) for i in range(depth)))
        self.pool = nn.AdaptiveAvgPool2d(grid)
        self.stage2 = nn.Sequential(*(RegNetBlock(hidden_size, hidden_size) for _ in range(depth)))
        self.readout = mlp([hidden_size, *[out_dim] * mlp_depth], nn.SiLU)
        nn.init.trunc_normal_(self.pos_emb, std=0.02)

    def forward(self, features: VisionFeatures) -> Tensor:
        patches = self.check(features)
        x = patches + self.pos_emb.unflatten(1, self.input_grid)
        x = self.stage2(self.pool(self.stage1(x.permute(0, 3, 1, 2))))
        return self.readout(x.flatten(2).transpose(1, 2))


class DeformableAttention(nn.Module):
    """Each query samples `num_points` points per head near its reference point and combines them.

    query ``(B, Q, C)``, reference ``(1, Q, 2)`` as (x, y) in 0..1, features ``(B, H, W, C)`` -> ``(B, Q, C)``.
    Points outside the grid count as zero. Sampling is done in float32 (Deformable DETR, section 4.1).
    """

    def __init__(self, dim: int, num_heads: int, num_points: int):
        super().__init__()
        self.num_heads, self.num_points = num_heads, num_points
        self.sampling_offsets = nn.Linear(dim, num_heads * num_points * 2)
        self.attention_weights = nn.Linear(dim, num_heads * num_points)
        self.value_proj, self.output_proj = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self._init()

    @torch.no_grad()
    def _init(self) -> None:
        """Place point i of a head i steps from the reference; the directions of the heads are evenly spaced."""
        angles = torch.arange(self.num_heads) * (2 * math.pi / self.num_heads)
        directions = torch.stack([angles.cos(), angles.sin()], dim=-1)
        directions = directions / directions.abs().amax(-1, keepdim=True)
        steps = torch.arange(1, self.num_points + 1)
        self.sampling_offsets.bias.copy_((directions[:, None] * steps[:, None]).flatten())
        for weight in (self.sampling_offsets.weight, *self.attention_weights.parameters()):
            nn.init.zeros_(weight)
        for layer in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, query: Tensor, reference: Tensor, features: Tensor) -> Tensor:
        batch, height, width, channels = features.shape
        heads, points = self.num_heads, self.num_points
        values = self.value_proj(features).permute(0, 3, 1, 2).reshape(batch * heads, -1, height, width)
        offsets = self.sampling_offsets(query).float().unflatten(-1, (heads, points, 2))
        weights = self.attention_weights(query).float().unflatten(-1, (heads, points)).softmax(-1)
        places = reference.float()[:, :, None, None] + offsets / offsets.new_tensor([width, height])
        places = (2 * places - 1).transpose(1, 2).flatten(0, 1)  # (B * heads, Q, points, 2) in -1..1
        sampled = F.grid_sample(values.float(), places, align_corners=False)  # (B * heads, C / heads, Q, points)
        mixed = (sampled * weights.transpose(1, 2).flatten(0, 1)[:, None]).sum(-1)
        return self.output_proj(mixed.reshape(batch, channels, -1).transpose(1, 2).to(query.dtype))


class DeformableLayer(nn.Module):
    """Self-attention among queries, deformable attention to the image, feed-forward; post-norm."""

    def __init__(self, dim: int, num_heads: int, num_points: int, intermediate_size: int, dropout: float):
        super().__init__()
        self.self_attn = Attention(dim, dim, num_heads, dim // num_heads, dim)
        self.self_attn_layer_norm = nn.LayerNorm(dim)
        self.encoder_attn = DeformableAttention(dim, num_heads, num_points)
        self.encoder_attn_layer_norm = nn.LayerNorm(dim)
        self.fc1, self.fc2 = nn.Linear(dim, intermediate_size), nn.Linear(intermediate_size, dim)
        self.final_layer_norm = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, position: Tensor, reference: Tensor, features: Tensor) -> Tensor:
        placed = x + position
        x = self.self_attn_layer_norm(x + self.dropout(self.self_attn(placed, placed, x)))
        x = self.encoder_attn_layer_norm(x + self.dropout(self.encoder_attn(x + position, reference, features)))
        return self.final_layer_norm(x + self.dropout(self.fc2(F.relu(self.fc1(x)))))


class DAbstractor(Abstractor):
    """`depth` deformable decoder layers over `grid` x `grid` queries (Honeybee, section 4.2 and published code).

    ``(B, H, W, in_dim)`` -> ``(B, grid**2, out_dim)``. Reference points are learned and start on a
    regular grid. Queries start from a learned table; in every layer their positions are the image pooled to their
    grid. Linear layers from in_dim and to out_dim exist only if that width differs from `hidden_size`.
    """

    name = "d_abstractor"
    PUBLISHED = (
        Names(
            "abstractor.",
            (
                (r"self_attn\.([qkv]|out)\.", r"self_attn.\1_proj."),
                (r"^input_proj\.", "input_proj.0."),
                (r"^target$", "query_position_embeddings.weight"),
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
        depth: int = 6,
        num_heads: int = 8,
        num_points: int = 4,
        intermediate_size: int = 1024,
        dropout: float = 0.1,
    ):
        super().__init__(in_dim, out_dim, input_grid, grid)
        require_positive(
            hidden_size=hidden_size,
            depth=depth,
            num_heads=num_heads,
            num_points=num_points,
            intermediate_size=intermediate_size,
        )
        require_divisible(hidden_size, "connector.hidden_size", num_heads, "num_heads")
        require_fraction(dropout=dropout)
        self.input_proj = nn.Identity() if in_dim == hidden_size else nn.Linear(in_dim, hidden_size)
        self.v_pos_emb = nn.Parameter(torch.empty(1, self.input_grid[0] * self.input_grid[1], hidden_size))
        self.target = nn.Parameter(torch.randn(grid * grid, hidden_size))
        self.reference_points = nn.Parameter(self._reference_grid())
        self.layers = nn.ModuleList(
            DeformableLayer(hidden_size, num_heads, num_points, intermediate_size, dropout) for _ in range(depth)
        )
        self.output_proj = nn.Identity() if out_dim == hidden_size else nn.Linear(hidden_size, out_dim)
        nn.init.trunc_normal_(self.v_pos_emb, std=0.02)

    def _reference_grid(self) -> Tensor:
        """Reference points ``(1, grid**2, 2)`` as (x, y), from the center of the first patch to that of the last."""
        height, width = self.input_grid
        # torch.linspace is not used here: transformers patches it while loading a model, and torch may cache the patch
        # for the rest of the process, so a connector built on the meta device would have this tensor on the CPU.
        steps = torch.arange(self.grid) / max(self.grid - 1, 1)
        y = (0.5 + steps * (height - 1)) / height
        x = (0.5 + steps * (width - 1)) / width
        return torch.stack([x.repeat(self.grid), y.repeat_interleave(self.grid)], dim=-1)[None]

    def forward(self, features: VisionFeatures) -> Tensor:
        x = self.input_proj(self.check(features)) + self.v_pos_emb.unflatten(1, self.input_grid)
        position = F.adaptive_avg_pool2d(x.permute(0, 3, 1, 2), self.grid).flatten(2).transpose(1, 2)
        tokens = self.target.expand(len(x), -1, -1)
        for layer in self.layers:
            tokens = layer(tokens, position, self.reference_points, x)
        return self.output_proj(tokens)
