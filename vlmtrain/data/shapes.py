"""Procedural images of colored shapes with captions and questions, which need no download.

    (seed, split, i) -> scene: shapes in a 2 x 2 grid -> image, caption, questions -> Conversation
                     -> size of the image, if sizes vary

Sample ``i`` of a split depends on nothing else, so any subset can be drawn in any order on any machine.
Every validation scene has one item with a color-shape pair in `HELD_OUT`, and no other scene has one: a model
that answers questions about it must combine color and shape on its own.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import NamedTuple

from PIL import Image, ImageDraw

from ..visual import Size
from .records import IMAGE_MARK, Conversation, Turn
from .regions import BOX_MARK, Region

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (222, 49, 49),
    "green": (40, 167, 69),
    "blue": (43, 99, 228),
    "yellow": (247, 194, 14),
    "purple": (146, 62, 196),
    "orange": (245, 128, 20),
    "cyan": (38, 190, 205),
}
BACKGROUND = (246, 246, 242)
INK = (25, 25, 30)
LINE = 0.03
"""Width of the outline, as a fraction of a scene's side."""

# Outlines as polygons in a square of side 2 around the origin, y pointing down.
OUTLINES: dict[str, tuple[tuple[float, float], ...] | None] = {
    "circle": None,
    "square": ((-0.88, -0.88), (0.88, -0.88), (0.88, 0.88), (-0.88, 0.88)),
    "triangle": ((0.0, -0.95), (1.0, 0.85), (-1.0, 0.85)),
    "cross": (
        (-0.34, -1), (0.34, -1), (0.34, -0.34), (1, -0.34), (1, 0.34), (0.34, 0.34),
        (0.34, 1), (-0.34, 1), (-0.34, 0.34), (-1, 0.34), (-1, -0.34), (-0.34, -0.34),
    ),
    "ring": None,
}  # fmt: skip
SHAPES = tuple(OUTLINES)
HELD_OUT = frozenset(zip(COLORS, SHAPES))
"""The (color, shape) pairs reserved for validation, one for each shape."""

PLACES = ("northwest", "northeast", "southwest", "southeast")
"""Names of the cells, one word each, because a place of two words would have to be looked up in two steps."""
SIDES = ("west", "east", "north", "south")
COUNTS = ("one", "two", "three")
OBJECTS = (3, 4, 4)
"""Numbers of shapes in an image with questions, drawn with equal probability."""
CAPTION_OBJECTS = (1, 1, 2, 3, 4)
"""The same for images with captions. Images of one shape force a contrastive model to use shapes: with more
objects, colors and places alone distinguish most captions."""

SPLITS = ("caption", "text", "instruct", "validation", "grounding", "boxes", "documents")
DESCRIBE = "Describe the picture."

VOCABULARY: tuple[str, ...] = (
    *COLORS, *SHAPES, *(shape + "s" for shape in SHAPES), *PLACES, *SIDES, *COUNTS,
    "the", "in", "What", "color", "shape", "shapes", "is", "of", "How", "many",
    "are", "there", "Describe", "picture", ".", ",", "?",
)  # fmt: skip
"""All words and punctuation marks in the texts."""


@dataclass(frozen=True)
class Item:
    """One shape: its place in the grid, its center as fractions of the image's width and height, and its radius.

    The radius is a fraction of the side of the scene, see `SceneImage`.
    """

    color: str
    shape: str
    row: int
    column: int
    x: float
    y: float
    radius: float

    @property
    def extent(self) -> tuple[float, float, float, float]:
        """Left, top, right and bottom of the drawn item including its outline, from its center, as the radius."""
        outline = OUTLINES[self.shape]
        if outline is None:  # the outline is drawn inside the shape
            return -self.radius, -self.radius, self.radius, self.radius
        across, down = zip(*outline)
        return (
            self.radius * min(across) - LINE / 2,
            self.radius * min(down) - LINE / 2,
            self.radius * max(across) + LINE / 2,
            self.radius * max(down) + LINE / 2,
        )

    @property
    def place(self) -> str:
        return PLACES[2 * self.row + self.column]


@dataclass(frozen=True, kw_only=True)
class SceneImage:
    """A scene that is drawn on loading, antialiased, RGB.

    pixels: size ``(H, W)`` of the image in pixels. side: of the scene in pixels, to which the sizes of its items refer.
    In an image of another size, items are farther apart or closer together, but have the same size and shape.
    """

    items: tuple[Item, ...]
    pixels: Size
    side: int

    def size(self) -> Size:
        return self.pixels

    def load(self) -> Image.Image:
        oversample = 4
        height, width = (side * oversample for side in self.pixels)
        canvas = Image.new("RGB", (width, height), BACKGROUND)
        self.draw(Canvas(ImageDraw.Draw(canvas), width, height, self.side * oversample))
        return canvas.reduce(oversample)

    def draw(self, canvas: Canvas) -> None:
        """Draw the scene."""
        for item in self.items:
            draw_item(canvas, item)


