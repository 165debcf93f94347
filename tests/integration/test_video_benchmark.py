"""The comparison of a video with one frame and with shuffled frames, with a model that is hardly trained."""

from __future__ import annotations

import random

import numpy as np
import pytest

from benchmarks import video
from vlmtrain.data.motion import CATEGORIES, Motion

FEW = (
    *("stages.clip.max_steps=1", "stages.clip.batch_size=2", "stages.text.max_steps=1", "stages.align.max_steps=1"),
    *("stages.align.batch_size=2", "stages.instruct.max_steps=1", "stages.instruct.batch_size=2"),
    *("data.validation=null", "workers=0"),
)


def test_views_show_the_frames_of_the_video():
    source = Motion("validation", 5)
    for index in range(5):
        views = {name: video.Changed(source, order)[index] for name, order in video.VIEWS.items()}
        numbers = [beat * (source[index].media[0].count - 1) // 7 for beat in range(8)]
        shown = {name: [np.asarray(f).tobytes() for f in view.media[0].frames(numbers)] for name, view in views.items()}
        assert shown["video"] == [np.asarray(frame).tobytes() for frame in source[index].media[0].frames(numbers)]
        assert len(set(shown["one frame"])) == 1 and set(shown["one frame"]) <= set(shown["video"])
        assert sorted(shown["shuffled"]) == sorted(shown["video"])
        assert all(view.turns == source[index].turns for view in views.values())
    orders = {tuple(video.VIEWS["shuffled"](random.Random(index), list(range(8)))) for index in range(50)}
    assert len(orders) == 50


@pytest.mark.slow
def test_the_table_has_all_categories_and_views(tmp_path):
    shown = video.table([f"run_dir={tmp_path}", *FEW], questions=10)
    head, _, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in shown.strip().splitlines()]
    assert head[1:5] == ["video", "one frame", "shuffled", "blind"] and len(head) == 8
    assert [row[0] for row in rows] == [*CATEGORIES, "all"]
    assert all("%" in cell for row in rows for cell in row[1:])
