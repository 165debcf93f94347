"""Procedural images: boxes compared with the drawn shapes."""

from __future__ import annotations

import re

import numpy as np

from vlmtrain.data.shapes import BACKGROUND, Picture, Shapes
from vlmtrain.settings import compose


def test_boxes_are_where_the_things_are_drawn():
    """In thousandths of the image's sides, measured on an image of 1000 pixels that contains only that object."""
    seen = set()
    for conversation in (Shapes("grounding", 40)[i] for i in range(40)):
        (picture,) = conversation.images
        for question, answer in zip(conversation.turns[::2], conversation.turns[1::2]):
            color, shape = re.search(r"Where is the (\w+) (\w+)\?", question.text).groups()
            pattern = rf"<ref>{color} {shape}</ref><box>\((\d+),(\d+)\),\((\d+),(\d+)\)</box>"
            found = [int(number) for number in re.fullmatch(pattern, answer.text).groups()]
            (item,) = (item for item in picture.items if (item.color, item.shape) == (color, shape))
            drawn = np.asarray(Picture((item,), 1000).load())
            rows, columns = (np.nonzero(np.any(drawn != BACKGROUND, axis=2).any(axis=axis))[0] for axis in (1, 0))
            assert np.abs(np.subtract(found, (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1))).max() <= 3
            assert min(found) >= 0 and max(found) < 1000
            seen.add(shape)
    assert seen == {"circle", "square", "triangle", "cross", "ring"}


def test_qwen_vls_miniature_has_boxes_and_texts():
    settings = compose(["recipe=qwen_vl", "mini=true"])
    sources = {stage: settings.data.split(settings.stages[stage].data).sources.values() for stage in TASKS}
    splits = {stage: {source.split for source in sources[stage]} for stage in TASKS}
    assert splits == TASKS
    assert "<box>" in settings.llm.new_tokens
    own = compose(["recipe=qwen_vl", "mini=true", "data.multitask.talks.size=9"]).data.split("multitask").sources
    assert own["talks"].size == 9 and "boxes" not in own  # from the command line


TASKS = {"multitask": {"instruct", "text", "grounding"}, "instruct": {"instruct", "text"}}
