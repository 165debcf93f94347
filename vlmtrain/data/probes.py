"""Procedural questions of six kinds with held-out combinations, to measure what a connector preserves of an image.

    (seed, split, i) -> category -> scene -> image, caption, questions -> Conversation

| category | question | held-out combination |
|---|---|---|
| color | the color of the shape at a place | color and shape |
| shape | the shape at a place | color and shape |
| count | how many shapes have a color | color and shape of what is counted |
| position | the side of one shape on which another is | the two colors |
| text | the digits and letters in the image | color and character |
| small | color or shape of a small object among large ones | color and shape |

Only validation images show a held-out combination of color and shape, of color and character, or, for questions about
sides, of two colors. No question mentions one part of a combination whose other part is the answer, because a model
could learn from the text alone that this answer never occurs. `Level` defines the difficulties 1, 2 and 3.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from PIL import ImageFont

from .records import IMAGE_MARK, Conversation, Grading, Turn
from .shapes import (
    COLORS,
    DESCRIBE,
    HELD_OUT,
    INK,
    LINE,
    PLACES,
    SHAPES,
    SPLITS,
    Canvas,
    Item,
    SceneImage,
    draw_item,
    pixels_of,
)

CATEGORIES = ("color", "shape", "count", "position", "text", "small")
NUMBERS = ("one", "two", "three", "four", "five")
GRIDS: dict[int, tuple[str, ...]] = {
    2: PLACES,
    3: ("northwest", "north", "northeast", "west", "center", "east", "southwest", "south", "southeast"),
}
"""Names of the places in a grid, row by row; the key is the number of cells per side."""
DIGITS = "0123456789"
CHARACTERS = DIGITS + "ABCDEFGHJKLMNPQRSTUVWXYZ"
"""Without I and O, which look like 1 and 0."""
MARGIN = 0.03
"""Margin around the grid of objects, as a fraction of the image's width and height."""
PITCH = 1.15
"""Distance between neighboring characters, in units of their height."""

HELD_OUT_COLORS = frozenset(frozenset(pair) for pair in zip(COLORS, [*list(COLORS)[3:], *list(COLORS)[:3]]))
"""Pairs of colors that are never next to each other in questions about sides; each color is in two pairs."""
HELD_OUT_CHARACTERS = frozenset(
    (color, character)
    for i, color in enumerate(COLORS)
    for j, character in enumerate(CHARACTERS)
    if (j - i) % len(COLORS) == 0
)
"""(color, character) pairs: a seventh of the characters for each color; each character is in one pair."""

VOCABULARY: tuple[str, ...] = (
    *COLORS, *SHAPES, *GRIDS[3], *NUMBERS, *CHARACTERS,
    "What", "color", "shape", "shapes", "is", "are", "the", "in", "How", "many", "there", "Which", "side", "of", "does",
    "it", "say", "small", "Describe", "picture", ".", ",", "?",
)  # fmt: skip
"""All words and punctuation marks in the texts."""


class Level(NamedTuple):
    """A difficulty.

    cells: cells per side of the grid of objects; radius: of an object, as a fraction of its cell; objects: number of
    objects in an image; most: largest count; small: radius of the small object; alphabet, characters, height: of the
    text to read. small and height are fractions of the scene's side.
    """

    cells: int
    radius: float
    objects: int
    most: int
    small: float
    alphabet: str
    characters: int
    height: float


LEVELS = {
    1: Level(2, 0.4, objects=3, most=3, small=0.09, alphabet=DIGITS, characters=1, height=0.5),
    2: Level(3, 0.4, objects=4, most=4, small=0.06, alphabet=CHARACTERS, characters=2, height=0.33),
    3: Level(3, 0.28, objects=5, most=5, small=0.04, alphabet=CHARACTERS, characters=3, height=0.22),
}


@dataclass(frozen=True)
class Writing:
    """A line of characters, with its center as fractions of the image's width and height.

    Its height is a fraction of the side of the scene.
    """

    text: str
    color: str
    x: float
    y: float
    height: float


@dataclass(frozen=True, kw_only=True)
class ProbeImage(SceneImage):
    """An image with optional text; small items have thinner outlines."""

    writing: Writing | None = None

    def draw(self, canvas: Canvas) -> None:
        for item in self.items:
            draw_item(canvas, item, line=min(LINE, item.radius / 6))
        if self.writing:
            _write(canvas, self.writing)


