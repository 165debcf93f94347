"""Procedural videos of colored shapes that move, appear and disappear, with questions that no single frame answers.

    (seed, split, i) -> category -> scene -> video, caption, questions -> Conversation

| category | question | with one frame | with shuffled frames |
|---|---|---|---|
| color | the color of the shape that moves | one of the two or three shapes | can be answered |
| shape | the shape that moves | one of the two or three shapes | can be answered |
| way | the side to which a shape moves | one of two opposite sides | one of two opposite sides |
| count | how often a shape appears | one of three numbers | one of three numbers |
| order | the color of the shape that comes first, second or last | one of three shapes | one of three shapes |

A frame at an unknown time says no more than that: shapes that rest are found at the same places as shapes that move,
motions to opposite sides pass the same places, and shapes are visible equally long. A video has `BEATS` beats, which
are at evenly spaced frames from the first to the last, so ``sampling: uniform`` with that many frames shows each.

The shape in question has a color-shape pair in `HELD_OUT` in all validation videos and in no others.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import numpy as np
from PIL import Image

from . import shapes
from .probes import ProbeImage, exchanges_to_turns
from .records import VIDEO_MARK, Conversation, VideoFacts
from .shapes import COLORS, COUNTS, HELD_OUT, SHAPES, Item

CATEGORIES = ("color", "shape", "way", "count", "order")
SPLITS = ("caption", "text", "instruct", "validation")
FPS = 8
BEATS = 8
FRAMES_PER_BEAT = (2, 3, 4)
"""Numbers of frames from one beat to the next, drawn with equal probability."""
LANES = 3
"""Strips of a frame, across or down, in each of which at most one shape rests or moves."""
RADIUS = (0.125, 0.14)
"""Smallest and largest radius of a shape, as fractions of the side of a frame."""
SPAN = 0.66
"""Length of a motion, as a fraction of the side of a frame."""
MARGIN = (0.16, 0.18)
"""Smallest and largest distance of a motion's west or north end from the side of the frame."""
HUES = tuple(color for color in COLORS if any((color, shape) in HELD_OUT for shape in SHAPES))
"""The colors of shapes, each of which has one held-out pair, so all are equally frequent in all splits."""
RANKS = ("first", "second", "last")
DESCRIBE = "Describe the video."

VOCABULARY: tuple[str, ...] = (
    *shapes.VOCABULARY, *RANKS, "Which", "way", "does", "move", "moves", "rests", "often", "appear", "appears",
    "comes", "video",
)  # fmt: skip
"""All words and punctuation marks in the texts, and those of the shapes."""


@dataclass(frozen=True)
class Actor:
    """A shape: where it is at the start, where it is at the end, and the beats in which it is visible."""

    item: Item
    end: tuple[float, float]
    beats: frozenset[int] = frozenset(range(BEATS))

    def at(self, time: float) -> Item | None:
        """The shape at a time in beats, from 0 to ``BEATS - 1``; None if it is not visible."""
        if int(time + 0.5) not in self.beats:
            return None
        share = time / (BEATS - 1)
        x, y = (start + share * (end - start) for start, end in zip((self.item.x, self.item.y), self.end))
        return replace(self.item, x=x, y=y)


@dataclass(frozen=True)
class Clip:
    """A video whose frames are drawn when they are read. count: number of frames. side: of a frame in pixels."""

    actors: tuple[Actor, ...]
    count: int
    side: int

    def probe(self) -> VideoFacts:
        return VideoFacts(np.arange(self.count) / FPS, self.count / FPS, (self.side, self.side))

    def frames(self, numbers: Sequence[int]) -> Iterator[Image.Image]:
        for number in numbers:
            shown = (actor.at(number * (BEATS - 1) / (self.count - 1)) for actor in self.actors)
            items = tuple(item for item in shown if item is not None)
            yield ProbeImage(items=items, pixels=(self.side, self.side), side=self.side).load()


class Scene(NamedTuple):
    """The content of a video, its caption, and questions about it with their answers."""

    actors: Sequence[Actor]
    caption: str
    questions: Sequence[tuple[str, str]]


class Motion:
    """One split as a sequence of conversations that cycles through the categories.

    split: ``caption`` (video and caption), ``text`` (a described scene and questions about it, no video), ``instruct``
    (video and questions) or ``validation`` (video and one question about a shape of a held-out pair).
    size: number of conversations. image_size: side of the frames in pixels.

    Raises ValueError for an unknown split.
    """

    def __init__(self, split: str, size: int, image_size: int = 48, seed: int = 0):
        if split not in SPLITS:
            raise ValueError(f"unknown split {split!r} of the motion data. Available: {', '.join(SPLITS)}")
        self.split, self.size, self.image_size, self.seed = split, size, image_size, seed

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Conversation:
        if not 0 <= index < self.size:
            raise IndexError(f"video {index} of {self.size}")
        rng = random.Random(f"{self.seed}/{self.split}/{index}")
        category = CATEGORIES[index % len(CATEGORIES)]
        scene = SCENES[category](rng, self.split == "validation")
        exchanges = ((DESCRIBE, scene.caption),) if self.split == "caption" else scene.questions
        opening = scene.caption if self.split == "text" else VIDEO_MARK
        turns = exchanges_to_turns(opening, exchanges, category)
        count = (BEATS - 1) * rng.choice(FRAMES_PER_BEAT) + 1
        clip = Clip(tuple(scene.actors), count, self.image_size)
        return Conversation(f"{self.split}-{index}", turns, () if self.split == "text" else (clip,))


