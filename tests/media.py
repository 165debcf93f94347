"""Plans and placements of media for tests of functions that take them."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from vlmtrain.tiling import Tiles
from vlmtrain.visual import WHOLE, Item, MediaPlan, Placement


def slots(*counts: int) -> MediaPlan:
    """A plan of images that take `counts` text positions, each shown as one item."""
    items = [Item(medium, "image", ("squash",), WHOLE, (), ((8, 8),), ()) for medium in range(len(counts))]
    return MediaPlan(tuple(items), tuple(Placement(i, (i,), count, count, None) for i, count in enumerate(counts)))


def draw_frames(folder: Path, count: int, size: tuple[int, int] = (48, 48)) -> Path:
    """A folder of frames ``(W, H)`` in which a black square moves, each of them different."""
    folder.mkdir(parents=True)
    for number in range(count):
        image = Image.new("RGB", size, (220, 40 + 20 * (number % 8), 40))
        image.paste((0, 0, 0), (5 * (number % 8), 8, 5 * (number % 8) + 5, 24))
        image.save(folder / f"{number}.png")
    return folder


def tiled(*cuts: Tiles) -> tuple[Placement, ...]:
    """The placements of images that are cut into tiles."""
    placements, before = [], 0
    for medium, tiles in enumerate(cuts):
        placements.append(Placement(medium, tuple(range(before, before + tiles.views)), 0, 0, None, tiles))
        before += tiles.views
    return tuple(placements)