class Canvas(NamedTuple):
    """What a scene is drawn on, and its width, height and the scene's side in pixels."""

    drawing: ImageDraw.ImageDraw
    width: int
    height: int
    side: int


def draw_item(canvas: Canvas, item: Item, line: float = LINE) -> None:
    """Draw an item with a dark outline, which is the same for every color.

    line: width of the outline, as a fraction of the scene's side.
    """
    draw, side = canvas.drawing, canvas.side
    x, y, radius = item.x * canvas.width, item.y * canvas.height, item.radius * side
    color, outline, width = COLORS[item.color], OUTLINES[item.shape], max(1, round(line * side))
    if outline is not None:
        points = [(x + radius * dx, y + radius * dy) for dx, dy in outline]
        draw.polygon(points, fill=color)
        draw.line([*points, *points[:2]], fill=INK, width=width, joint="curve")
        return
    draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=color, outline=INK, width=width)
    if item.shape == "ring":
        hole = 0.5 * radius
        draw.ellipse((x - hole, y - hole, x + hole, y + hole), fill=BACKGROUND, outline=INK, width=width)


def pixels_of(key: str, image_size: int, sides: tuple[int, int] | None) -> tuple[Size, int]:
    """The size ``(H, W)`` of an image and the side of its scene, in pixels.

    key: of the sample, which determines the size. image_size: side of square images. sides: smallest and largest
    height and width, each drawn with equal probability; None for square images. The scene has the smallest side, so
    objects and text have the same size in images of all sizes.
    """
    if sides is None:
        return (image_size, image_size), image_size
    rng = random.Random(f"{key}/frame")  # apart from the scene, which does not depend on the size
    return (rng.randint(*sides), rng.randint(*sides)), sides[0]


class Shapes:
    """One split as a sequence of conversations.

    split: ``caption`` (image and caption), ``text`` (a described scene and questions about it, no image),
    ``instruct`` (image and questions), ``validation`` (the same, with `HELD_OUT` pairs), ``grounding``
    (image, and the positions of objects as Qwen-VL's boxes), ``boxes`` (the same, as ``boxes.format`` says) or
    ``documents`` (one to three images, each followed by its caption).
    size: number of conversations. image_size, sides: of the images in pixels, see `pixels_of`.

    Raises ValueError for an unknown split.
    """

    def __init__(
        self, split: str, size: int, image_size: int = 48, seed: int = 0, sides: tuple[int, int] | None = None
    ):
        if split not in SPLITS:
            raise ValueError(f"unknown split {split!r} of the shapes data. Available: {', '.join(SPLITS)}")
        self.split, self.size, self.image_size, self.seed, self.sides = split, size, image_size, seed, sides

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Conversation:
        if not 0 <= index < self.size:
            raise IndexError(f"sample {index} of {self.size}")
        if self.split == "documents":
            return self._document(index)
        key = f"{self.seed}/{self.split}/{index}"
        rng = random.Random(key)
        pixels, side = pixels_of(key, self.image_size, self.sides)
        objects = rng.choice(CAPTION_OBJECTS if self.split == "caption" else OBJECTS)
        items, counted = random_scene(rng, objects, held_out=self.split == "validation")
        regions = []
        if self.split == "caption":
            exchanges, opening = [(DESCRIBE, describe(items))], IMAGE_MARK
        elif self.split == "text":
            exchanges = _questions(rng, items, counted)
            opening = describe(rng.sample(items, len(items)))
        elif self.split == "grounding":
            exchanges, opening = [_grounding(item, pixels, side) for item in rng.sample(items, 2)], IMAGE_MARK
        elif self.split == "boxes":
            chosen = rng.sample(items, 2)
            exchanges, opening = [(_where(item), BOX_MARK) for item in chosen], IMAGE_MARK
            regions = [Region(_box(item, pixels, side)) for item in chosen]
        else:
            exchanges, opening = _questions(rng, items, counted), IMAGE_MARK
        turns = []
        for question, answer in exchanges:
            text = question if turns else f"{opening}\n{question}"
            turns += [Turn("user", text), Turn("assistant", answer)]
        images = () if self.split == "text" else (SceneImage(items=items, pixels=pixels, side=side),)
        return Conversation(f"{self.split}-{index}", tuple(turns), images, regions=regions)

    def _document(self, index: int) -> Conversation:
        key = f"{self.seed}/documents/{index}"
        rng, turns, images = random.Random(key), [], []
        for number in range(rng.randint(1, 3)):
            pixels, side = pixels_of(f"{key}/{number}", self.image_size, self.sides)
            items, _ = random_scene(rng, rng.choice(CAPTION_OBJECTS), held_out=False)
            turns += [Turn("user", IMAGE_MARK), Turn("assistant", describe(items))]
            images.append(SceneImage(items=items, pixels=pixels, side=side))
        return Conversation(f"documents-{index}", tuple(turns), images)


