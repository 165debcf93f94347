"""`spatial_aggregator`: queries on a grid that read the same place of several encoders (Cambrian-1, 2024)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Connector, VisionFeatures
from .checks import require_built_grid, require_divisible, require_input_grid, require_multiple, require_positive
from .layers import blocks, mlp
from .published import Names


class WindowReader(nn.Module):
    """Keys and values ``(..., S, C)`` of one encoder's windows ``(..., S, C)``.

    Windows of several patches have a learned position per patch, windows of one have none.
    """

    def __init__(self, dim: int, patches: int):
        super().__init__()
        self.register_parameter("positions", nn.Parameter(torch.randn(patches, dim)) if patches > 1 else None)
        self.k, self.v = _normed_linear(dim), _normed_linear(dim)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.positions is not None:
            x = x + self.positions
        return self.k(x), self.v(x)


class AggregationLayer(nn.Module):
    """Each query attends to its windows in all encoders at once, followed by a feed-forward part; residual.

    queries ``(B, Q, C)``, context ``(B, 1, C)``, windows ``(B, Q, S, C)`` of each encoder -> ``(B, Q, C)``.
    """

    def __init__(self, dim: int, num_heads: int, windows: list[int]):
        super().__init__()
        self.num_heads = num_heads
        self.proj_context = nn.Linear(dim, dim, bias=False)
        self.proj_in = nn.Linear(2 * dim, dim, bias=False)
        self.q = _normed_linear(dim)
        self.windows = nn.ModuleList(WindowReader(dim, patches) for patches in windows)
        self.out = nn.Linear(dim, dim, bias=False)
        self.norm = nn.LayerNorm(dim)
        self.proj_out = nn.Sequential(nn.Linear(dim, dim, bias=False), nn.GELU(), nn.Linear(dim, dim, bias=False))

    def forward(self, queries: Tensor, context: Tensor, windows: list[Tensor]) -> Tensor:
        x = self.proj_in(torch.cat([queries, self.proj_context(context).expand_as(queries)], dim=-1))
        read = [reader(window) for reader, window in zip(self.windows, windows, strict=True)]
        keys, values = (torch.cat(parts, dim=2) for parts in zip(*read, strict=True))
        q, k, v = (
            each.flatten(0, 1).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for each in (self.q(x).unsqueeze(2), keys, values)
        )
        attended = F.scaled_dot_product_attention(q, k, v).reshape(
            x.shape
        )  # one query per window: (B * Q, heads, 1, d)
        return queries + self.proj_out(self.norm(x + self.out(attended)))


def _normed_linear(dim: int) -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim, bias=False))


class SpatialAggregator(Connector):
    """Spatial Vision Aggregator (Cambrian-1, Tong et al., 2024, "Spatial Vision Aggregator", and published code).

    `in_dim` is a tuple with one width per encoder, and `forward` takes a tuple of features in the same order; for a
    single encoder, a plain width and plain features are accepted. The image is divided into `grid` x `grid` windows,
    with one query and therefore one token each: ``(B, grid**2, out_dim)``. An MLP with LayerNorm maps the features of
    each encoder to `hidden_size`. In `depth` layers a query attends to the patches of all encoders in its window. All
    queries start from one learned vector; each layer also reads the mean of the first encoder's mapped features.

    Encoders may have different grids: finer ones have more patches in a window. Both sides of every grid must be
    multiples of `grid`. The positions within windows have a fixed size, so the grids must equal `input_grid`: one grid
    per encoder, or one that all share. Cambrian-1 has a 24x24 grid from three encoders, and 96x96 from the fourth.

    Not included: the aggregation layers between the layers of the language model (Cambrian-1: 10 or 9), the newline
    after each row of tokens, further groups of queries (the published models have one), and the mask of padding,
    because all patches are visible here. `load_published` therefore takes neither ``vision_sampler_layers`` nor
    ``image_newline``: remove them from the state dict.
    """

    several_encoders = True
    in_dim: tuple[int, ...]
    PUBLISHED = (
        Names(
            "model.",
            (
                (r"^query$", "vision_query"),
                (r"^projections\.", "mm_projector_aux_"),
                (r"^proj\.", "mm_projector."),
                (r"^layers\.", "vision_sampler_0.layers."),
                (r"\.q\.", ".cross_attn.q_proj."),
                (r"\.out\.", ".cross_attn.o_proj."),
                (r"\.windows\.(\d+)\.positions", r".pos_embed_\1"),
                (r"\.windows\.(\d+)\.(k|v)\.", r".cross_attn.\2_proj_\1."),
                (r"\.proj_out\.0\.", ".proj_out.linear_1."),
                (r"\.proj_out\.2\.", ".proj_out.linear_2."),
            ),
        ),
    )

    def __init__(
        self,
        in_dim: int | tuple[int, ...],
        out_dim: int,
        input_grid: tuple[tuple[int, int], ...] | None = None,
        grid: int = 24,
        hidden_size: int = 1024,
        depth: int = 3,
        num_heads: int = 16,
    ):
        super().__init__((in_dim,) if isinstance(in_dim, int) else tuple(in_dim), out_dim)
        require_positive(grid=grid, hidden_size=hidden_size, depth=depth, num_heads=num_heads)
        require_divisible(hidden_size, "connector.hidden_size", num_heads, "num_heads")
        require_input_grid(input_grid, "spatial_aggregator")
        for sides in input_grid:
            require_multiple(*sides, grid, "grid")
        self.grid, self.input_grid = grid, input_grid
        self.windows = [(height // grid, width // grid) for height, width in input_grid]
        self.projections = nn.ModuleList(
            nn.Sequential(*mlp([width, hidden_size, hidden_size]), nn.LayerNorm(hidden_size)) for width in self.in_dim
        )
        self.query = nn.Parameter(torch.randn(1, hidden_size) * hidden_size**-0.5)
        patches = [height * width for height, width in self.windows]
        self.layers = nn.ModuleList(AggregationLayer(hidden_size, num_heads, patches) for _ in range(depth))
        self.proj = mlp([hidden_size, out_dim, out_dim])

    def output_grid(self, height: int, width: int) -> tuple[int, int]:
        """Grid of the queries; `height` and `width` are the first encoder's. Raises ValueError for other grids."""
        self.check_grid(height, width)
        return self.grid, self.grid

    def check_grid(self, height: int, width: int, encoder: int = 0) -> None:
        require_built_grid(height, width, self.input_grid[encoder], "spatial_aggregator")

    def forward(self, features: VisionFeatures | tuple[VisionFeatures, ...]) -> Tensor:
        encoders = self.check_encoders(features)
        maps = [project(encoder.patches) for project, encoder in zip(self.projections, encoders, strict=True)]
        context = maps[0].flatten(1, 2).mean(1, keepdim=True)
        windows = [blocks(x, *window).flatten(1, 2) for x, window in zip(maps, self.windows, strict=True)]
        queries = self.query.expand(len(context), self.grid**2, -1)
        for layer in self.layers:
            queries = layer(queries, context, windows)
        return self.proj(queries)
