"""Styles of ``image_fit=tiles``: into which grid an image is cut, and how its views stand in the text.

    image size --choose--> grid (rows, columns) --views--> tiles and overview, in order, with the words before them

A style with newlines joins all views of an image in one place in the text (`vlmtrain.model.joining`). With the others,
the tokens of each view follow the words of that view. `TILE_STYLES` maps the values of ``image_tile_style`` to them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ..tiling import choose_tiles
from ..visual import WHOLE, Size


class View(NamedTuple):
    """One view of an image. kind, fit, box: see `Item`. words: control text before its tokens."""

    kind: str
    fit: str
    box: tuple[float, float, float, float] = WHOLE
    words: str = ""


class TileStyle:
    """Base class of styles. newline: whether the connector joins the tokens of all views, row by row."""

    newline = False

    def check(self, grids: Sequence[Size]) -> None:
        """Raise ValueError if the style cannot use these grids."""

    def choose(self, size: Size, tile: Size, grids: Sequence[Size], images: int) -> Size:
        """The grid ``(rows, columns)`` for an image of `size` ``(H, W)``, one of `images` in its sample."""
        raise NotImplementedError

    def views(self, grid: Size | None) -> list[View]:
        """The views of an image cut into `grid`, in order. None: an image that is not cut."""
        raise NotImplementedError

    def heading(self, number: int, images: int) -> str:
        """Text before all views of image `number`, one of `images` in its sample."""
        return ""


class LlavaNext(TileStyle):
    """The complete image, stretched, then the tiles of a canvas with black borders (LLaVA-NeXT, published code)."""

    newline = True

    def choose(self, size: Size, tile: Size, grids: Sequence[Size], images: int) -> Size:
        tiles = choose_tiles(size, tile, grids)
        return tiles.rows, tiles.columns

    def views(self, grid: Size | None) -> list[View]:
        if grid is None:
            return [View("image", "pad")]
        return [View("overview", "squash"), *(View("tile", "contain", box) for box in _boxes(grid))]


class InternVL(TileStyle):
    """Tiles of a stretched image, then a thumbnail if there are several (InternVL 1.5, 2024, section 3.3).

    The grid is the one with the nearest aspect ratio; of two equally near ones, the one with more tiles if the image
    has more than half their pixels. Several images share the largest number of tiles (published code,
    ``dynamic_preprocess`` and ``max_dynamic_patch``).
    """

    def choose(self, size: Size, tile: Size, grids: Sequence[Size], images: int) -> Size:
        most = max(1, max(rows * columns for rows, columns in grids) // images)
        best, least = (1, 1), float("inf")
        for rows, columns in sorted(grids, key=lambda grid: (grid[0] * grid[1], grid[1])):
            if rows * columns > most:
                break
            height, width = rows * tile[0], columns * tile[1]
            distance = abs(size[1] / size[0] - width / height)
            if distance < least or (distance == least and size[0] * size[1] > 0.5 * height * width):
                best, least = (rows, columns), distance
        return best

    def views(self, grid: Size | None) -> list[View]:
        if grid in (None, (1, 1)):
            return [View("image", "squash")]
        return [*(View("tile", "squash", box) for box in _boxes(grid)), View("overview", "squash")]


class NanoVLM(TileStyle):
    """The complete image, then the tiles of a stretched image, each after a word (nanoVLM, published code).

    The longer side is stretched to the smallest multiple of the tile that a grid has and that is not below it, or else
    to the largest one; the other side follows, rounded up to whole tiles. Several images are numbered.
    """

    def check(self, grids: Sequence[Size]) -> None:
        sides = {max(grid) for grid in grids}
        needed = {grid for side in sides for other in range(1, side + 1) for grid in ((side, other), (other, side))}
        if missing := sorted(needed - set(grids)):
            raise ValueError(
                f"image_tile_style=nanovlm: image_tiles lacks {list(missing[0])}; expected, for each longer side N, "
                "all grids that have it: [N, 1], ..., [N, N] and [1, N], ..., [N, N]"
            )

    def choose(self, size: Size, tile: Size, grids: Sequence[Size], images: int) -> Size:
        height, width = size[0] * tile[1], size[1] * tile[0]  # in units in which a tile is a square
        unit, sides = tile[0] * tile[1], sorted({max(grid) for grid in grids})
        longer, shorter = max(height, width), min(height, width)
        side = next((side for side in sides if side * unit >= longer), sides[-1])
        other = -(-shorter * side // longer)  # exact; the published code's floats may add a tile
        return (other, side) if width >= height else (side, other)

    def views(self, grid: Size | None) -> list[View]:
        if grid in (None, (1, 1)):
            return [View("image", "squash", words=NANOVLM_OVERVIEW)]
        rows, columns = grid
        words = [f"<row_{row + 1}_col_{column + 1}>" for row in range(rows) for column in range(columns)]
        tiles = [View("tile", "squash", box, word) for box, word in zip(_boxes(grid), words)]
        return [View("overview", "squash", words=NANOVLM_OVERVIEW), *tiles]

    def heading(self, number: int, images: int) -> str:
        return f"<image: {number}>" if images > 1 else ""


NANOVLM_OVERVIEW = "<|global_image|>"
LLAVA_NEXT = "llava_next"
TILE_STYLES: dict[str, TileStyle] = {LLAVA_NEXT: LlavaNext(), "internvl": InternVL(), "nanovlm": NanoVLM()}


def _boxes(grid: Size) -> list[tuple[float, float, float, float]]:
    """The tiles of a grid in raster order, as fractions (left, top, right, bottom)."""
    rows, columns = grid
    return [
        (column / columns, row / rows, (column + 1) / columns, (row + 1) / rows)
        for row in range(rows)
        for column in range(columns)
    ]
