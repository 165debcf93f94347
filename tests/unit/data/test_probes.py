"""Probes: questions match the images, and held-out combinations do not occur in training."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from vlmtrain.data import probes
from vlmtrain.data.probes import CATEGORIES, LEVELS, Probes
from vlmtrain.data.records import Conversation
from vlmtrain.data.shapes import COLORS, HELD_OUT
from vlmtrain.model.tiny_tokenizer import build_tiny_tokenizer

MANY = 1500
TRAINING = ("caption", "instruct")


def conversations(split: str, difficulty: int = 1, size: int = MANY) -> list[Conversation]:
    source = Probes(split, size, difficulty=difficulty)
    return [source[i] for i in range(size)]


def questions(conversation: Conversation) -> list[tuple[str, str, str]]:
    """Category, question and answer."""
    turns = conversation.turns
    return [
        (said.grading.category, asked.text.split("\n")[-1], said.text) for asked, said in zip(turns[::2], turns[1::2])
    ]


def side_of(first, second) -> str:
    """Side of the second item on which the first one is, by their centers."""
    across, down = first.x - second.x, first.y - second.y
    if abs(across) > abs(down):
        return "west" if across < 0 else "east"
    return "north" if down < 0 else "south"


def place_of(item, cells: int) -> str:
    """Name of the place of an item, by its center."""
    down, across = (min(cells - 1, int(at * cells)) for at in (item.y, item.x))
    if cells == 2:
        return ("north", "south")[down] + ("west", "east")[across]
    return ("north", "", "south")[down] + ("west", "", "east")[across] or "center"


def answer_from(picture, question: str, cells: int) -> str:
    """The answer to a question, derived from the drawn scene."""
    words = question.rstrip("?").split()
    items = picture.items
    if question == "What does it say?":
        return " ".join(picture.writing.text)
    if words[0] == "How":
        return probes.NUMBERS[sum(item.color == words[2] for item in items) - 1]
    if words[0] == "Which":
        (first,) = (item for item in items if item.color == words[8])
        (second,) = (item for item in items if item.color == words[4])
        return side_of(first, second)
    if "small" in words:
        item = min(items, key=lambda item: item.radius)
    else:
        (item,) = (item for item in items if place_of(item, cells) in words)
    return item.color if words[1] == "color" else item.shape


@pytest.mark.parametrize("difficulty", LEVELS)
@pytest.mark.parametrize("split", ["instruct", "validation"])
def test_answers_are_what_the_image_shows(split, difficulty):
    for conversation in conversations(split, difficulty, 600):
        (picture,) = conversation.images
        for _, question, answer in questions(conversation):
            assert answer == answer_from(picture, question, LEVELS[difficulty].cells), (conversation.id, question)


@pytest.mark.parametrize("difficulty", LEVELS)
@pytest.mark.parametrize("split", TRAINING)
def test_nothing_held_out_occurs_in_training(split, difficulty):
    for conversation in conversations(split, difficulty):
        (picture,) = conversation.images
        assert not HELD_OUT & {(item.color, item.shape) for item in picture.items}
        if picture.writing:
            written = {(picture.writing.color, character) for character in picture.writing.text}
            assert not probes.HELD_OUT_CHARACTERS & written
        if conversation.turns[1].grading.category == "position":
            assert frozenset(item.color for item in picture.items) not in probes.HELD_OUT_COLORS


@pytest.mark.parametrize("difficulty", LEVELS)
def test_validation_asks_only_for_held_out_combinations(difficulty):
    for conversation in conversations("validation", difficulty):
        ((category, question, answer),) = questions(conversation)
        (picture,) = conversation.images
        if category in ("color", "shape", "small"):
            (item,) = (item for item in picture.items if (item.color, item.shape) in HELD_OUT)
            assert answer in (item.color, item.shape)
            assert (item.radius == LEVELS[difficulty].small) == (category == "small")
        elif category == "count":
            (shape,) = {item.shape for item in picture.items if item.color == question.split()[2]}
            assert (question.split()[2], shape) in HELD_OUT
        elif category == "position":
            assert frozenset(item.color for item in picture.items) in probes.HELD_OUT_COLORS
        else:
            written = {(picture.writing.color, character) for character in picture.writing.text}
            assert written <= probes.HELD_OUT_CHARACTERS and len(picture.writing.text) == difficulty


def test_every_combination_but_those_is_trained_on():
    """Otherwise a validation question could not be learned from the training data."""
    talks = conversations("instruct", 2, 12000)
    scenes = [talk.images[0] for talk in talks]
    pairs = {(item.color, item.shape) for scene in scenes for item in scene.items}
    assert len(pairs) == len(COLORS) * 5 - len(HELD_OUT)
    written = {(scene.writing.color, c) for scene in scenes if scene.writing for c in scene.writing.text}
    assert len(written) == len(COLORS) * len(probes.CHARACTERS) - len(probes.HELD_OUT_CHARACTERS)
    beside = {
        frozenset(item.color for item in talk.images[0].items)
        for talk in talks
        if talk.turns[1].grading.category == "position"
    }
    assert len(beside) == 7 * 6 // 2 - len(probes.HELD_OUT_COLORS) and len(probes.HELD_OUT_COLORS) == 7


def test_text_alone_does_not_exclude_the_answers_of_validation():
    """Every validation question occurs literally in training with the same answer."""
    trained = {found[1:] for talk in conversations("instruct", size=12000) for found in questions(talk)}
    asked = {found[1:] for talk in conversations("validation", size=600) for found in questions(talk)}
    missing = {question for question, _ in asked - trained if not question.startswith("Which")}
    assert not missing
    # questions about sides use two colors that never occur together, but each side is an answer for each color
    trained_sides = {(question.split()[8], answer) for question, answer in trained if question.startswith("Which")}
    assert len(trained_sides) == len(COLORS) * 4


def test_answers_are_balanced():
    """No answer in a category is much more frequent than others, so little can be guessed without the image."""
    found = {category: Counter() for category in CATEGORIES}
    for conversation in conversations("validation", 1, 3000):
        ((category, _, answer),) = questions(conversation)
        found[category][answer] += 1
    most = {category: max(counts.values()) / sum(counts.values()) for category, counts in found.items()}
    assert most["color"] < 0.3 and most["shape"] < 0.3 and most["position"] < 0.35 and most["text"] < 0.25
    assert most["count"] < 0.4 and most["small"] < 0.2


@pytest.mark.parametrize("sides", [None, (36, 96)])
def test_images_fit_the_frame(sides):
    for difficulty in LEVELS:
        source = Probes("instruct", 120, difficulty=difficulty, sides=sides)
        for conversation in source:
            pixels = np.asarray(conversation.images[0].load()).astype(int)
            assert pixels.shape == (*conversation.images[0].size(), 3) and (sides or pixels.shape == (48, 48, 3))
            edge = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
            assert abs(edge - np.array([246, 246, 242])).max() < 40, conversation.id


def test_text_keeps_its_size_in_images_of_mixed_sizes():
    options = {"difficulty": 3, "categories": ["text"]}
    squares, mixed = Probes("instruct", 30, 36, **options), Probes("instruct", 30, **options, sides=(36, 96))
    for before, after in zip(squares, mixed):
        inks = []
        for (picture,) in (before.images, after.images):
            rows, columns = np.nonzero(
                np.abs(np.asarray(picture.load()).astype(int) - (246, 246, 242)).max(axis=2) > 90
            )
            inks.append((np.ptp(rows), np.ptp(columns)))
        assert np.abs(np.subtract(*inks)).max() <= 1


def test_every_text_is_made_of_known_words():
    tokenizer = build_tiny_tokenizer(probes.VOCABULARY)
    known = len(tokenizer.backend_tokenizer.get_vocab())
    single = {byte for byte, index in tokenizer.get_vocab().items() if index < 256}
    assert known < 500
    for split in ("caption", "text", "instruct", "validation"):
        for conversation in conversations(split, 3, 120):
            for turn in conversation.turns:
                tokens = tokenizer.tokenize(turn.text.replace("<image>\n", ""))
                pieces = [t for t in tokens if t in single and t not in {*probes.CHARACTERS, ".", ",", "?", "Ċ"}]
                assert not pieces, (turn.text, tokens)


@pytest.mark.parametrize(
    "options, said",
    [
        ({"split": "test"}, "unknown split 'test'"),
        ({"split": "text", "difficulty": 4}, "data.difficulty=4: expected one of 1, 2, 3"),
        ({"split": "text", "categories": ["colour"]}, "expected some of color"),
    ],
)
def test_unknown_options_are_named(options, said):
    with pytest.raises(ValueError, match=said):
        Probes(size=1, **options)
