"""Plans which frames of a video are shown, at which size and how they stand in the text, from its times alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..frames import PLAIN, Joining
from ..visual import Size
from .frame_sampling import SAMPLINGS
from .native_sizes import smart_resize_clip
from .records import BadSample, VideoFacts

TIME_FORMAT = "<{time:.1f} seconds>"
"""The text before each frame, or pair of frames, with ``timestamps: frame`` (Qwen3-VL, published code)."""
SENTENCE = (
    "\nThe video lasts for {duration:.2f} seconds, and {count} frames are uniformly sampled from it. These frames are "
    "located at {times}.Please answer the following questions related to this video.\n"
)
"""The text after a video with ``timestamps: sentence`` (LLaVA-Video, published code)."""


class Clip(NamedTuple):
    """The frames of one item: their numbers in the video and their times in seconds."""

    numbers: tuple[int, ...]
    times: tuple[float, ...]


@dataclass(frozen=True)
class VideoPlan:
    """How the videos of a stage are shown: ``stages.<name>.video``, whose keys are described in docs/video.md.

    per_item: frames that the encoder reads together. fit: how frames are brought onto the canvas, None with
    ``image_fit=native``. tokens, grid: of one item, before its tokens are pooled; None with ``native``.
    """

    fps: float | None = 1.0
    frames: int = 32
    sampling: str = "interval"
    last: bool = False
    fit: str | None = None
    pixels: tuple[int, int] | None = None
    pixels_total: tuple[int, int] | None = None
    joining: Joining = PLAIN
    timestamps: str = "none"
    time_format: str = TIME_FORMAT
    frame_tokens: tuple[str, str] | None = None
    token_budget: int | None = None
    positions_per_second: float | None = None
    per_item: int = 1
    tokens: int | None = None
    grid: Size | None = None

    @classmethod
    def saved(cls, values: Mapping[str, Any]) -> VideoPlan:
        """The plan of the fields that a model folder stores as JSON."""
        pairs = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
        return cls(**pairs | {"joining": Joining(*values["joining"])})

    def clips(self, facts: VideoFacts, most: int) -> list[Clip]:
        """The items of a video, for a maximum number of frames; the last frame is repeated to fill an item."""
        numbers = SAMPLINGS[self.sampling](facts, self.fps, most, self.last)
        numbers += [numbers[-1]] * (-len(numbers) % self.per_item)
        groups = [tuple(numbers[start : start + self.per_item]) for start in range(0, len(numbers), self.per_item)]
        return [Clip(group, tuple(float(facts.times[number]) for number in group)) for group in groups]

    def size(
        self, facts: VideoFacts, clips: list[Clip], factors: Size, resize: Callable[[Size, tuple[int, int]], Size]
    ) -> Size:
        """The size ``(H, W)`` of frames that keep their aspect ratio. resize: for the limits of one frame."""
        if self.pixels_total is None:
            return resize(facts.size, self.pixels)
        return smart_resize_clip(facts.size, factors, self.pixels_total, self._frames(clips), self.per_item)

    def fitted(self, count: Callable[[int, int], int], room: int | None) -> tuple[int, int]:
        """The maximum number of frames and the stride with which a video has at most `room` and `token_budget` tokens.

        Frames are dropped before the stride grows. count: number of tokens for a maximum number of frames and a stride.
        Raises BadSample if not even one frame fits.
        """
        limit = min((each for each in (room, self.token_budget) if each is not None), default=None)
        if limit is None or count(self.frames, self.joining.stride) <= limit:
            return self.frames, self.joining.stride
        grows = self.joining.pool in ("bilinear", "average")
        strides = range(self.joining.stride, max(self.grid) + 1) if grows else [self.joining.stride]
        stride = next((stride for stride in strides if count(1, stride) <= limit), None)
        if stride is None:
            least = count(1, strides[-1])
            raise BadSample(f"the video has at least {least} tokens, but there is room for only {max(0, limit)}")
        least, most = 1, self.frames
        while least < most:
            middle = (least + most + 1) // 2
            least, most = (middle, most) if count(middle, stride) <= limit else (least, middle - 1)
        return least, stride

    def positions(self, facts: VideoFacts, clips: list[Clip]) -> tuple[int, ...]:
        """Rotary positions in time of the items, counted from the first (Qwen2-VL; Qwen2.5-VL, 2025, section 2.1.3)."""
        if self.positions_per_second is None:
            return tuple(range(len(clips)))
        step = self.positions_per_second * self.per_item * facts.duration / self._frames(clips)
        return tuple(math.floor(number * step) for number in range(len(clips)))

    def _frames(self, clips: list[Clip]) -> int:
        """Number of frames of the items, without those that repeat the last one."""
        return (len(clips) - 1) * self.per_item + len(set(clips[-1].numbers))

    def sentence(self, facts: VideoFacts, clips: list[Clip]) -> str:
        """The text after a video."""
        if self.timestamps != "sentence":
            return ""
        times = [time for clip in clips for time in clip.times]
        return SENTENCE.format(
            duration=facts.duration, count=len(times), times=",".join(f"{time:.2f}s" for time in times)
        )

    def heading(self, number: int, clip: Clip) -> str:
        """The text before item `number` of a video."""
        if self.timestamps != "frame":
            return ""
        text = self.time_format.format(time=sum(clip.times) / len(clip.times))
        return text if number else text.lstrip()
