"""How families of models write boxes and points in text, and how their answers are read.

    Region --Geometry.map, or the image itself--> Frame --BoxFormat.write--> text in place of the mark
    answer --BoxFormat.read--> Frame --back--> region in pixels of the upright image

`BOX_FORMATS` maps the values of ``boxes.format`` to the formats.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import islice

from ..errors import shown
from .records import BadSample, Conversation, Turn, region_marks
from .regions import REGION_MARK, Coordinates, Frame, Place, Region, area

SEEN, IMAGE = "seen", "image"
FRAMES = (SEEN, IMAGE)
"""What coordinates refer to: the view that the model is shown, after padding or cropping, or the upright image."""


@dataclass(frozen=True)
class BoxFormat:
    """A format that writes each region with a format string.

    box, point: the format strings; None if the family has no such regions. A family that has only points writes the
    center of a box. frame: one of `FRAMES`. units: of the width and the height; None for pixels. decimals: to which
    numbers are rounded. tokens: pattern of the family's tokens around and within regions, which the text of turns may
    contain.
    """

    box: str | None
    point: str | None = None
    frame: str = IMAGE
    units: int | None = 1000
    decimals: int = 0
    tokens: str = r"(?!)"

    def has_boxes_for(self, at: Coordinates) -> bool:
        """Whether a region is written as a box, not as a point."""
        return len(at) == 4 and self.box is not None

    def write(self, at: Coordinates, size: tuple[int, int], medium: int) -> str | None:
        """The text of a region, in pixels of a frame of `size` ``(W, H)``; None if the format has none.

        medium: index of the image.
        """
        if self.has_boxes_for(at):
            return self.box.format(*self._numbers(at, size))
        middle = at if len(at) == 2 else ((at[0] + at[2]) / 2, (at[1] + at[3]) / 2)
        return self._point(*self._numbers(middle, size), medium) if self.point else None

    def read(self, text: str, size: tuple[int, int], medium: int, is_box: bool) -> Coordinates | None:
        """The last box, or the last point, in a text, in pixels of a frame of `size` ``(W, H)``; None without one."""
        found = self._found(text, medium, is_box)
        if found is None:
            return None
        return tuple(number * size[i % 2] / (self.units or size[i % 2]) for i, number in enumerate(found))

    def _numbers(self, at: Coordinates, size: tuple[int, int]) -> list[float]:
        scaled = (value * (self.units or size[i % 2]) / size[i % 2] for i, value in enumerate(at))
        return [round(value, self.decimals or None) for value in scaled]

    def _point(self, x: float, y: float, medium: int) -> str:
        return self.point.format(x, y)

    def _found(self, text: str, medium: int, is_box: bool) -> list[float] | None:
        """The coordinates of the last region in a text, in the format's units."""
        found = re.findall(_pattern(self.box if is_box else self.point), text)
        return [float(number) for number in found[-1]] if found else None


def _pattern(text: str) -> str:
    """Regular expression for a format string, with any white space around numbers, between tokens, and in JSON.

    The braces around JSON are not part of it, because a model may add keys.
    """
    pieces = re.split(r"\{[^{}]*\}", text.removeprefix("{{").removesuffix("}}"))
    pieces = [re.escape(piece.strip()).replace("><", r">\s*<").replace(r"\ ", r"\s*") for piece in pieces]
    return r"\s*(-?\d+(?:\.\d+)?)\s*".join(pieces)


class _QwenVL(BoxFormat):
    """Numbers from 0 to 999."""

    def _numbers(self, at: Coordinates, size: tuple[int, int]) -> list[float]:
        return [min(999, int(1000 * value / size[i % 2])) for i, value in enumerate(at)]


class _Kosmos2(BoxFormat):
    """The cells of the upper left and the lower right corner in a grid of 32 x 32, read at their centers.

    Boxes within one row or one column of cells are read at the outer edges.
    """

    SIDE = 32

    def _numbers(self, at: Coordinates, size: tuple[int, int]) -> list[float]:
        left, top, right, bottom = (value * self.SIDE / size[i % 2] for i, value in enumerate(at))
        first, last = (math.floor(left), math.floor(top)), (math.ceil(right) - 1, math.ceil(bottom) - 1)
        return [row * self.SIDE + column for column, row in (first, last)]

    def _found(self, text: str, medium: int, is_box: bool) -> list[float] | None:
        found = super()._found(text, medium, is_box)
        if found is None:
            return None
        (top, left), (bottom, right) = (divmod(int(cell), self.SIDE) for cell in found)
        near, far = (0, 1) if left == right or top == bottom else (0.5, 0.5)
        return [left + near, top + near, right + far, bottom + far]


class _PaliGemma(BoxFormat):
    """The vertical coordinate of each corner comes first."""

    def _numbers(self, at: Coordinates, size: tuple[int, int]) -> list[float]:
        left, top, right, bottom = super()._numbers(at, size)
        return [top, left, bottom, right]

    def _found(self, text: str, medium: int, is_box: bool) -> list[float] | None:
        found = super()._found(text, medium, is_box)
        return found and [found[1], found[0], found[3], found[2]]


class _Molmo2(BoxFormat):
    """The number of the image, from 1, the number of the point, and its coordinates with at least three digits."""

    def _point(self, x: float, y: float, medium: int) -> str:
        return self.point.format(medium + 1, x, y)

    def _found(self, text: str, medium: int, is_box: bool) -> list[float] | None:
        of_images = re.findall(r'<points[^>]* coords="([\d; ]+)"', text)
        points = [
            point
            for own in re.findall(rf"(?:^|;) *{medium + 1}((?: +\d+ +\d+ +\d+)+)", ";".join(of_images))
            for point in re.findall(r"\d+ +(\d+) +(\d+)", own)
        ]
        return list(map(float, points[-1])) if points else None


