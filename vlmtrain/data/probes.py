"""Procedural questions of six kinds, held out by combination: what a connector keeps of a picture, and what it loses.

    (seed, split, i) -> category -> scene -> picture, caption, questions -> Conversation

| category | asks | combination held out |
|---|---|---|
| color | the color of a shape among others | color and shape |
| shape | the shape of a color among others | color and shape |
| count | how many shapes have a color | color and number |
| position | on which side of one shape another is | color and side |
| text | the digits and letters that are drawn | color and character |
| small | color or shape of a small thing among large ones | color and shape |

No picture but those of validation shows a held-out color and shape, number or character; no question but those of
validation is about a held-out side. `Level` says what difficulty 1, 2 and 3 are.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

from .records import IMAGE_MARK, Conversation, Grading, Turn
from .shapes import BACKGROUND, COLORS, DESCRIBE, HELD_OUT, INK, LINE, SHAPES, SIDES, SPLITS, Item, draw_item

CATEGORIES = ("color", "shape", "count", "position", "text", "small")
NUMBERS = ("one", "two", "three", "four", "five")
CHARACTERS = "0123456789ABCDEFGHJKLMNPQRSTUVWXYZ"
"""Without I and O, which look like 1 and 0."""
MARGIN = 0.03
"""Around the grid that things stand in, as a share of the picture's side."""
PITCH = 1.15
"""From one character to the next, in heights."""

HELD_OUT_NUMBERS = frozenset(zip(COLORS, NUMBERS[1:] * 2))
"""(color, number) pairs; "one" is none of them, for one of each color is in every picture of other categories."""
HELD_OUT_SIDES = frozenset(zip(COLORS, SIDES * 2))
"""(color, side) pairs: that color on that side of another."""
HELD_OUT_CHARACTERS = frozenset(
    (color, character)
    for i, color in enumerate(COLORS)
    for j, character in enumerate(CHARACTERS)
    if (j - i) % len(COLORS) == 0
)
"""(color, character) pairs: a seventh of the characters for each color, and each for one color."""

VOCABULARY: tuple[str, ...] = (
    *COLORS, *SHAPES, *SIDES, *NUMBERS, *CHARACTERS,
    "What", "color", "shape", "shapes", "is", "are", "the", "How", "many", "there", "Which", "side", "of", "does", "it",
    "say", "small", "Describe", "picture", ".", ",", "?",
)  # fmt: skip
"""Every word and punctuation mark that the texts are made of."""


class Level(NamedTuple):
    """A difficulty. cells: of the grid that things stand in, a side; objects: things in a picture; most: that are
    counted; small: radius of the small thing; characters: to read, of this height. Lengths are shares of the side."""

    cells: int
    objects: int
    most: int
    small: float
    characters: int
    height: float


LEVELS = {
    1: Level(cells=2, objects=3, most=3, small=0.09, characters=1, height=0.5),
    2: Level(cells=3, objects=4, most=4, small=0.06, characters=2, height=0.33),
    3: Level(cells=4, objects=5, most=5, small=0.04, characters=3, height=0.22),
}


@dataclass(frozen=True)
class Writing:
    """Characters side by side around ``(x, y)``, `height` high; as shares of the picture's side."""

    text: str
    color: str
    x: float
    y: float
    height: float


@dataclass(frozen=True)
class ProbePicture:
    """A scene that is drawn when it is loaded: ``side x side`` pixels, antialiased, RGB."""

    items: tuple[Item, ...]
    writing: Writing | None
    side: int

    def size(self) -> tuple[int, int]:
        return self.side, self.side

    def load(self) -> Image.Image:
        oversample = 4
        canvas = Image.new("RGB", (self.side * oversample,) * 2, BACKGROUND)
        draw = ImageDraw.Draw(canvas)
        for item in self.items:
            draw_item(draw, item, canvas.width, line=min(LINE, item.radius / 6))
        if self.writing:
            _write(draw, self.writing, canvas.width)
        return canvas.reduce(oversample)


