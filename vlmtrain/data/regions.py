"""Boxes and points in images: what a record says, and where they lie in what a model is shown.

Coordinates are in pixels, x before y, from the upper left corner; a box is (left, top, right, bottom).
"""

from __future__ import annotations

import re
from typing import NamedTuple

Coordinates = tuple[float, ...]
"""A box, four numbers, or a point, two."""

BOX_MARK, POINT_MARK = "<box>", "<point>"
REGION_MARK = re.compile(f"{BOX_MARK}|{POINT_MARK}")
ENOUGH_IOU = 0.5  # of a box that counts as found
TOLERANCE = 1e-6  # pixels, for sums and products of coordinates


class Region(NamedTuple):
    """A box or a point in pixels of the upright image. medium: index of the image among those of the conversation."""

    at: Coordinates
    medium: int = 0

    @property
    def mark(self) -> str:
        """The mark in the text that stands for a region of this kind."""
        return BOX_MARK if len(self.at) == 4 else POINT_MARK

    @property
    def layout(self) -> str:
        """The coordinates of a region of this kind, for messages."""
        return "[left, top, right, bottom] with left < right and top < bottom" if len(self.at) == 4 else "[x, y]"


class Frame(NamedTuple):
    """Where an image lies in the view that a model is shown: ``x * scale + offset``, for x and y.

    own, seen: width and height of the image and of the view.
    """

    own: tuple[int, int]
    seen: tuple[int, int]
    scale: tuple[float, float] = (1.0, 1.0)
    offset: tuple[float, float] = (0.0, 0.0)

    def place(self, at: Coordinates) -> Coordinates | None:
        """What the view shows of a region, in pixels of the view; None if it shows nothing."""
        moved = tuple(value * self.scale[i % 2] + self.offset[i % 2] for i, value in enumerate(at))
        kept = _clamped(moved, self.seen)
        if len(at) == 4:
            return kept if area(kept) > TOLERANCE else None
        return kept if max(abs(a - b) for a, b in zip(kept, moved)) < TOLERANCE else None

    def back(self, at: Coordinates) -> Coordinates:
        """A region of the view in pixels of the image. Corners are sorted, and clamped to the image."""
        moved = [(value - self.offset[i % 2]) / self.scale[i % 2] for i, value in enumerate(at)]
        if len(at) == 4:
            moved = [min(moved[0::2]), min(moved[1::2]), max(moved[0::2]), max(moved[1::2])]
        return _clamped(moved, self.own)


class Place(NamedTuple):
    """A region of an answer, for evaluation: the region in pixels of the image, and how it is written.

    format: a name in `vlmtrain.data.boxes.BOX_FORMATS`. frame: of the written coordinates. medium: index of the image.
    """

    at: Coordinates
    format: str
    frame: Frame
    medium: int

    @classmethod
    def of(cls, values: list) -> Place:
        """A place from its values in nested lists, as JSON has them."""
        at, format, frame, medium = values
        return cls(tuple(at), format, Frame(*map(tuple, frame)), medium)


def _clamped(at: Coordinates | list[float], size: tuple[int, int]) -> Coordinates:
    return tuple(min(max(value, 0.0), float(size[i % 2])) for i, value in enumerate(at))


def area(box: Coordinates) -> float:
    return max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1])


def iou(one: Coordinates, other: Coordinates) -> float:
    """Intersection over union of two boxes."""
    common = area((*map(max, one[:2], other[:2]), *map(min, one[2:], other[2:])))
    return common / (area(one) + area(other) - common) if common else 0.0