def _write(canvas: Canvas, writing: Writing) -> None:
    """Draw each character at a separate position in Pillow's built-in font."""
    side = canvas.side
    font = ImageFont.load_default(1.35 * writing.height * side)  # the height of capitals is about 0.74 of the font size
    pitch = PITCH * writing.height * side / canvas.width
    for i, character in enumerate(writing.text):
        x = writing.x + pitch * (i - (len(writing.text) - 1) / 2)
        place = (x * canvas.width, writing.y * canvas.height)
        fill, stroke = COLORS[writing.color], max(1, round(0.008 * side))
        canvas.drawing.text(place, character, fill, font, anchor="mm", stroke_width=stroke, stroke_fill=INK)


class Scene(NamedTuple):
    """The content of an image, its caption, and questions about it with their answers."""

    items: tuple[Item, ...]
    writing: Writing | None
    caption: str
    questions: tuple[tuple[str, str], ...]


class Probes:
    """One split as a sequence of conversations that cycles through the categories.

    split: ``caption`` (image and caption), ``text`` (a described scene and questions about it, no image),
    ``instruct`` (image and questions) or ``validation`` (image and one question about a held-out combination).
    size: number of conversations. image_size, sides: of the images in pixels, see `pixels_of`. difficulty: a key of
    `LEVELS`.

    Raises ValueError for an unknown split, category or difficulty.
    """

    def __init__(
        self,
        split: str,
        size: int,
        image_size: int = 48,
        seed: int = 0,
        difficulty: int = 1,
        categories: Sequence[str] = CATEGORIES,
        sides: tuple[int, int] | None = None,
    ):
        if split not in SPLITS:
            raise ValueError(f"unknown split {split!r} of the probes. Available: {', '.join(SPLITS)}")
        if difficulty not in LEVELS or isinstance(difficulty, bool):
            raise ValueError(f"data.difficulty={difficulty}: expected one of {', '.join(map(str, LEVELS))}")
        strange = [category for category in categories if category not in CATEGORIES]
        if strange or not len(categories):
            raise ValueError(f"data.categories={list(categories)}: expected some of {', '.join(CATEGORIES)}")
        self.split, self.size, self.image_size, self.seed, self.sides = split, size, image_size, seed, sides
        self.difficulty, self.categories = difficulty, tuple(categories)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Conversation:
        if not 0 <= index < self.size:
            raise IndexError(f"probe {index} of {self.size}")
        key = f"{self.seed}/{self.split}/{self.difficulty}/{index}"
        rng = random.Random(key)
        category = self.categories[index % len(self.categories)]
        scene = SCENES[category](rng, LEVELS[self.difficulty], self.split == "validation")
        if self.split == "caption":
            exchanges, opening = ((DESCRIBE, scene.caption),), IMAGE_MARK
        else:
            exchanges, opening = scene.questions, scene.caption if self.split == "text" else IMAGE_MARK
        turns = exchanges_to_turns(opening, exchanges, category)
        pixels, side = pixels_of(key, self.image_size, self.sides)
        image = ProbeImage(items=scene.items, pixels=pixels, side=side, writing=scene.writing)
        return Conversation(f"{self.split}-{index}", turns, () if self.split == "text" else (image,))


def exchanges_to_turns(opening: str, exchanges: Sequence[tuple[str, str]], category: str) -> tuple[Turn, ...]:
    """The turns of questions and answers of one category, with an opening before the first question."""
    turns = []
    for question, answer in exchanges:
        text = question if turns else f"{opening}\n{question}"
        turns += [Turn("user", text), Turn("assistant", answer, Grading(category))]
    return tuple(turns)


def _place_scene(rng: random.Random, level: Level, held_out: bool, attribute: str, question: str) -> Scene:
    """Objects, and the question about an attribute of the one at each place."""
    items = _objects(rng, level, held_out)
    asked = [(question.format(_place(level, item)), getattr(item, attribute)) for item in _asked(items, held_out)]
    return _scene(rng, level, items, asked)


def _count_scene(rng: random.Random, level: Level, held_out: bool) -> Scene:
    """One color and shape repeated as often as is counted, and other colors once each if there is room."""
    color, *others = rng.sample(list(COLORS), 3)
    times = rng.randint(1, level.most)
    if held_out:
        color, shape = rng.choice(sorted(HELD_OUT))
        others = [other for other in others if other != color]
    else:
        shape = _shape_for(rng, color)
    others = others[: rng.randint(0, min(level.cells**2 - times, 2))]
    items = _placed(rng, level, [(color, shape)] * times + [(other, _shape_for(rng, other)) for other in others])
    questions = [(f"How many {color} shapes are there?", NUMBERS[times - 1])]
    questions += [] if held_out else [(f"How many {other} shapes are there?", "one") for other in others]
    return _scene(rng, level, items, questions)