_JSON = ('{{"bbox_2d": [{}, {}, {}, {}]}}', '{{"point_2d": [{}, {}]}}')
_REF_AND_BOX = r"</?(ref|box)>"

BOX_FORMATS: dict[str, BoxFormat] = {
    # Bai et al., "Qwen-VL", 2023, section 3.2.1; the rounding is unverified
    "qwen_vl": _QwenVL("<box>({},{}),({},{})</box>", tokens=_REF_AND_BOX),
    "qwen2_vl": BoxFormat(
        "<|box_start|>({},{}),({},{})<|box_end|>",
        "<|box_start|>({},{})<|box_end|>",
        tokens=r"<\|(box|object_ref)_(start|end)\|>",
    ),
    "qwen2_5_vl": BoxFormat(*_JSON, frame=SEEN, units=None),
    "qwen3_vl": BoxFormat(*_JSON),
    "internvl": BoxFormat("<box>[[{}, {}, {}, {}]]</box>", tokens=_REF_AND_BOX),
    "llava": BoxFormat("[{}, {}, {}, {}]", frame=SEEN, units=1, decimals=2),
    # transformers, `coordinate_to_patch_index` and `patch_index_to_coordinate`
    "kosmos2": _Kosmos2(
        "<object><patch_index_{:04}><patch_index_{:04}></object>",
        units=_Kosmos2.SIDE,
        tokens=r"</?(phrase|object)>|<patch_index_\d{4}>",
    ),
    # big_vision, `refcoco_mask2str`
    "paligemma": _PaliGemma("<loc{:04}><loc{:04}><loc{:04}><loc{:04}>", units=1023, tokens=r"<loc\d{4}>"),
    "molmo": BoxFormat(None, '<point x="{:.1f}" y="{:.1f}">', units=100, decimals=1),
    # molmo2, `UnifiedPointFormatter`
    "molmo2": _Molmo2(None, '<points coords="{} 1 {:03} {:03}">'),
}


@dataclass(frozen=True)
class Writing:
    """How a model writes regions: a name in `BOX_FORMATS` and one of `FRAMES`, or None for that of the format."""

    format: str
    frame: str | None = None

    def __post_init__(self) -> None:
        if self.format not in BOX_FORMATS:
            raise ValueError(f"boxes.format={self.format}: expected one of {', '.join(BOX_FORMATS)}, or null")
        if self.frame not in (None, *FRAMES):
            raise ValueError(f"boxes.frame={self.frame}: expected one of {', '.join(FRAMES)}, or null")

    @property
    def tokens(self) -> str:
        return BOX_FORMATS[self.format].tokens

    def place(self, region: Region, view: Frame) -> Place:
        """Where a region is written, given the frame of what the model is shown of its image.

        Raises BadSample for a region without area, outside the image, or outside what is shown.
        """
        (width, height), inside = view.own, all(0 <= value <= view.own[i % 2] for i, value in enumerate(region.at))
        if not inside or (len(region.at) == 4 and not area(region.at)):
            raise BadSample(
                f"{region.mark} {shown(list(region.at))}: expected {region.layout} within image {region.medium}, which "
                f"has {width}x{height} pixels when it is upright"
            )
        if view.place(region.at) is None:
            raise BadSample(f"{region.mark} {shown(list(region.at))}: image_fit=crop cuts it off")
        is_seen = (self.frame or BOX_FORMATS[self.format].frame) == SEEN
        return Place(region.at, self.format, view if is_seen else Frame(view.own, view.own), region.medium)


def text_of(place: Place) -> str:
    """The text of a region. Raises BadSample if the format has none of its kind."""
    text = BOX_FORMATS[place.format].write(place.frame.place(place.at), place.frame.seen, place.medium)
    if text is None:
        raise BadSample(f"boxes.format={place.format} has no {'boxes' if len(place.at) == 4 else 'points'}")
    return text


def is_box(place: Place) -> bool:
    """Whether a region is written as a box, not as a point."""
    return BOX_FORMATS[place.format].has_boxes_for(place.at)


def read_answer(answer: str, place: Place) -> Coordinates | None:
    """The last region in an answer in pixels of the upright image, or None. place: of the reference."""
    found = BOX_FORMATS[place.format].read(answer, place.frame.seen, place.medium, is_box(place))
    return found and place.frame.back(found)


def write_regions(conversation: Conversation, writing: Writing, view: Callable[[int], Frame]) -> Conversation:
    """The conversation with its regions as text in place of their marks, and as annotations of the turns.

    view: where the medium of an index lies in what the model is shown. Raises BadSample, naming the conversation.
    """
    marks = [mark for turn in conversation.turns for mark in region_marks(turn)]
    expected = [region.mark for region in conversation.regions]
    if marks != expected:
        raise BadSample(f"{conversation.id}: the text has the marks {marks}, but the regions need {expected}")
    regions = iter(conversation.regions)

    def written(turn: Turn) -> Turn:
        places = tuple(
            writing.place(region, view(region.medium)) for region in islice(regions, len(region_marks(turn)))
        )
        if not places:
            return turn
        texts = iter([text_of(place) for place in places])
        text = REGION_MARK.sub(lambda mark: next(texts), turn.text)
        return replace(turn, text=text, grading=replace(turn.grading, places=places))

    try:
        return replace(conversation, turns=tuple(map(written, conversation.turns)), regions=())
    except BadSample as error:
        raise BadSample(f"{conversation.id}: {error}") from None