def describe(items: Sequence[Item]) -> str:
    """The caption: every shape with its place and color, in the order given."""
    return f"{', '.join(f'{item.place} {item.color} {item.shape}' for item in items)}."


def random_scene(rng: random.Random, objects: int, held_out: bool) -> tuple[tuple[Item, ...], str]:
    """Items in raster order, and the color or shape whose occurrences may be counted.

    One to three items share it, with equal probability, so that counts are balanced. Otherwise all items differ.
    """
    times = min(rng.randint(1, len(COUNTS)), objects)
    shares_color = rng.random() < 0.5
    while True:
        colors, shapes = rng.sample(list(COLORS), objects), rng.sample(SHAPES, objects)
        shared = colors if shares_color else shapes
        shared[:times] = shared[:1] * times
        if sum(pair in HELD_OUT for pair in zip(colors, shapes, strict=True)) == held_out:
            break
    cells = rng.sample(range(len(PLACES)), objects)
    items = [_place(rng, *item) for item in zip(colors, shapes, cells, strict=True)]
    return tuple(sorted(items, key=lambda item: (item.row, item.column))), shared[0]


def _place(rng: random.Random, color: str, shape: str, cell: int) -> Item:
    """An item that nearly fills its cell; its size and center vary by about one pixel in 48."""
    row, column = divmod(cell, 2)
    radius = rng.uniform(0.19, 0.22)
    x, y = ((at + 0.5) / 2 + rng.uniform(-0.02, 0.02) for at in (column, row))
    return Item(color, shape, row, column, x, y, radius)


def _questions(rng: random.Random, items: Sequence[Item], counted: str) -> list[tuple[str, str]]:
    """Questions with their answers, in random order: colors and shapes by place, a count, colors by neighbor.

    Questions refer to objects by place, so that no answer reveals another.
    """
    colors, shapes = [item.color for item in items], [item.shape for item in items]
    neighbors = {second: (side, first) for second, side, first in _neighbors(rng.sample(items, len(items)))}
    *direct, last = rng.sample(items, len(items))
    side, beside = neighbors[last]
    questions = [(f"What color is the {item.place} shape?", item.color) for item in direct]
    questions.append((f"What color is {side} of the {beside.place} shape?", last.color))
    questions += [(f"What shape is in the {item.place}?", item.shape) for item in items]
    things = f"{counted}s" if counted in SHAPES else f"{counted} shapes"
    questions.append((f"How many {things} are there?", COUNTS[(colors + shapes).count(counted) - 1]))
    return rng.sample(questions, len(questions))


def _grounding(item: Item, pixels: Size, side: int) -> tuple[str, str]:
    """Question and answer about the position of an item: Qwen-VL's box, in thousandths of width and height.

    Numbers are in [0, 1000) (Qwen-VL, section 3.2.1; from memory: unverified).
    """
    left, top, right, bottom = (min(999, max(0, int(1000 * edge))) for edge in _edges(item, pixels, side))
    thing = f"{item.color} {item.shape}"
    return _where(item), f"<ref>{thing}</ref><box>({left},{top}),({right},{bottom})</box>"


def _where(item: Item) -> str:
    return f"Where is the {item.color} {item.shape}?"


def _box(item: Item, pixels: Size, side: int) -> tuple[float, ...]:
    """The box of an item in pixels, without what is outside of the image."""
    lengths = (pixels[1], pixels[0]) * 2
    return tuple(min(max(0.0, edge), 1.0) * length for edge, length in zip(_edges(item, pixels, side), lengths))


def _edges(item: Item, pixels: Size, side: int) -> list[float]:
    """Left, top, right and bottom of an item as fractions of the image's width and height."""
    centers, lengths = (item.x, item.y) * 2, (pixels[1], pixels[0]) * 2
    return [center + reach * side / length for center, reach, length in zip(centers, item.extent, lengths)]


def _neighbors(items: Sequence[Item]) -> Iterator[tuple[Item, str, Item]]:
    """Neighboring items and their relation: the first is on the given side of the second."""
    for first, second in permutations(items, 2):
        if first.row == second.row:
            yield first, "west" if first.column < second.column else "east", second
        elif first.column == second.column:
            yield first, "north" if first.row < second.row else "south", second