def _write(draw: ImageDraw.ImageDraw, writing: Writing, side: int) -> None:
    """Each character in a place of its own, in Pillow's built-in font."""
    font = ImageFont.load_default(1.35 * writing.height * side)  # capitals are about 0.74 of a font's size
    pitch = PITCH * writing.height
    for i, character in enumerate(writing.text):
        x = writing.x + pitch * (i - (len(writing.text) - 1) / 2)
        place = (x * side, writing.y * side)
        fill, stroke = COLORS[writing.color], max(1, round(0.008 * side))
        draw.text(place, character, fill, font, anchor="mm", stroke_width=stroke, stroke_fill=INK)


class Scene(NamedTuple):
    """What is in a picture, in words, and the questions about it with their answers."""

    items: tuple[Item, ...]
    writing: Writing | None
    caption: str
    questions: tuple[tuple[str, str], ...]


class Probes:
    """One split as a sequence of conversations; the categories take turns.

    split: ``caption`` (picture and caption), ``text`` (a scene in words and questions about it, no picture),
    ``instruct`` (picture and questions) or ``validation`` (picture and one question about a held-out combination).
    size: number of conversations. image_size: side of the pictures in pixels. difficulty: of `LEVELS`.

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
    ):
        if split not in SPLITS:
            raise ValueError(f"Unknown split {split!r} of the probes. Available: {', '.join(SPLITS)}")
        if difficulty not in LEVELS or isinstance(difficulty, bool):
            raise ValueError(f"data.difficulty={difficulty}: expected one of {', '.join(map(str, LEVELS))}")
        strange = [category for category in categories if category not in CATEGORIES]
        if strange or not len(categories):
            raise ValueError(f"data.categories={list(categories)}: expected some of {', '.join(CATEGORIES)}")
        self.split, self.size, self.image_size, self.seed = split, size, image_size, seed
        self.difficulty, self.categories = difficulty, tuple(categories)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Conversation:
        if not 0 <= index < self.size:
            raise IndexError(f"probe {index} of {self.size}")
        rng = random.Random(f"{self.seed}/{self.split}/{self.difficulty}/{index}")
        category = self.categories[index % len(self.categories)]
        scene = SCENES[category](rng, LEVELS[self.difficulty], self.split == "validation")
        if self.split == "caption":
            exchanges, opening = ((DESCRIBE, scene.caption),), IMAGE_MARK
        else:
            exchanges, opening = scene.questions, scene.caption if self.split == "text" else IMAGE_MARK
        turns = []
        for question, answer in exchanges:
            text = question if turns else f"{opening}\n{question}"
            turns += [Turn("user", text), Turn("assistant", answer, Grading(category))]
        picture = ProbePicture(scene.items, scene.writing, self.image_size)
        return Conversation(f"{self.split}-{index}", tuple(turns), () if self.split == "text" else (picture,))


def _color_scene(rng: random.Random, level: Level, held_out: bool) -> Scene:
    items = _objects(rng, level, level.objects, held_out)
    return _scene(rng, items, [(f"What color is the {item.shape}?", item.color) for item in _asked(items, held_out)])


def _shape_scene(rng: random.Random, level: Level, held_out: bool) -> Scene:
    items = _objects(rng, level, level.objects, held_out)
    return _scene(rng, items, [(f"What shape is {item.color}?", item.shape) for item in _asked(items, held_out)])


def _count_scene(rng: random.Random, level: Level, held_out: bool) -> Scene:
    """One color as often as it is counted, and others once each where there is room."""
    possible = [
        (color, NUMBERS[n])
        for color in COLORS
        for n in range(level.most)
        if ((color, NUMBERS[n]) in HELD_OUT_NUMBERS) == held_out
    ]
    number = rng.choice(sorted({number for _, number in possible}))  # numbers come equally often
    color = rng.choice([color for color, own in possible if own == number])
    times = NUMBERS.index(number) + 1
    room = min(level.cells**2, level.most + 2) - times
    others = rng.sample([other for other in COLORS if other != color], rng.randint(0, min(room, 2)))
    pairs = [(color, _shape_for(rng, color)) for _ in range(times)]
    pairs += [(other, _shape_for(rng, other)) for other in others]
    items = _placed(rng, level, pairs)
    questions = [(f"How many shapes are {color}?", number)]
    questions += [] if held_out else [(f"How many shapes are {other}?", "one") for other in others]
    return _scene(rng, items, questions)


def _position_scene(rng: random.Random, level: Level, held_out: bool) -> Scene:
    """Two things side by side. The second is asked for too, in training: neither relation may be held out there."""
    while True:
        (first, second), side = rng.sample(list(COLORS), 2), rng.choice(SIDES)
        pair = ((first, side), (second, _opposite(side)))
        if (pair[0] in HELD_OUT_SIDES) if held_out else not HELD_OUT_SIDES & set(pair):
            break
    forward = side in ("west", "north")
    apart = rng.randint(1, level.cells - 1)
    line, start = rng.randrange(level.cells), rng.randrange(level.cells - apart)
    along = (start, start + apart) if forward else (start + apart, start)
    cells = [(line, at) if side in ("west", "east") else (at, line) for at in along]
    items = tuple(_item(rng, level, color, _shape_for(rng, color), cell) for color, cell in zip((first, second), cells))
    question = "Which side of the {} shape is the {} shape?"
    questions = [(question.format(second, first), side)]
    questions += [] if held_out else [(question.format(first, second), _opposite(side))]
    caption = f"{first} {items[0].shape} {side} of {second} {items[1].shape}."
    return Scene(items, None, caption, tuple(rng.sample(questions, len(questions))))


def _text_scene(rng: random.Random, level: Level, held_out: bool) -> Scene:
    color = rng.choice(list(COLORS))
    allowed = [c for c in CHARACTERS if ((color, c) in HELD_OUT_CHARACTERS) == held_out]
    text = "".join(rng.choice(allowed) for _ in range(level.characters))
    across, high = PITCH * level.height * level.characters / 2, level.height / 2
    x, y = (rng.uniform(min(0.5, half + 0.04), max(0.5, 0.96 - half)) for half in (across, high))
    said = " ".join(text)
    writing = Writing(text, color, x, y, level.height)
    return Scene((), writing, f"{color} {said}.", (("What does it say?", said),))


def _small_scene(rng: random.Random, level: Level, held_out: bool) -> Scene:
    """The small thing is the one that is held out. Color and shape are not asked of one picture: each tells a part."""
    items = _objects(rng, level, level.objects, held_out)
    chosen = _asked(items, held_out)[0] if held_out else rng.choice(items)
    small = Item(chosen.color, chosen.shape, chosen.row, chosen.column, chosen.x, chosen.y, level.small)
    items = tuple(small if item is chosen else item for item in items)
    by_color = rng.random() < 0.5
    question = ("What color is the small shape?", small.color) if by_color else ("What shape is small?", small.shape)
    words = [f"{'small ' * (item is small)}{item.color} {item.shape}" for item in items]
    return Scene(items, None, f"{', '.join(rng.sample(words, len(words)))}.", (question,))


SCENES = {
    "color": _color_scene,
    "shape": _shape_scene,
    "count": _count_scene,
    "position": _position_scene,
    "text": _text_scene,
    "small": _small_scene,
}


def _objects(rng: random.Random, level: Level, number: int, held_out: bool) -> tuple[Item, ...]:
    """Things of different colors and shapes, one of them a held-out pair if any may be."""
    while True:
        pairs = list(zip(rng.sample(list(COLORS), number), rng.sample(SHAPES, number)))
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
    """A thing that nearly fills its cell."""
    row, column = cell
    side = (1 - 2 * MARGIN) / level.cells
    x, y = (MARGIN + side * (at + 0.5 + rng.uniform(-0.03, 0.03)) for at in (column, row))
    return Item(color, shape, row, column, x, y, side * rng.uniform(0.37, 0.43))


def _scene(rng: random.Random, items: tuple[Item, ...], questions: Sequence[tuple[str, str]]) -> Scene:
    caption = f"{', '.join(f'{item.color} {item.shape}' for item in rng.sample(items, len(items)))}."
    return Scene(items, None, caption, tuple(rng.sample(list(questions), len(questions))))


def _opposite(side: str) -> str:
    return {"west": "east", "east": "west", "north": "south", "south": "north"}[side]
