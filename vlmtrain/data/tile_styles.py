"""Styles of ``image_fit=tiles``: into which grid an image is cut, and how its views stand in the text.

    image size --choose--> grid (rows, columns) --places--> tiles and overview, in order, with the text around them

A style with newlines joins the views at one place in the text (`vlmtrain.model.joining`). With the others, each view
has a place of its own. `TILE_STYLES` maps the values of ``image_tile_style`` to the styles.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

from ..tiling import Overlap, Tiles, choose_tiles
from ..visual import WHOLE, Size
from .images import BILINEAR


class View(NamedTuple):
    """One view of an image. kind, fit, box: see `Item`."""

    kind: str
    fit: str
    box: tuple[float, float, float, float] = WHOLE


class Place(NamedTuple):
    """What stands at one place in the text: the tokens of some views, between control text."""

    views: tuple[View, ...]
    before: str = ""
    after: str = ""


class TileStyle:
    """Base class of styles. newline: whether the connector joins the tokens of the views at a place, row by row.

    overlaps: whether the tiles are crops that share margins.
    """

    newline = False
    overlaps = False

    def check(self, grids: Sequence[Size]) -> None:
        """Raise ValueError if the style cannot use these grids."""

    def choose(self, size: Size, tile: Size, grids: Sequence[Size], images: int) -> Size:
        """The grid ``(rows, columns)`` for an image of `size` ``(H, W)``, one of `images` in its sample."""
        raise NotImplementedError

    def places(self, grid: Size | None) -> list[Place]:
        """The places of an image cut into `grid`, in order. None: an image that is not cut."""
        raise NotImplementedError

    def joined(self, place: Place, grid: Size | None, size: Size, most: int) -> Tiles | Overlap | None:
        """How the views at a place of an image of `size` are joined. most: see `Tiles`; None: they are not."""
        return None

    def heading(self, number: int, images: int) -> str:
        """Text before all views of image `number`, one of `images` in its sample."""
        return ""


class LlavaNext(TileStyle):
    """The complete image, stretched, then the tiles of a canvas with black borders (LLaVA-NeXT, published code)."""

    newline = True

    def choose(self, size: Size, tile: Size, grids: Sequence[Size], images: int) -> Size:
        tiles = choose_tiles(size, tile, grids)
        return tiles.rows, tiles.columns

    def places(self, grid: Size | None) -> list[Place]:
        if grid is None:
            return [Place((View("image", "pad"),))]
        return [Place((View("overview", "squash"), *(View("tile", "contain", box) for box in _boxes(grid))))]

    def joined(self, place: Place, grid: Size | None, size: Size, most: int) -> Tiles:
        return Tiles(*grid, *size, most) if grid else Tiles(0, 0, *size)


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

    def places(self, grid: Size | None) -> list[Place]:
        if grid in (None, (1, 1)):
            return [Place((View("image", "squash"),))]
        views = [*(View("tile", "squash", box) for box in _boxes(grid)), View("overview", "squash")]
        return [Place((view,)) for view in views]


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

    def places(self, grid: Size | None) -> list[Place]:
        if grid in (None, (1, 1)):
            return [Place((View("image", "squash"),), NANOVLM_OVERVIEW)]
        rows, columns = grid
        words = [f"<row_{row + 1}_col_{column + 1}>" for row in range(rows) for column in range(columns)]
        tiles = [Place((View("tile", "squash", box),), word) for box, word in zip(_boxes(grid), words)]
        return [Place((View("overview", "squash"),), NANOVLM_OVERVIEW), *tiles]

    def heading(self, number: int, images: int) -> str:
        return f"<image: {number}>" if images > 1 else ""


class Molmo2(TileStyle):
    """The complete image, then the overlapping crops of a stretched one as one grid (Molmo2, 2025, published code).

    Both are between tokens of their own; the rows of the grid end with a newline. An image is scaled up to the smallest
    grid of crops that is not smaller, or else down to the grid that shrinks it least. Several images are numbered.
    margin: patches on each side of a crop that its neighbor drops as well. patches: grid ``(h, w)`` of a crop.
    """

    newline = overlaps = True

    def __init__(self, margin: int = 4, patches: Size = (27, 27)):
        self.margin, self.patches = margin, patches
        self.steps = tuple(side - 2 * margin for side in patches)
        if min(self.steps) < 1:
            raise ValueError(
                f"image_tiles_margin={margin} leaves nothing of a crop of {patches[0]} x {patches[1]} patches"
            )

    def choose(self, size: Size, tile: Size, grids: Sequence[Size], images: int) -> Size:
        units = [pixels // side for pixels, side in zip(tile, self.patches)]
        inner = [side - 2 * self.margin * unit for side, unit in zip(size, units)]

        def scale(grid: Size) -> Fraction:
            scales = (
                Fraction(count * step * unit, side) for count, step, unit, side in zip(grid, self.steps, units, inner)
            )
            return min(scales)

        ordered = sorted(grids, key=lambda grid: (grid[0] * grid[1], grid[0]))
        if min(inner) <= 0:  # no larger than the margins
            return ordered[0]
        enough = [grid for grid in ordered if scale(grid) >= 1]
        return min(enough, key=scale) if enough else max(ordered, key=scale)

    def places(self, grid: Size | None) -> list[Place]:
        if grid is None:
            return [Place((View("image", BILINEAR),), *MOLMO2_OVERVIEW)]
        canvas = Overlap(*grid, self.margin).patches(self.patches)
        starts = [(row * self.steps[0], column * self.steps[1]) for row in range(grid[0]) for column in range(grid[1])]
        boxes = [
            (
                left / canvas[1],
                top / canvas[0],
                (left + self.patches[1]) / canvas[1],
                (top + self.patches[0]) / canvas[0],
            )
            for top, left in starts
        ]
        crops = tuple(View("tile", BILINEAR, box) for box in boxes)
        return [Place((View("overview", BILINEAR),), *MOLMO2_OVERVIEW), Place(crops, *MOLMO2_CROPS)]

    def joined(self, place: Place, grid: Size | None, size: Size, most: int) -> Overlap | None:
        return Overlap(*grid, self.margin) if place.views[0].kind == "tile" else None

    def heading(self, number: int, images: int) -> str:
        return f"{MOLMO2_HEADING}{number + 1}" if images > 1 else ""


NANOVLM_OVERVIEW = "<|global_image|>"
MOLMO2_OVERVIEW, MOLMO2_CROPS = ("<low_res_im_start>", "<im_end>"), ("<im_start>", "<im_end>")
MOLMO2_HEADING = "Image "
LLAVA_NEXT = "llava_next"
TILE_STYLES: dict[str, TileStyle] = {
    **{LLAVA_NEXT: LlavaNext(), "internvl": InternVL(), "nanovlm": NanoVLM(), "molmo2": Molmo2()},
}


def _boxes(grid: Size) -> list[tuple[float, float, float, float]]:
    """The tiles of a grid in raster order, as fractions (left, top, right, bottom)."""
    rows, columns = grid
    return [
        (column / columns, row / rows, (column + 1) / columns, (row + 1) / rows)
        for row in range(rows)
        for column in range(columns)
    ]
