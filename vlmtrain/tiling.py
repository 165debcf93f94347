"""Images split into tiles or overlapping crops, plus one view of the complete image.

Any resolution (LLaVA-NeXT, published code):

image --scaled, centered--> canvas of rows x columns tiles --encoder, connector--> token grid --padding dropped-->
tokens of the complete view, then the grid's rows, each followed by a newline token

LLaVA-OneVision (published code, ``anyres_max_9``) scales the token grid down if it has more tokens than a maximum
number of tiles (here 9), and does not split images that share a sample: each is one view followed by a newline.

Overlapping crops (Molmo2, 2025, published code):

image --stretched--> canvas of overlapping crops --encoder--> patches --shared margins dropped--> one grid of patches
--connector--> token grid, each of whose rows is followed by a newline token
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple


class Tiles(NamedTuple):
    """How one image is split: rows x columns of tiles, and its own size in pixels.

    Without rows and columns, there is only the view of the complete image. most: the grid keeps at most the tokens of
    this many tiles; 0: no limit.
    """

    rows: int
    columns: int
    height: int
    width: int
    most: int = 0

    @property
    def views(self) -> int:
        """Number of tiles, plus the view of the complete image."""
        return self.rows * self.columns + 1


class Overlap(NamedTuple):
    """How an image is split into rows x columns of crops: neighbors share twice `margin` patches, each drops half."""

    rows: int
    columns: int
    margin: int

    def patches(self, crop: tuple[int, int]) -> tuple[int, int]:
        """The grid ``(h, w)`` of the patches of the canvas, from that of a crop."""
        shared = 2 * self.margin
        return self.rows * (crop[0] - shared) + shared, self.columns * (crop[1] - shared) + shared


def choose_tiles(
    size: tuple[int, int], tile: tuple[int, int], grids: Sequence[tuple[int, int]], most: int = 0
) -> Tiles:
    """Choose the grid ``(rows, columns)`` for an image of `size` ``(H, W)``.

    It is the grid that keeps most of the image's resolution and, among equals, has the least padding.
    """

    def merit(grid: tuple[int, int]) -> tuple[int, int]:
        height, width = grid[0] * tile[0], grid[1] * tile[1]
        scale = min(height / size[0], width / size[1])
        shown = min(int(size[0] * scale) * int(size[1] * scale), size[0] * size[1])
        return shown, shown - height * width

    return Tiles(*max(grids, key=merit), *size, most)


def shown_part(grid: tuple[int, int], size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Top, bottom, left, right of a token grid ``(h, w)`` without the padding around an image of `size` ``(H, W)``."""
    (rows, columns), (height, width) = grid, size
    if width * rows > height * columns:  # wider than the grid: padded above and below
        border = (rows - int(round(height * columns / width, 7))) // 2
        return border, rows - border, 0, columns
    border = (columns - int(round(width * rows / height, 7))) // 2
    return 0, rows, border, columns - border


def kept_grid(tiles: Tiles, shown: tuple[int, int], grid: tuple[int, int]) -> tuple[int, int]:
    """The ``(h, w)`` to which a token grid `shown`, with tiles of `grid` each, is scaled; the same within the limit."""
    if not tiles.most:
        return shown
    excess = math.sqrt(shown[0] * shown[1] / (tiles.most * grid[0] * grid[1]))
    return (int(shown[0] // excess), int(shown[1] // excess)) if excess > 1.1 else shown


def tiled_tokens(tiles: Tiles, tokens: int, grid: tuple[int, int] | None) -> int:
    """Tokens of an image whose views have `tokens` each, in a `grid` ``(h, w)``; None if they have no spatial order."""
    if grid is None:
        return tokens * tiles.views
    if tiles.views == 1:
        return tokens + 1
    top, bottom, left, right = shown_part((tiles.rows * grid[0], tiles.columns * grid[1]), (tiles.height, tiles.width))
    height, width = kept_grid(tiles, (bottom - top, right - left), grid)
    return tokens + height * (width + 1)
