"""Rules for the size at which an image of its own aspect ratio is shown to an encoder (``image_fit=native``)."""

from __future__ import annotations

import math
from collections.abc import Callable

from ..visual import Size

STEP = 1e-5  # precision of the scale of `naflex` and `padded`


def smart_resize(
    size: Size, factors: Size, image_pixels: tuple[float, float], scaled_to: tuple[float, float] | None = None
) -> Size:
    """The size nearest to `size` ``(H, W)`` with sides that are multiples of `factors` (Qwen2-VL, published code).

    An image with fewer or more pixels than `image_pixels` ``(MIN, MAX)`` is first scaled to them. The result never has
    more than MAX pixels, if `factors` themselves do not. scaled_to: what an image outside the limits is scaled to, if
    not to them.
    """
    (least, most), (low, high) = image_pixels, scaled_to or image_pixels
    area = size[0] * size[1]
    shown = [round(side / factor) * factor for side, factor in zip(size, factors)]
    if shown[0] * shown[1] < least:
        scale = math.sqrt(low / area)
        shown = [math.ceil(side * scale / factor) * factor for side, factor in zip(size, factors)]
    elif shown[0] * shown[1] > most:
        scale = math.sqrt(area / high)
        shown = [max(factor, math.floor(side / scale / factor) * factor) for side, factor in zip(size, factors)]
    while shown[0] * shown[1] > most and shown != list(factors):  # a thin image, or no multiples within the limits
        longer = max((0, 1), key=lambda side: (shown[side] > factors[side], shown[side]))
        shown[longer] -= factors[longer]
    return shown[0], shown[1]


def smart_resize_clip(size: Size, factors: Size, total_pixels: tuple[int, int], frames: int, per_item: int = 2) -> Size:
    """The size of the frames of a video if all together have between MIN and MAX pixels (Qwen3-VL, published code).

    The limits are checked as if the number of frames were rounded to the nearest multiple of `per_item`.
    """
    frames = max(frames, per_item)
    rounded = round(frames / per_item) * per_item
    return smart_resize(size, factors, *(tuple(limit / count for limit in total_pixels) for count in (rounded, frames)))


def naflex(size: Size, factors: Size, image_pixels: tuple[int, int]) -> Size:
    """The sides of `size` ``(H, W)``, rounded up to multiples of `factors` (SigLIP 2 NaFlex, published code).

    An image whose rounded size is outside `image_pixels` ``(MIN, MAX)`` is first scaled as much as fits into the limit
    that it violates, at most 100 times. NaFlex itself scales all images to one number of patches: MIN is then MAX.
    """

    def rounded(scale: float) -> Size:
        height, width = (max(1, math.ceil(side * scale / factor)) for side, factor in zip(size, factors))
        return height * factors[0], width * factors[1]

    own = rounded(1.0)
    least, most = image_pixels
    if least <= math.prod(own) <= most:
        return own
    limit = least if math.prod(own) < least else most
    return rounded(_largest_scale(lambda scale: math.prod(rounded(scale)) <= limit))


def padded(size: Size, factors: Size, image_pixels: tuple[int, int], largest: Size) -> Size:
    """The size to which an image is scaled before it is padded to multiples of `factors` (Fuyu, published code).

    An image keeps its own `size` ``(H, W)`` unless it is larger than `largest`. One whose padded size is outside
    `image_pixels` ``(MIN, MAX)``, which Fuyu does not have, is scaled as much as fits into the limit that it violates.
    """

    def scaled(scale: float) -> Size:
        return tuple(max(1, int(side * scale)) for side in size)

    def area(scale: float) -> int:
        return math.prod(whole_multiple(scaled(scale), factors))

    most_scale = min(most / side for most, side in zip(largest, size))
    own, (least, most) = min(1.0, most_scale), image_pixels
    if least <= area(own) <= most:
        return scaled(own)
    limit = least if area(own) < least else most
    if area(most_scale) <= limit:
        return scaled(most_scale)
    return scaled(_largest_scale(lambda scale: scale <= most_scale and area(scale) <= limit))


def whole_multiple(size: Size, factors: Size) -> Size:
    """The sides of `size`, rounded up to multiples of `factors`."""
    height, width = (math.ceil(side / factor) * factor for side, factor in zip(size, factors))
    return height, width


def _largest_scale(fits: Callable[[float], bool]) -> float:
    """The largest scale, up to 100, that fits, given that the smaller ones do."""
    low, high = STEP / 10, 100.0
    while high - low >= STEP:
        middle = (low + high) / 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


SMART_RESIZE, PADDED = "smart_resize", "padded"
SIZE_RULES: dict[str, Callable[[Size, Size, tuple[int, int]], Size]] = {SMART_RESIZE: smart_resize, "naflex": naflex}
"""The rules, besides `PADDED`, which also takes the largest size."""
