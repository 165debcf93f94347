"""Any-resolution pictures: cut into tiles, with one view of the whole (LLaVA-NeXT, published code).

picture --scaled, centred--> canvas of rows x columns tiles --encoder, connector--> token grid --padding dropped-->
tokens of the whole view, then the grid's rows, each with a newline token behind it
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Tiles(NamedTuple):
    """How one picture is cut: rows x columns of tiles, and its own size in pixels."""

    rows: int
    columns: int
    height: int
    width: int

    @property
    def views(self) -> int:
        """Tiles, and the view of the whole."""
        return self.rows * self.columns + 1


def choose_tiles(size: tuple[int, int], tile: tuple[int, int], grids: Sequence[tuple[int, int]]) -> Tiles:
    """The grid ``(rows, columns)`` that shows a picture of `size` ``(H, W)`` best.

    That is the one with the most of the picture's own resolution, and of those the one with the least padding.
    """

    def merit(grid: tuple[int, int]) -> tuple[int, int]:
        height, width = grid[0] * tile[0], grid[1] * tile[1]
        scale = min(height / size[0], width / size[1])
        shown = min(int(size[0] * scale) * int(size[1] * scale), size[0] * size[1])
        return shown, shown - height * width

    return Tiles(*max(grids, key=merit), *size)


def shown_part(grid: tuple[int, int], size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Top, bottom, left, right of a token grid ``(h, w)`` without the padding around a picture of `size` ``(H, W)``."""
    (rows, columns), (height, width) = grid, size
    if width * rows > height * columns:  # wider than the grid: padded above and below
        border = (rows - int(round(height * columns / width, 7))) // 2
        return border, rows - border, 0, columns
    border = (columns - int(round(width * rows / height, 7))) // 2
    return 0, rows, border, columns - border


def tiled_tokens(tiles: Tiles, tokens: int, grid: tuple[int, int] | None) -> int:
    """Tokens of a picture whose views make `tokens` each, in a `grid` ``(h, w)``; None where they are in no order."""
    if grid is None:
        return tokens * tiles.views
    top, bottom, left, right = shown_part((tiles.rows * grid[0], tiles.columns * grid[1]), tiles[2:])
    return tokens + (bottom - top) * (right - left + 1)
