"""What the encoders are shown of a medium: an image or a video, decoded once for all of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from PIL import Image
from torch import Tensor

from ..visual import Item
from .images import show_items
from .records import ImageSource, VideoSource, is_video


def show_medium(
    medium: ImageSource | VideoSource, items: Sequence[Item], means: Mapping[int, tuple[float, ...]]
) -> dict[int, list[Tensor]]:
    """What some encoders are shown of a medium: for each, tensors uint8, one for each of the medium's `items`.

    They are ``(3, H, W)``, or ``(T, 3, H, W)`` for clips of several frames. means: by the number of the encoder, the
    mean of the channels. Only one frame of a video is in memory at its own size. Raises BadSample.
    """
    if not means:
        return {}
    if not is_video(medium):
        image = medium.load()
        return {encoder: show_items(image, items, mean, encoder) for encoder, mean in means.items()}
    wanted = _numbers(medium, items)
    of_frame = {number: item for item, numbers in zip(items, wanted) for number in numbers}
    shown: dict[int, dict[int, Tensor]] = {encoder: {} for encoder in means}
    numbers = sorted(of_frame)
    for number, frame in zip(numbers, medium.frames(numbers), strict=True):
        for encoder, mean in means.items():
            (shown[encoder][number],) = show_items(frame, [of_frame[number]], mean, encoder)
    return {
        encoder: [_clip([frames[number] for number in numbers]) for numbers in wanted]
        for encoder, frames in shown.items()
    }


def decode_frames(video: VideoSource, items: Sequence[Item]) -> Iterator[Image.Image]:
    """The frames that the `items` of a video show, each once and in order, at their own size. Raises BadSample."""
    return video.frames(sorted({number for numbers in _numbers(video, items) for number in numbers}))


def _numbers(video: VideoSource, items: Sequence[Item]) -> list[list[int]]:
    """The numbers of the frames that each item shows."""
    numbered = {float(time): number for number, time in enumerate(video.probe().times)}
    return [[numbered[time] for time in item.times] for item in items]


def _clip(frames: Sequence[Tensor]) -> Tensor:
    return frames[0] if len(frames) == 1 else torch.stack(list(frames))
