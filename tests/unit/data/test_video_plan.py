"""Which frames are shown, how many tokens they become, and that a budget is kept."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers.models.qwen3_vl.video_processing_qwen3_vl import smart_resize as smart_resize_video

from vlmtrain.data.frame_sampling import SAMPLINGS
from vlmtrain.data.geometry import Geometry
from vlmtrain.data.native_sizes import smart_resize_clip
from vlmtrain.data.positions import mrope
from vlmtrain.data.records import BadSample, VideoFacts
from vlmtrain.data.video_plan import VideoPlan
from vlmtrain.frames import Joining
from vlmtrain.visual import Placement


def facts(count: int, rate: float, size=(48, 64)) -> VideoFacts:
    return VideoFacts(np.arange(count) / rate, count / rate, size)


LENGTHS = [1, 2, 3, 7, 8, 31, 32, 33, 54, 113, 300, 2999, 3000]


@pytest.mark.parametrize("rate", [10, 23.976, 30])
@pytest.mark.parametrize("count", LENGTHS)
def test_interval_is_llava_onevisions(count, rate):
    """As in LLaVA-NeXT's loader: every round(rate / fps)-th frame, or 32 by linspace if there are more."""
    expected = list(range(0, count, round(rate / 1)))
    if len(expected) > 32:
        expected = [int(number) for number in np.linspace(0, count - 1, 32, dtype=int)]
    assert SAMPLINGS["interval"](facts(count, rate), 1, 32, False) == expected
    with_last = SAMPLINGS["interval"](facts(count, rate), 1, 32, True)
    assert with_last[-1] == count - 1 and len(with_last) <= 32


@pytest.mark.parametrize("count", LENGTHS)
def test_uniform_is_llava_videos(count):
    assert SAMPLINGS["uniform"](facts(count, 30), None, 64, False) == np.linspace(0, count - 1, 64, dtype=int).tolist()


@pytest.mark.parametrize("rate", [10, 25, 30])
@pytest.mark.parametrize("count", [count for count in LENGTHS if count > 3])
def test_qwen_samplings_equal_transformers(count, rate):
    from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor
    from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

    metadata = SimpleNamespace(total_num_frames=count, fps=rate, duration=count / rate)
    for name, processor, most in (("qwen2_vl", Qwen2VLVideoProcessor, 768), ("qwen3_vl", Qwen3VLVideoProcessor, 768)):
        expected = processor().sample_frames(metadata, fps=2)
        found = SAMPLINGS[name](facts(count, rate), 2, most, False)
        # i * n / k in floating point may give one index too many, or one that is rounded down
        assert len(found) in (len(expected), len(expected) - 1)
        assert np.abs(np.array(found) - np.array(expected[: len(found)])).max() <= (0 if name == "qwen3_vl" else 1)
        assert name != "qwen2_vl" or len(found) % 2 == 0


@pytest.mark.parametrize("count, rate", [(10, 25), (100, 25), (2953, 30), (3000, 30), (90, 24)])
def test_seconds_is_molmo2s(count, rate):
    """Every half second and the end, or evenly spaced in time with both ends."""
    duration, most = count / rate, 128
    times = np.append(np.arange(0, duration, 0.5), duration)
    if (most - 1) / 2 < duration:
        times = np.linspace(0, duration, most)
    expected = [min(count - 1, math.floor(time * rate + 1e-4)) for time in times]
    found = SAMPLINGS["seconds"](facts(count, rate), 2, most, True)
    assert found == expected and found[-1] == count - 1


@pytest.mark.parametrize("count, rate", [(10, 25), (100, 25), (2953, 30), (3000, 30), (54, 1), (113, 1.5)])
def test_seconds_without_the_last_frame_equals_transformers(count, rate):
    from transformers.models.molmo2.video_processing_molmo2 import Molmo2VideoProcessor

    metadata = SimpleNamespace(total_num_frames=count, fps=rate, duration=count / rate)
    expected = Molmo2VideoProcessor().sample_frames(metadata, num_frames=64, max_fps=2).tolist()
    found = SAMPLINGS["seconds"](facts(count, rate), 2, 64, False)
    assert len(found) in (len(expected), len(expected) - 1)  # arange may give one index too many
    assert np.abs(np.array(found) - np.array(expected[: len(found)])).max() <= 1


@pytest.mark.parametrize("size", [(720, 1280), (480, 270), (100, 2000), (64, 64)])
@pytest.mark.parametrize("frames", [2, 3, 5, 8, 64, 767, 768])
def test_sizes_of_frames_equal_qwen3_vls(size, frames):
    limits = (4 * 32 * 32 * 2, 16384 * 32 * 32 * 2)
    expected = smart_resize_video(
        frames, *size, temporal_factor=2, factor=32, min_pixels=limits[0], max_pixels=limits[1]
    )
    assert smart_resize_clip(size, (32, 32), limits, frames) == expected


