"""Procedural images: boxes compared with the drawn shapes."""

from __future__ import annotations

import re

import numpy as np
import pytest

from vlmtrain.data.shapes import BACKGROUND, SceneImage, Shapes
from vlmtrain.settings import compose


@pytest.mark.parametrize("sides", [None, (40, 90)])
def test_boxes_are_where_the_things_are_drawn(sides):
    """In thousandths of the image's sides, measured on a large image that contains only that object."""
    seen = set()
    for conversation in (Shapes("grounding", 40, sides=sides)[i] for i in range(40)):
        (picture,) = conversation.images
        for question, answer in zip(conversation.turns[::2], conversation.turns[1::2]):
            color, shape = re.search(r"Where is the (\w+) (\w+)\?", question.text).groups()
            pattern = rf"<ref>{color} {shape}</ref><box>\((\d+),(\d+)\),\((\d+),(\d+)\)</box>"
            found = [int(number) for number in re.fullmatch(pattern, answer.text).groups()]
            (item,) = (item for item in picture.items if (item.color, item.shape) == (color, shape))
            pixels = tuple(20 * side for side in picture.pixels)
            left, top, right, bottom = extent(SceneImage(items=(item,), pixels=pixels, side=20 * picture.side))
            drawn = np.divide((left, top, right, bottom), (pixels[1], pixels[0]) * 2) * 1000
            assert np.abs(found - drawn).max() <= 3
            assert min(found) >= 0 and max(found) < 1000
            seen.add(shape)
    assert seen == {"circle", "square", "triangle", "cross", "ring"}


def extent(picture: SceneImage) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of what is drawn, in pixels."""
    drawn = np.asarray(picture.load())
    rows, columns = (np.nonzero(np.any(drawn != BACKGROUND, axis=2).any(axis=axis))[0] for axis in (1, 0))
    return columns[0], rows[0], columns[-1] + 1, rows[-1] + 1


def test_images_of_mixed_sizes_show_the_same_scenes_with_objects_of_the_same_size():
    squares, mixed = Shapes("caption", 100, image_size=40), Shapes("caption", 100, image_size=7, sides=(40, 90))
    frames = set()
    for before, after in zip(squares, mixed):
        ((square,), (picture,)) = before.images, after.images
        assert after.turns == before.turns and picture.size() == np.asarray(picture.load()).shape[:2]
        frames.add(picture.size())
        if len(picture.items) == 1:
            boxes = [np.array(extent(each)) for each in (square, picture)]
            sizes = [box[2:] - box[:2] for box in boxes]
            assert np.abs(sizes[0] - sizes[1]).max() <= 1
            middles = [(box[:2] + box[2:]) / 2 / (each.size()[::-1]) for box, each in zip(boxes, (square, picture))]
            assert np.abs(middles[0] - middles[1]).max() < 0.03
    heights, widths = zip(*frames)
    assert len(frames) > 90 and {min(heights), min(widths)} <= {*range(40, 44)}
    assert {max(heights), max(widths)} <= {*range(86, 91)}


def test_qwen_vls_miniature_has_boxes_and_texts():
    settings = compose(["recipe=qwen_vl", "mini=true"])
    sources = {stage: settings.data.split(settings.stages[stage].data).sources.values() for stage in TASKS}
    splits = {stage: {source.split for source in sources[stage]} for stage in TASKS}
    assert splits == TASKS
    assert "<box>" in settings.llm.new_tokens and settings.boxes.format == "qwen_vl"
    own = compose(["recipe=qwen_vl", "mini=true", "data.multitask.talks.size=9"]).data.split("multitask").sources
    assert own["talks"].size == 9 and "boxes" not in own  # from the command line


TASKS = {"multitask": {"instruct", "text", "boxes"}, "instruct": {"instruct", "text"}}
