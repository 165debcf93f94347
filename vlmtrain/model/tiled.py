"""A connector for images cut into tiles: the tokens of the tiles form one grid, with a newline token after each row."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..connectors import VisionFeatures
from ..tiling import Tiles, kept_grid, shown_part


class TiledConnector(nn.Module):
    """Applies `connector` to every view and adds a learned newline (LLaVA-NeXT, published code, ``image_newline``).

    If the tokens of the connector form no grid, those of all views are concatenated without newlines.
    """

    def __init__(self, connector: nn.Module):
        super().__init__()
        self.connector = connector
        self.in_dim, self.out_dim, self.num_levels = connector.in_dim, connector.out_dim, connector.num_levels
        self.reads_text = connector.reads_text
        self.newline = nn.Parameter(torch.randn(connector.out_dim) / connector.out_dim**0.5)

    @property
    def config(self) -> dict:
        return {**self.connector.config, "newline": True}

    def num_tokens(self, height: int, width: int) -> int:
        return self.connector.num_tokens(height, width)

    def output_grid(self, height: int, width: int) -> tuple[int, int] | None:
        return self.connector.output_grid(height, width)

    def forward(self, features: VisionFeatures, tiles: Sequence[Tiles] | None = None, **text: Tensor) -> Tensor:
        """Tokens ``(V, n, D)`` of V views; with `tiles`, the concatenated tokens of complete images, ``(K, D)``.

        text: ``text_ids`` and ``text_mask`` ``(V, L)`` for a connector that reads text.
        """
        tokens = self.connector(features, **text)
        if tiles is None:
            return tokens + 0.0 * self.newline  # keeps the newline in the graph, as on ranks whose batch has tiles
        grid = self.connector.output_grid(*features.patches.shape[1:3])
        pictures = tokens.split([picture.views for picture in tiles])
        return torch.cat([self._assemble(views, picture, grid) for views, picture in zip(pictures, tiles)])

    def _assemble(self, views: Tensor, tiles: Tiles, grid: tuple[int, int] | None) -> Tensor:
        whole, parts = views[0], views[1:]
        if grid is None:
            return views.flatten(0, 1)
        if tiles.views == 1:
            return torch.cat([whole, self.newline.to(whole.dtype)[None]])
        rows, columns = tiles.rows * grid[0], tiles.columns * grid[1]
        canvas = parts.unflatten(1, grid).unflatten(0, (tiles.rows, tiles.columns))
        canvas = canvas.transpose(1, 2).reshape(rows, columns, -1)  # (rows, h, columns, w, D) flattened
        top, bottom, left, right = shown_part((rows, columns), (tiles.height, tiles.width))
        shown = canvas[top:bottom, left:right]
        kept = kept_grid(tiles, shown.shape[:2], grid)
        if kept != shown.shape[:2]:
            shown = F.interpolate(shown.movedim(-1, 0)[None], kept, mode="bilinear")[0].movedim(0, -1)
        newlines = self.newline.to(shown.dtype).expand(len(shown), 1, -1)
        return torch.cat([whole, torch.cat([shown, newlines], dim=1).flatten(0, 1)])