def geometry(**options) -> Geometry:
    joining = Joining(
        *(options.pop(name, default) for name, default in (("pool", "none"), ("stride", 1), ("newline", "none")))
    )
    video = VideoPlan(joining=joining, fit="squash", tokens=729, grid=(27, 27), **options)
    return Geometry((378, 378), "pad", (0.5,) * 3, (0.5,) * 3, 729, (27, 27), patch_size=(14, 14), video=video)


OV = {"fps": 1, "frames": 32, "pool": "bilinear", "stride": 2, "newline": "video"}
RULES = {
    # tokens of a video of 20 s: published numbers of tokens per frame
    "LLaVA-OneVision": (OV, 20 * 196 + 1),
    "LLaVA-Video": ({**OV, "sampling": "uniform", "frames": 64, "newline": "row"}, 64 * 14 * 15),
    "averages": ({**OV, "pool": "average", "newline": "none"}, 20 * 13 * 13),
    "every token": ({"fps": 1, "frames": 4}, 4 * 729),
    "a newline per frame": ({"fps": 1, "frames": 4, "newline": "frame"}, 4 * 730),
}


@pytest.mark.parametrize("name", RULES)
def test_numbers_of_tokens(name):
    options, expected = RULES[name]
    plan = geometry(**options).plan([facts(600, 30)])
    assert sum(placement.slots for placement in plan.placements) == expected
    assert len(plan.placements) == 1 and all(item.kind == "clip" and len(item.times) == 1 for item in plan.items)


def test_frames_with_times_stand_alone():
    molmo2 = {"time_format": " {time:.1f} ", "frame_tokens": ("<frame_start>", "<frame_end>")}
    made = geometry(fps=2, sampling="seconds", last=True, frames=128, timestamps="frame", **molmo2)
    plan = made.plan([None, facts(50, 25)])
    words = [(placement.before, placement.slots, placement.after) for placement in plan.placements]
    times = ["0.0", " 0.5", " 1.0", " 1.5", " 2.0"]
    assert words[0] == ("", 729, "")
    assert words[1:] == [(f"{time} <frame_start>", 729, "<frame_end>") for time in times]
    assert [placement.items for placement in plan.placements] == [(n,) for n in range(6)]


def test_the_sentence_of_llava_video():
    plan = geometry(fps=None, sampling="uniform", frames=2, timestamps="sentence").plan([facts(40, 10)])
    assert plan.placements[0].after == (
        "\nThe video lasts for 4.00 seconds, and 2 frames are uniformly sampled from it. These frames are located at "
        "0.00s,3.90s.Please answer the following questions related to this video.\n"
    )


@pytest.mark.parametrize("budget", [7000, 3000, 800, 197, 150, 60, 5])
def test_a_budget_drops_frames_before_it_shrinks_them(budget):
    made = geometry(**OV, token_budget=budget)
    (placement,) = made.plan([facts(900, 30)]).placements
    frames = len(placement.items)
    assert placement.slots <= budget
    if budget >= 197:
        assert placement.frames.stride == 2 and frames == min(30, (budget - 1) // 196)
    else:
        stride, tokens = placement.frames.stride, math.ceil(27 / placement.frames.stride) ** 2
        assert frames == (budget - 1) // tokens >= 1 and math.ceil(27 / (stride - 1)) ** 2 + 1 > budget


def test_a_budget_that_no_frame_fits():
    with pytest.raises(BadSample, match="the video has at least 2 tokens, but there is room for only 1"):
        geometry(**OV, token_budget=1).plan([facts(90, 30)])
    with pytest.raises(BadSample, match="no settings for videos"):
        Geometry((28, 28), "pad", (0.5,) * 3, (0.5,) * 3, 4).plan([facts(90, 30)])


def test_pairs_of_frames():
    plan = VideoPlan(per_item=2, sampling="qwen3_vl", fps=2)
    clips = plan.clips(facts(35, 10), 5)
    assert [clip.numbers for clip in clips] == [(0, 8), (17, 26), (34, 34)]  # the last frame is repeated
    assert plan.positions(facts(35, 10), clips) == (0, 1, 2)
    absolute = VideoPlan(per_item=2, positions_per_second=2, fps=2, sampling="qwen2_vl")
    clips = absolute.clips(facts(80, 10), 768)
    assert len(clips) == 8 and absolute.positions(facts(80, 10), clips) == tuple(range(0, 16, 2))


def test_rotary_positions_of_videos():
    """By hand, from Qwen2-VL's section 2.1: time, height and width; text continues after the largest."""
    index = torch.tensor([-1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, -1])
    video = Placement(0, (0, 1, 2), 12, 12, (2, 2), times=(0, 4, 8))
    expected = [
        [0, 1, 1, 1, 1, 5, 5, 5, 5, 9, 9, 9, 9, 10],
        [0, 1, 1, 2, 2, 1, 1, 2, 2, 1, 1, 2, 2, 10],
        [0, 1, 2, 1, 2, 1, 2, 1, 2, 1, 2, 1, 2, 10],
    ]
    assert mrope(index, [video]).tolist() == expected
