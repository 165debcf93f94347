"""Videos beside text: as many frames as fit, whatever text comes with each frame."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest

from vlmtrain.data.geometry import Geometry
from vlmtrain.data.processor import Processor
from vlmtrain.data.records import BadSample, Conversation, Turn, VideoFacts
from vlmtrain.data.video_plan import VideoPlan
from vlmtrain.frames import Joining

LONGEST = 120


@dataclass(frozen=True)
class Clip:
    """A video of which only the times are read."""

    frames: int

    def probe(self) -> VideoFacts:
        return VideoFacts(np.arange(self.frames) / 2, self.frames / 2, (8, 8))


def processor_of(tokenizer, **plan) -> Processor:
    video = VideoPlan(**{"fps": None, "sampling": "uniform", "frames": 64, "tokens": 4, "grid": (2, 2), **plan})
    geometry = Geometry((8, 8), "squash", (0.5,) * 3, (0.5,) * 3, 4, (2, 2), patch_size=(4, 4), video=video)
    return Processor(tokenizer, geometry, "chat", LONGEST)


PLANS = {
    "frames": {},
    "times": {"timestamps": "frame"},
    "a sentence": {"timestamps": "sentence"},
    "newlines": {"joining": Joining(newline="frame")},
}


@pytest.mark.parametrize("kind", PLANS)
@pytest.mark.parametrize("videos, words", [(1, 1), (1, 40), (2, 1)])
def test_as_many_frames_as_fit_are_shown(tokenizer, kind, videos, words):
    """The largest number is found by rendering the sample with each number of frames."""
    processor = processor_of(tokenizer, **PLANS[kind])
    turns = Turn("user", "<image>" * videos + " red" * words), Turn("assistant", "blue")
    conversation = Conversation("clip", turns, (Clip(64),) * videos)
    plan = processor.geometry.video
    lengths = {}
    for frames in range(1, 30):
        processor.geometry = replace(processor.geometry, video=replace(plan, frames=frames))
        try:
            lengths[frames] = len(processor.renderer.render(conversation, processor.plan(conversation)))
        except BadSample:  # longer than max_length
            break
    processor.geometry = replace(processor.geometry, video=plan)
    if not lengths:
        with pytest.raises(BadSample, match=r"with a single frame of each video, it has \d+ tokens, more than max_len"):
            processor.render(conversation)
        return
    rendered = processor.render(conversation)
    shown = [sum(len(item.times) for item in rendered.media.items if item.medium == n) for n in range(videos)]
    assert shown == [max(lengths)] * videos and len(rendered) == lengths[max(lengths)] <= LONGEST