def _what_scene(rng: random.Random, held_out: bool, attribute: str) -> Scene:
    """One shape moves, one or two rest."""
    actors, ways = _cast(rng, held_out, movers=1, others=rng.randint(1, 2))
    return Scene(actors, _caption(actors, ways), [(f"What {attribute} moves?", getattr(actors[0].item, attribute))])


def _way_scene(rng: random.Random, held_out: bool) -> Scene:
    """One or two shapes move, and one may rest."""
    actors, ways = _cast(rng, held_out, movers=rng.randint(1, 2), others=rng.randint(0, 1))
    questions = [(f"Which way does the {actor.item.color} shape move?", way) for actor, way in zip(actors, ways) if way]
    return Scene(actors, _caption(actors, ways), questions[:1] if held_out else questions)


def _count_scene(rng: random.Random, held_out: bool) -> Scene:
    """One shape appears and disappears, and another one may rest."""
    (first, *others), _ = _cast(rng, held_out, movers=0, others=rng.randint(1, 2))
    times = rng.randint(1, len(COUNTS))
    actors = [replace(first, beats=_visible(rng, times)), *others]
    doings = [f"appears {COUNTS[times - 1]}", *["rests"] * len(others)]
    question = f"How often does the {first.item.color} shape appear?"
    return Scene(actors, _said(actors, doings), [(question, COUNTS[times - 1])])


def _order_scene(rng: random.Random, held_out: bool) -> Scene:
    """Shapes appear one after another, each for two beats. There are none in the first and the last beat."""
    resting, _ = _cast(rng, held_out, movers=0, others=len(RANKS))
    ranks = rng.sample(range(len(RANKS)), len(RANKS))
    beats = [frozenset((2 * rank + 1, 2 * rank + 2)) for rank in ranks]
    actors = [replace(actor, beats=visible) for actor, visible in zip(resting, beats)]
    questions = [(f"What color comes {RANKS[rank]}?", actor.item.color) for actor, rank in zip(actors, ranks)]
    caption = _said(actors, [f"comes {RANKS[rank]}" for rank in ranks])
    return Scene(actors, caption, questions[:1] if held_out else rng.sample(questions, len(questions)))


SCENES = {
    "color": partial(_what_scene, attribute="color"),
    "shape": partial(_what_scene, attribute="shape"),
    "way": _way_scene,
    "count": _count_scene,
    "order": _order_scene,
}


def _cast(rng: random.Random, held_out: bool, movers: int, others: int) -> tuple[list[Actor], list[str | None]]:
    """Shapes that move, then shapes that rest, and the sides to which they move.

    Their colors and shapes differ. Only the first shape may have a held-out pair.
    """
    number = movers + others
    while True:
        pairs = list(zip(rng.sample(HUES, number), rng.sample(SHAPES, number)))
        if [pair in HELD_OUT for pair in pairs] == [held_out, *[False] * (number - 1)]:
            break
    sides = rng.choice((("west", "east"), ("north", "south")))
    ways = [*(rng.choice(sides) for _ in range(movers)), *[None] * others]
    lanes = rng.sample(range(LANES), number)
    return [_actor(rng, *each, "north" in sides) for each in zip(pairs, lanes, ways)], ways


def _actor(rng: random.Random, pair: tuple[str, str], lane: int, way: str | None, down: bool) -> Actor:
    """A shape that moves along its lane, or rests where it could be while it moves. down: whether lanes are columns."""
    aside, low = (lane + 0.5) / LANES + rng.uniform(-0.01, 0.01), rng.uniform(*MARGIN)
    if way is None:
        ends = [low + SPAN * rng.random()] * 2
    else:
        ends = [low, low + SPAN] if way in ("east", "south") else [low + SPAN, low]
    start, end = ((aside, at) if down else (at, aside) for at in ends)
    row, column = (0, lane) if down else (lane, 0)
    return Actor(Item(*pair, row, column, *start, rng.uniform(*RADIUS)), end)


def _visible(rng: random.Random, times: int) -> frozenset[int]:
    """The beats in which a shape is visible that appears so many times.

    For each number of times, these are half of the beats, and each beat is among them in half of the videos. Neither a
    frame nor the number of frames with the shape says how often it appears.
    """
    lengths = zip(*(_parts(rng, BEATS // 2, times) for _ in range(2)))
    states = [state for on, off in lengths for state in [True] * on + [False] * off]
    first = rng.random() < 0.5
    return frozenset(beat for beat, state in enumerate(states) if state == first)


def _parts(rng: random.Random, total: int, number: int) -> list[int]:
    """Divide a total into so many parts of at least 1."""
    cuts = [0, *sorted(rng.sample(range(1, total), number - 1)), total]
    return [end - start for start, end in zip(cuts, cuts[1:])]


def _caption(actors: Sequence[Actor], ways: Sequence[str | None]) -> str:
    return _said(actors, [f"moves {way}" if way else "rests" for way in ways])


def _said(actors: Sequence[Actor], doings: Sequence[str]) -> str:
    """The caption: each shape with its color and what it does, in the order of the lanes."""
    told = sorted(zip(actors, doings), key=lambda each: (each[0].item.row, each[0].item.column))
    return f"{', '.join(f'{a.item.color} {a.item.shape} {doing}' for a, doing in told)}."
