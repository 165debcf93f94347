"""A connector for images cut into tiles: the tokens of the tiles form one grid, with a newline token after each row."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..connectors import Features
from ..connectors.base import are_several
from ..tiling import Tiles, kept_grid, shown_part
from ..visual import Placement


class TiledConnector(nn.Module):
    """Applies `connector` to every item and adds a learned newline (LLaVA-NeXT, published code, ``image_newline``).

    If the tokens of the connector form no grid, those of all items are concatenated without newlines. Levels for the
    language model are joined like the tokens; at newlines they are zero.
    """

    joins_tiles = True

    def __init__(self, connector: nn.Module):
        super().__init__()
        self.connector = connector
        self.in_dim, self.out_dim, self.num_levels = connector.in_dim, connector.out_dim, connector.num_levels
        self.num_added, self.multiple = connector.num_added, connector.multiple
        self.reads_text = connector.reads_text
        self.newline = nn.Parameter(torch.randn(connector.out_dim) / connector.out_dim**0.5)

    @property
    def config(self) -> dict:
        return {**self.connector.config, "newline": True}

    def num_tokens(self, height: int, width: int) -> int:
        return self.connector.num_tokens(height, width)

    def output_grid(self, height: int, width: int) -> tuple[int, int] | None:
        return self.connector.output_grid(height, width)

    def framed_grid(self, height: int, width: int) -> tuple[int, int] | None:
        return self.connector.framed_grid(height, width)

    def forward(
        self, features: Features, placements: Sequence[Placement] = (), **options
    ) -> Tensor | tuple[Tensor, tuple[Tensor, ...]]:
        """Tokens ``(V, n, D)`` of V items, or ``(K, D)`` if the `placements` have tiles, whose tokens are joined.

        options: further arguments of the connector. A connector with levels for the language model returns a pair.
        """
        found = self.connector(features, **options)
        tokens, levels = (found, ()) if isinstance(found, Tensor) else found
        if not any(placement.tiles for placement in placements):
            tokens = tokens + 0.0 * self.newline  # keeps the newline in the graph, as on ranks whose batch has tiles
        else:
            first = features[0] if are_several(features) else features
            grid = self.connector.output_grid(*first.patches.shape[1:3])
            tokens = _joined(tokens, self.newline, placements, grid)
            levels = tuple(_joined(level, torch.zeros_like(self.newline), placements, grid) for level in levels)
        return (tokens, levels) if levels else tokens


def _joined(tokens: Tensor, newline: Tensor, placements: Sequence[Placement], grid: tuple[int, int] | None) -> Tensor:
    images = tokens.split([len(placement.items) for placement in placements])
    return torch.cat([_assemble(items, newline, each.tiles, grid) for items, each in zip(images, placements)])


def _assemble(items: Tensor, newline: Tensor, tiles: Tiles, grid: tuple[int, int] | None) -> Tensor:
    whole, parts = items[0], items[1:]
    if grid is None:
        return items.flatten(0, 1)
    if tiles.views == 1:
        return torch.cat([whole, newline.to(whole.dtype)[None]])
    rows, columns = tiles.rows * grid[0], tiles.columns * grid[1]
    canvas = parts.unflatten(1, grid).unflatten(0, (tiles.rows, tiles.columns))
    canvas = canvas.transpose(1, 2).reshape(rows, columns, -1)  # (rows, h, columns, w, D) flattened
    top, bottom, left, right = shown_part((rows, columns), (tiles.height, tiles.width))
    shown = canvas[top:bottom, left:right]
    kept = kept_grid(tiles, shown.shape[:2], grid)
    if kept != shown.shape[:2]:
        shown = F.interpolate(shown.movedim(-1, 0)[None], kept, mode="bilinear")[0].movedim(0, -1)
    newlines = newline.to(shown.dtype).expand(len(shown), 1, -1)
    return torch.cat([whole, torch.cat([shown, newlines], dim=1).flatten(0, 1)])
