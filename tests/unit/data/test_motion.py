"""Videos of shapes in motion: answers are read from the drawn frames; one frame or shuffled frames do not tell them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import cache
from itertools import combinations, groupby

import numpy as np
import pytest

from vlmtrain.data import motion, shapes
from vlmtrain.data.frame_sampling import SAMPLINGS
from vlmtrain.data.motion import BEATS, CATEGORIES, FRAMES_PER_BEAT, Actor, Clip, Motion
from vlmtrain.data.records import Conversation
from vlmtrain.data.shapes import BACKGROUND, COLORS, HELD_OUT
from vlmtrain.model.tiny_tokenizer import build_tiny_tokenizer
from vlmtrain.settings import compose


@cache
def conversations(split: str, size: int, image_size: int = 48) -> tuple[Conversation, ...]:
    source = Motion(split, size, image_size)
    return tuple(source[i] for i in range(size))


def questions(conversation: Conversation) -> list[tuple[str, str, str]]:
    """Category, question and answer."""
    turns = conversation.turns
    return [
        (said.grading.category, asked.text.split("\n")[-1], said.text) for asked, said in zip(turns[::2], turns[1::2])
    ]


def drawn(clip: Clip) -> np.ndarray:
    return np.stack([np.asarray(frame) for frame in clip.frames(range(clip.count))]).astype(int)


def places(frames: np.ndarray, color: str) -> np.ndarray:
    """Which pixels of each frame have a color."""
    return np.abs(frames - COLORS[color]).max(axis=3) < 12


def traces(frames: np.ndarray) -> dict[str, np.ndarray]:
    """The center (x, y) of each color in each frame in pixels, nan where it is not to be seen."""
    found = {}
    for color in COLORS:
        masks = places(frames, color)
        if masks.any():
            centers = [np.argwhere(mask).mean(axis=0)[::-1] if mask.sum() > 20 else (np.nan,) * 2 for mask in masks]
            found[color] = np.array(centers)
    return found


def shape_of(frames: np.ndarray, color: str) -> str:
    """The shape of a color that is in all frames, by the share of its box that it fills in the first frame."""
    (mask,) = places(frames[:1], color)
    rows, columns = np.nonzero(mask)
    filled = mask[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    height, width = filled.shape
    if not filled[height // 2, width // 2]:
        return "ring"
    if filled.mean() > 0.7:
        return "square" if filled.mean() > 0.9 else "circle"
    return "cross" if filled[: height // 3].sum() > 0.8 * filled[-(height // 3) :].sum() else "triangle"


def answer_from(frames: np.ndarray, question: str) -> str:
    """The answer to a question, read from all frames."""
    words = question.rstrip("?").split()
    centers = traces(frames)
    if words[0] == "How":
        seen = ~np.isnan(centers[words[4]][:, 0])
        return shapes.COUNTS[sum(shown for shown, _ in groupby(seen)) - 1]
    if words[2] == "comes":
        firsts = {color: np.flatnonzero(~np.isnan(found[:, 0]))[0] for color, found in centers.items()}
        return sorted(firsts, key=firsts.get)[motion.RANKS.index(words[3])]
    moved = {color: found[-1] - found[0] for color, found in centers.items()}
    if words[0] == "Which":
        x, y = moved[words[4]]
        return ("west", "east")[int(x > 0)] if abs(x) > abs(y) else ("north", "south")[int(y > 0)]
    (mover,) = (color for color, way in moved.items() if np.abs(way).max() > 0.1 * frames.shape[1])
    return mover if words[1] == "color" else shape_of(frames, mover)


@pytest.mark.parametrize("split", ["instruct", "validation"])
def test_answers_are_what_the_frames_show(split):
    for conversation in conversations(split, 50, 96):
        (clip,) = conversation.media
        frames = drawn(clip)
        for _, question, answer in questions(conversation):
            assert answer == answer_from(frames, question), (conversation.id, question)


def test_facts_are_those_of_the_frames():
    counts = set()
    for conversation in conversations("caption", 30, 96):
        (clip,) = conversation.media
        facts = clip.probe()
        frames = drawn(clip)
        assert frames.shape == (len(facts.times), *facts.size, 3) and facts.size == (96, 96)
        assert facts.times[0] == 0 and np.allclose(np.diff(facts.times), 1 / 8) and facts.rate == 8
        some = list(clip.frames([2, 9, 14]))
        assert (np.stack([np.asarray(frame) for frame in some]) == frames[[2, 9, 14]]).all()
        edge = np.concatenate([frames[:, 0], frames[:, -1], frames[:, :, 0], frames[:, :, -1]], axis=1)
        assert np.abs(edge - np.array(BACKGROUND)).max() < 60, conversation.id
        counts.add(len(facts.times))
        assert SAMPLINGS["uniform"](facts, None, BEATS, False) == [b * (clip.count - 1) // 7 for b in range(BEATS)]
    assert counts == {7 * frames + 1 for frames in FRAMES_PER_BEAT}


def test_a_sample_depends_on_seed_split_and_number_only():
    first = Motion("instruct", 9, seed=3)[4]
    assert first == Motion("instruct", 4000, seed=3)[4]
    assert Motion("instruct", 9, seed=4)[4] != first != Motion("validation", 9, seed=3)[4]
    said = [Motion("caption", 9)[number].turns[1].text for number in (2, 4)]
    assert said == [
        "red square moves north, yellow circle moves north.",
        "red triangle comes last, purple square comes first, green ring comes second.",
    ]  # on any machine


def test_only_validation_has_held_out_pairs():
    for split in ("caption", "text", "instruct"):
        for conversation in conversations(split, 500):
            for clip in conversation.media:
                assert not HELD_OUT & {(actor.item.color, actor.item.shape) for actor in clip.actors}
            said = conversation.turns[0].text.replace("\n", " ").split() + conversation.turns[1].text.split()
            assert not HELD_OUT & set(zip(said, said[1:]))


def test_validation_asks_one_question_about_the_held_out_pair():
    for conversation in conversations("validation", 500):
        ((category, question, answer),) = questions(conversation)
        (clip,) = conversation.media
        ((color, shape),) = HELD_OUT & {(actor.item.color, actor.item.shape) for actor in clip.actors}
        named = {"color": [answer], "order": [answer], "shape": [answer]}.get(category, question.split())
        assert (shape if category == "shape" else color) in named, conversation.id


def test_text_alone_does_not_exclude_the_answers_of_validation():
    """Every validation question occurs literally in training with the same answer."""
    trained = {found[1:] for talk in conversations("instruct", 4000) for found in questions(talk)}
    assert not {found[1:] for talk in conversations("validation", 500) for found in questions(talk)} - trained


@pytest.mark.parametrize("split", ["instruct", "validation"])
def test_answers_are_balanced(split):
    found = {category: Counter() for category in CATEGORIES}
    for conversation in conversations(split, 5000):
        for category, _, answer in questions(conversation):
            found[category][answer] += 1
    for category, answers in {"color": 5, "shape": 5, "way": 4, "count": 3, "order": 5}.items():
        shares = np.array(list(found[category].values())) / found[category].total()
        assert len(shares) == answers and shares.max() < 1.25 / answers, category


def asked_actors(category: str, split: str = "validation") -> dict[str, list[Actor]]:
    """The actors that questions of a category are about, by answer."""
    found: dict[str, list[Actor]] = {}
    for conversation in conversations(split, 5000):
        ((kind, _, answer),) = questions(conversation)
        if kind == category:
            found.setdefault(answer, []).append(conversation.media[0].actors[0])
    return found


def test_neither_one_frame_nor_shuffled_frames_tell_how_often_a_shape_appears():
    for actors in asked_actors("count").values():
        assert {len(actor.beats) for actor in actors} == {BEATS // 2}
        shown = np.mean([[beat in actor.beats for beat in range(BEATS)] for actor in actors], axis=0)
        assert np.abs(shown - 0.5).max() < 4 * 0.5 / len(actors) ** 0.5


def test_neither_one_frame_nor_shuffled_frames_tell_which_comes_first():
    firsts = Counter()
    for conversation in conversations("validation", 5000):
        ((kind, question, _),) = questions(conversation)
        if kind == "order":
            beats = [actor.beats for actor in conversation.media[0].actors]
            assert sorted(map(len, beats)) == [2, 2, 2] and not beats[0] & beats[1] and not beats[1] & beats[2]
            assert not frozenset.union(*beats) & {0, BEATS - 1}
            firsts[question] += 1
    assert len(firsts) == 3 and min(firsts.values()) > 250


def along(actors: Sequence[Actor], down: bool) -> np.ndarray:
    """Where shapes are in their lanes, in every beat: ``(N, BEATS)``. down: whether lanes are columns."""
    shown = [[actor.at(beat) for beat in range(BEATS)] for actor in actors]
    return np.array([[item.y if down else item.x for item in items] for items in shown])


def are_alike(first: np.ndarray, second: np.ndarray) -> bool:
    """Whether two samples may have one distribution (Kolmogorov and Smirnov, at a level of 0.0001)."""
    at = np.concatenate([first, second])
    shares = [np.searchsorted(np.sort(values), at, side="right") / len(values) for values in (first, second)]
    return np.abs(np.subtract(*shares)).max() < 2.23 * (1 / len(first) + 1 / len(second)) ** 0.5


def test_one_frame_tells_neither_what_moves_nor_to_which_of_two_sides():
    """Shapes that move to either side and shapes that rest are at the same places in their lanes."""
    moving = asked_actors("way")
    found = [along(moving[way], way in ("north", "south")) for way in moving]
    scenes = [c.media[0].actors for c in conversations("validation", 5000) if c.turns[1].grading.category == "color"]
    for down in (False, True):
        chosen = [actors for actors in scenes if (actors[0].item.x == actors[0].end[0]) == down]
        assert 400 < len(chosen) < 600
        found += [along([actor for actors in chosen for actor in actors[1:]], down)]
    beats = np.random.default_rng(0).integers(BEATS, size=5000)
    for first, second in combinations([each[np.arange(len(each)), beats[: len(each)]] for each in found], 2):
        assert are_alike(first, second)


def test_shuffled_frames_tell_no_direction():
    """Shapes that move to opposite sides pass the same places."""
    passed = {way: along(actors, way in ("north", "south")) for way, actors in asked_actors("way").items()}
    for one, other in (("west", "east"), ("north", "south")):
        for way in (one, other):
            assert np.allclose(np.diff(np.sort(passed[way])), motion.SPAN / (BEATS - 1))
        assert are_alike(passed[one].min(axis=1), passed[other].min(axis=1))


def test_every_text_is_made_of_known_words():
    tokenizer = build_tiny_tokenizer(motion.VOCABULARY)
    single = {byte for byte, index in tokenizer.get_vocab().items() if index < 256} - {".", ",", "?", "Ċ"}
    assert set(shapes.VOCABULARY) <= set(motion.VOCABULARY)  # a split of data=motion may have images of shapes
    for split in motion.SPLITS:
        for conversation in conversations(split, 200):
            for turn in conversation.turns:
                tokens = tokenizer.tokenize(turn.text.replace("<image>\n", ""))
                assert not single & set(tokens), (turn.text, tokens)


def test_splits_are_refused_or_read():
    with pytest.raises(ValueError, match=r"unknown split 'grounding' of the motion data. Available: caption, text"):
        Motion("grounding", 1)
    settings = compose(["recipe=quickstart", "data=motion", "data.validation.size=7"])
    assert settings.data.split("validation").sources["validation"].size == 7
    with pytest.raises(ValueError, match=r"data.validation.split=grounding"):
        compose(["recipe=quickstart", "data=motion", "data.validation.split=grounding"])