def _position_scene(rng: random.Random, level: Level, held_out: bool) -> Scene:
    """Two objects in a row or a column."""
    while True:
        colors = rng.sample(list(COLORS), 2)
        if (frozenset(colors) in HELD_OUT_COLORS) == held_out:
            break
    apart = rng.randint(1, level.cells - 1)
    line, start = rng.randrange(level.cells), rng.randrange(level.cells - apart)
    across = rng.random() < 0.5
    cells = [(line, at) if across else (at, line) for at in (start, start + apart)]
    sides = ("west", "east") if across else ("north", "south")
    items = tuple(_item(rng, level, color, _shape_for(rng, color), cell) for color, cell in zip(colors, cells))
    pairs = [(items[0], sides[0], items[1]), (items[1], sides[1], items[0])]
    rng.shuffle(pairs)
    questions = [(f"Which side of the {second.color} shape is the {first.color} shape?", side)
                 for first, side, second in pairs]  # fmt: skip
    first, side, second = pairs[0]
    caption = f"{first.color} {first.shape} {side} of {second.color} {second.shape}."
    return Scene(items, None, caption, tuple(questions[:1] if held_out else questions))


def _text_scene(rng: random.Random, level: Level, held_out: bool) -> Scene:
    color = rng.choice(list(COLORS))
    allowed = [c for c in level.alphabet if ((color, c) in HELD_OUT_CHARACTERS) == held_out]
    text = "".join(rng.choice(allowed) for _ in range(level.characters))
    across, high = PITCH * level.height * level.characters / 2, level.height / 2
    x, y = (rng.uniform(min(0.5, half + 0.04), max(0.5, 0.96 - half)) for half in (across, high))
    said = " ".join(text)
    writing = Writing(text, color, x, y, level.height)
    return Scene((), writing, f"{color} {said}.", (("What does it say?", said),))


def _small_scene(rng: random.Random, level: Level, held_out: bool) -> Scene:
    """The small object is the held-out one. An image has a question about color or shape, as each reveals the other."""
    items = _objects(rng, level, held_out)
    chosen = _asked(items, held_out)[0] if held_out else rng.choice(items)
    small = Item(chosen.color, chosen.shape, chosen.row, chosen.column, chosen.x, chosen.y, level.small)
    items = tuple(small if item is chosen else item for item in items)
    by_color = rng.random() < 0.5
    question = ("What color is the small shape?", small.color) if by_color else ("What shape is small?", small.shape)
    words = [f"{'small ' * (item is small)}{item.color} {item.shape}" for item in items]
    return Scene(items, None, f"{', '.join(rng.sample(words, len(words)))}.", (question,))


SCENES = {
    "color": partial(_place_scene, attribute="color", question="What color is the {} shape?"),
    "shape": partial(_place_scene, attribute="shape", question="What shape is in the {}?"),
    "count": _count_scene,
    "position": _position_scene,
    "text": _text_scene,
    "small": _small_scene,
}


def _objects(rng: random.Random, level: Level, held_out: bool) -> tuple[Item, ...]:
    """Objects with different colors and shapes; if `held_out`, one of them is a held-out pair."""
    while True:
        pairs = list(zip(rng.sample(list(COLORS), level.objects), rng.sample(SHAPES, level.objects)))
        if sum(pair in HELD_OUT for pair in pairs) == held_out:
            return _placed(rng, level, pairs)


def _asked(items: Sequence[Item], held_out: bool) -> list[Item]:
    return [item for item in items if not held_out or (item.color, item.shape) in HELD_OUT]


def _shape_for(rng: random.Random, color: str) -> str:
    return rng.choice([shape for shape in SHAPES if (color, shape) not in HELD_OUT])


def _placed(rng: random.Random, level: Level, pairs: Sequence[tuple[str, str]]) -> tuple[Item, ...]:
    cells = rng.sample([(row, column) for row in range(level.cells) for column in range(level.cells)], len(pairs))
    return tuple(_item(rng, level, color, shape, cell) for (color, shape), cell in zip(pairs, cells))


def _item(rng: random.Random, level: Level, color: str, shape: str, cell: tuple[int, int]) -> Item:
    row, column = cell
    side = (1 - 2 * MARGIN) / level.cells
    x, y = (MARGIN + side * (at + 0.5 + rng.uniform(-0.03, 0.03)) for at in (column, row))
    return Item(color, shape, row, column, x, y, side * level.radius * rng.uniform(0.93, 1.07))


def _place(level: Level, item: Item) -> str:
    return GRIDS[level.cells][level.cells * item.row + item.column]


def _scene(rng: random.Random, level: Level, items: tuple[Item, ...], questions: Sequence[tuple[str, str]]) -> Scene:
    """A scene with a caption that describes each place."""
    words = [f"{_place(level, item)} {item.color} {item.shape}" for item in rng.sample(items, len(items))]
    return Scene(items, None, f"{', '.join(words)}.", tuple(rng.sample(list(questions), len(questions))))
