"""Which frames of a video are shown (``stages.<name>.video.sampling``).

A rule maps the times of all frames to the numbers of those shown, in order; a short video may show a frame twice.
`SAMPLINGS` maps the values of the key to the rules.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from .records import VideoFacts

Sampling = Callable[[VideoFacts, float | None, int, bool], list[int]]
"""facts of the video, frames per second, maximum number of frames, whether the last frame is always shown."""


def _spread(count: int, most: int) -> list[int]:
    """`most` frames of `count` from the first to the last, evenly spaced and rounded down."""
    return np.linspace(0, count - 1, most, dtype=int).tolist()


def interval(facts: VideoFacts, fps: float | None, most: int, last: bool) -> list[int]:
    """Every n-th frame, n being the rounded ratio of the rates; above `most`, frames spread over the video.

    (LLaVA-OneVision, published code of LLaVA-NeXT.) last: the last frame is shown too.
    """
    count = len(facts.times)
    if fps is None:
        return _spread(count, min(most, count))
    numbers = list(range(0, count, max(1, round(facts.rate / fps))))
    if last and numbers[-1] != count - 1:
        numbers.append(count - 1)
    return numbers if len(numbers) <= most else _spread(count, most)


def uniform(facts: VideoFacts, fps: float | None, most: int, last: bool) -> list[int]:
    """`most` frames spread over the video, more than once if it has fewer (LLaVA-Video, published code)."""
    return _spread(len(facts.times), most)


def seconds(facts: VideoFacts, fps: float | None, most: int, last: bool) -> list[int]:
    """A frame every ``1 / fps`` seconds and the last one; above `most`, evenly spaced in time (Molmo2, published code).

    At a time between two frames, the earlier one is shown.

    Without `last`, evenly spaced frames from the first on, as in transformers' processor of Molmo2.
    """
    count = len(facts.times)
    if not last:
        shown = most if fps is None or facts.rate <= fps else min(most, int(facts.duration * fps))
        shown = max(1, min(shown, count))
        return [number * count // shown for number in range(shown)]
    end = facts.duration
    if fps is None or (most - 1) / fps < end:
        times = np.linspace(0, end, most)
    else:
        times = np.append(np.arange(0.0, end, 1 / fps), end)
    # a small tolerance, since times that are multiples of a frame's duration are not exact
    return (np.searchsorted(facts.times, times + 1e-6, side="right") - 1).tolist()


def qwen2_vl(facts: VideoFacts, fps: float | None, most: int, last: bool) -> list[int]:
    """An even number of evenly spaced frames, at least 4, from the first on (Qwen2-VL and Qwen2.5-VL, published code).

    A video of one frame shows that frame.
    """
    count = len(facts.times)
    most = min(most, count) // 2 * 2
    shown = most if fps is None else min(max(count / facts.rate * fps, QWEN_LEAST), most)
    shown = max(1, math.floor(shown / 2) * 2)
    return [number * count // shown for number in range(shown)]


def qwen3_vl(facts: VideoFacts, fps: float | None, most: int, last: bool) -> list[int]:
    """Frames spread over the video and rounded to the nearest, at least 4 (Qwen3-VL, published code)."""
    count = len(facts.times)
    wanted = count if fps is None else int(count / facts.rate * fps)
    shown = min(max(wanted, QWEN_LEAST), most, count)
    return np.linspace(0, count - 1, shown).round().astype(int).tolist()


QWEN_LEAST = 4
SAMPLINGS: dict[str, Sampling] = {
    "interval": interval,
    "uniform": uniform,
    "seconds": seconds,
    "qwen2_vl": qwen2_vl,
    "qwen3_vl": qwen3_vl,
}
CHOOSES_LAST = ("interval", "seconds")
"""Rules for which the user may say whether the last frame is always shown."""
