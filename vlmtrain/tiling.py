"""Any-resolution pictures: cut into tiles, with one view of the whole (LLaVA-NeXT, published code).

picture --scaled, centred--> canvas of rows x columns tiles --encoder, connector--> token grid --padding dropped-->
tokens of the whole view, then the grid's rows, each with a newline token behind it

LLaVA-OneVision (published code, ``anyres_max_9``) scales a grid down that makes more tokens than so many tiles, and
does not cut pictures that share a sample: each is one view with a newline behind it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple


class Tiles(NamedTuple):
    """How one picture is cut: rows x columns of tiles, and its own size in pixels.

    No rows and no columns: the view of the whole is all there is. most: tiles' worth of tokens that the grid keeps, 0
    for all of it.
    """

    rows: int
    columns: int
    height: int
    width: int
    most: int = 0

    @property
    def views(self) -> int:
        """Tiles, and the view of the whole."""
        return self.rows * self.columns + 1


def choose_tiles(
    size: tuple[int, int], tile: tuple[int, int], grids: Sequence[tuple[int, int]], most: int = 0
) -> Tiles:
    """The grid ``(rows, columns)`` that shows a picture of `size` ``(H, W)`` best.

    That is the one with the most of the picture's own resolution, and of those the one with the least padding.
    """

    def merit(grid: tuple[int, int]) -> tuple[int, int]:
        height, width = grid[0] * tile[0], grid[1] * tile[1]
        scale = min(height / size[0], width / size[1])
        shown = min(int(size[0] * scale) * int(size[1] * scale), size[0] * size[1])
        return shown, shown - height * width

    return Tiles(*max(grids, key=merit), *size, most)


def shown_part(grid: tuple[int, int], size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Top, bottom, left, right of a token grid ``(h, w)`` without the padding around a picture of `size` ``(H, W)``."""
    (rows, columns), (height, width) = grid, size
    if width * rows > height * columns:  # wider than the grid: padded above and below
        border = (rows - int(round(height * columns / width, 7))) // 2
        return border, rows - border, 0, columns
    border = (columns - int(round(width * rows / height, 7))) // 2
    return 0, rows, border, columns - border


def kept_grid(tiles: Tiles, shown: tuple[int, int], grid: tuple[int, int]) -> tuple[int, int]:
    """The ``(h, w)`` that a token grid `shown` is scaled to, of tiles with a `grid` each: itself where it may stay."""
    if not tiles.most:
        return shown
    excess = math.sqrt(shown[0] * shown[1] / (tiles.most * grid[0] * grid[1]))
    return (int(shown[0] // excess), int(shown[1] // excess)) if excess > 1.1 else shown


def tiled_tokens(tiles: Tiles, tokens: int, grid: tuple[int, int] | None) -> int:
    """Tokens of a picture whose views make `tokens` each, in a `grid` ``(h, w)``; None where they are in no order."""
    if grid is None:
        return tokens * tiles.views
    if tiles.views == 1:
        return tokens + 1
    top, bottom, left, right = shown_part((tiles.rows * grid[0], tiles.columns * grid[1]), (tiles.height, tiles.width))
    height, width = kept_grid(tiles, (bottom - top, right - left), grid)
    return tokens + height * (width + 1)
