"""The visual contract: what a conversation's media become, from the plan to the batch that a model receives.

    plan      header sizes -> items and placements, before anything is decoded
    load      decodes and cuts what the items say -> pixels, uint8 until the batch is moved to its device
    Batch     carries a `Visual`: the pixels, items and placements of all its samples

Everything here is plain values that can be printed. Grids and sizes are ``(height, width)``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .frames import Joining
from .tiling import Overlap, Tiles

Size = tuple[int, int]
WHOLE = (0.0, 0.0, 1.0, 1.0)
CAUSAL = "causal"
ATTENTION = (CAUSAL, "images", "prefix")
"""Which positions of a sample see each other in both directions.

``causal``: none. ``images``: those of all its images and frames, with the tokens around them (Molmo2, 2025, published
code). ``prefix``: all before the first answer (PaliGemma, 2024, section 3.1).
"""


class Item(NamedTuple):
    """One input of an encoder: an image, a tile, the overview of an image that is also cut into tiles, or a clip.

    medium: index of the image or video. kind: ``image``, ``tile``, ``overview`` or ``clip``. fits: how the image is
    brought onto a canvas, each one of `vlmtrain.data.images.CANVASES`. box: the part of the canvas that is shown, as
    fractions (left, top, right, bottom); above 1, the canvas is padded. times: of the frames of a clip, in seconds;
    empty for images. pixels, grids: size in pixels and in patches. fits, pixels and grids have one value per encoder.
    """

    medium: int
    kind: str
    fits: tuple[str, ...]
    box: tuple[float, float, float, float]
    times: tuple[float, ...]
    pixels: tuple[Size, ...]
    grids: tuple[Size, ...]

    def canvas(self, encoder: int = 0) -> Size:
        """Size in pixels of the canvas that the image is brought onto."""
        (height, width), (left, top, right, bottom) = self.pixels[encoder], self.box
        return round(height / (bottom - top)), round(width / (right - left))


class Placement(NamedTuple):
    """What stands at one place in the text.

    medium: index of the image or video. items: indices of its items, in order. slots: number of text positions. tokens:
    number of visual tokens, which equals `slots` if they are in the text. out_grid: grid of the tokens of each item,
    None if they form none. tiles: how the image is cut; its items are then joined row by row
    (`vlmtrain.model.joining`). framed_grid: grid of the tokens other than the first and the last, for connectors that
    add these two; or None. before, after: text of the template around the slots, such as the token that starts an
    image. frames: of a video, how the tokens of its items are pooled and joined; None for images. times: of a video,
    the rotary position in time of each item, counted from that of the first; empty for images. newlines: number of
    rows of slots, after each of which the template has a newline token; 0 for slots without.
    """

    medium: int
    items: tuple[int, ...]
    slots: int
    tokens: int
    out_grid: Size | None
    tiles: Tiles | Overlap | None = None
    framed_grid: Size | None = None
    before: str = ""
    after: str = ""
    frames: Joining | None = None
    times: tuple[int, ...] = ()
    newlines: int = 0


class MediaPlan(NamedTuple):
    """The items and placements of one conversation, in reading order."""

    items: tuple[Item, ...] = ()
    placements: tuple[Placement, ...] = ()

    @classmethod
    def of_slots(cls, *counts: int) -> MediaPlan:
        """Placements with these numbers of slots, without items, to render text only."""
        return cls((), tuple(Placement(medium, (), count, count, None) for medium, count in enumerate(counts)))

    @property
    def by_medium(self) -> list[list[tuple[int, Placement]]]:
        """The placements of each medium, with their numbers."""
        numbered = groupby(enumerate(self.placements), key=lambda each: each[1].medium)
        return [list(placements) for _, placements in numbered]

    def is_video(self, number: int) -> bool:
        """Whether placement `number` is of a video."""
        return bool(self.items[self.placements[number].items[0]].times)

    @property
    def sizes(self) -> frozenset[Size]:
        """The different sizes in pixels of what the connector, or an encoder of any size, is shown at once."""
        apart = {
            number
            for placement in self.placements
            if not isinstance(placement.tiles, Overlap)
            for number in placement.items
        }
        return frozenset(item.pixels[0] if number in apart else item.canvas() for number, item in enumerate(self.items))

    def first(self, count: int) -> MediaPlan:
        """The plan of the first `count` placements."""
        return self.between(0, count)

    def between(self, first: int, last: int) -> MediaPlan:
        """The plan of placements `first` to ``last - 1``, whose items are counted anew; media keep their numbers."""
        kept, before = self.placements[first:last], sum(len(placement.items) for placement in self.placements[:first])
        if before:
            kept = tuple(each._replace(items=tuple(item - before for item in each.items)) for each in kept)
        return MediaPlan(self.items[before : before + sum(len(placement.items) for placement in kept)], kept)


NO_MEDIA = MediaPlan()


class Texts(NamedTuple):
    """Text for a connector that reads text: ids ``(N, L)`` and mask ``(N, L)`` bool, one row per item."""

    ids: Tensor
    mask: Tensor


class Seen(NamedTuple):
    """The placements that each position may attend to, for a fusion whose visual tokens are not in the text.

    images ``(B, n)``: numbers of the placements of each row, in order; those after the last one repeat it. first, last
    ``(B, T)``: where, among them, those of a position's own sample start, and the last one at or before the position,
    -1 if its sample has shown none yet.
    """

    images: Tensor
    first: Tensor
    last: Tensor

    @classmethod
    def of(cls, index: Tensor, boundaries: Tensor | None = None) -> Seen:
        """Found from the placement at each position, `index` ``(B, T)``, and the `boundaries` of a packed row."""
        shown = index.cummax(1).values  # placements are numbered in reading order
        starts = torch.zeros_like(index)
        if boundaries is not None:
            starts[0] = torch.repeat_interleave(boundaries[:-1], boundaries.diff())
        earlier = F.pad(shown, (1, 0), value=-1).gather(1, starts)  # the last placement of an earlier sample of the row
        last = index.amax(1, keepdim=True)
        first = torch.where(index >= 0, index, last).amin(1, keepdim=True)
        numbers = first + torch.arange(max(1, int((last - first).max()) + 1))
        return cls(
            numbers.minimum(last).clamp(min=0),
            torch.where(earlier >= 0, earlier + 1 - first, 0),
            torch.where(shown > earlier, shown - first, -1),
        )


Pixels = Tensor | tuple[Tensor, ...]
"""Images of equal size, ``(N, 3, H, W)``, or of different sizes, each ``(3, H, W)``.

For encoders that read clips of T frames, ``(N, T, 3, H, W)``, or for each clip ``(T, 3, H, W)``.
"""


def normalized(pixels: Pixels, mean: Sequence[float], std: Sequence[float]) -> Pixels:
    """Levels of uint8 as float32, normalized by the channel mean and standard deviation of values in [0, 1].

    Pixels in floating point are normalized already, and returned as they are. The result has the same bits on every
    device.
    """
    images = [image for image in ([pixels] if isinstance(pixels, Tensor) else pixels) if image.dtype == torch.uint8]
    if not images:
        return pixels
    device = images[0].device

    # Filled on the device, since copies of numbers would wait for it; and divisors are tensors, since GPUs divide by
    # a number of the host by multiplying with its reciprocal, which rounds differently.
    def filled(*values: float) -> Tensor:
        return torch.stack([torch.full((1, 1), value, dtype=torch.float32, device=device) for value in values])

    white, center, spread = filled(255), filled(*mean), filled(*std)
    return _each(
        pixels,
        lambda image: image.float().div_(white).sub_(center).div_(spread) if image.dtype == torch.uint8 else image,
    )


def _each(pixels: Pixels, change: Callable[[Tensor], Tensor]) -> Pixels:
    return change(pixels) if isinstance(pixels, Tensor) else tuple(map(change, pixels))


class Cached(NamedTuple):
    """What a feature cache has of the items of a batch.

    keys: of all items. numbers: of the items whose features were read, whose pixels the batch does not have. features:
    of these items, in order, as `vlmtrain.connectors.Features`; None if there are none.
    """

    keys: tuple[str, ...]
    numbers: tuple[int, ...] = ()
    features: Any = None


class Visual(NamedTuple):
    """The visual inputs of a batch.

    pixels: one `Pixels` per encoder, uint8 until `to` or `normalized` normalizes them by `mean_std`, the mean and
    standard deviation of the channels for each encoder. items, placements: of all samples, in reading order; both are
    empty for a batch without images, whose pixels are normalized stand-ins, so that every rank makes the same calls.
    index ``(B, T)``: the placement at each text position, -1 for text. texts: for a connector that reads text. cached:
    one per encoder, None for those without a feature cache; empty if none has one. The pixels of an encoder with a
    cache are those of the items that were not read from it. calls: number of calls of modules that process one size or
    grid of images at a time; the same on all ranks. chunks: number of chunks in which an encoder with a `batch_size`
    processes the items; the same on all ranks. frames: how videos are joined if the connector must be called for
    them alone, which all ranks then do. seen: what the text may attend to, for a fusion that reads it.

    This is a NamedTuple because ZeRO-3 loses the gradients of tensors that are passed inside a dataclass.
    """

    pixels: tuple[Pixels, ...]
    items: tuple[Item, ...]
    placements: tuple[Placement, ...]
    index: Tensor
    texts: Texts | None = None
    cached: tuple[Cached | None, ...] = ()
    calls: int = 1
    mean_std: tuple[tuple[tuple[float, ...], tuple[float, ...]], ...] | None = None
    frames: Joining | None = None
    chunks: int = 1
    seen: Seen | None = None

    @property
    def mask(self) -> Tensor:
        """Positions of visual tokens, ``(B, T)`` bool."""
        return self.index >= 0

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> Visual:
        """Move all tensors to a device, where pixels are normalized, and convert pixels to `dtype`.

        Without `dtype`, normalized pixels are float32.
        """

        def moved(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=True)

        pixels, texts = tuple(_each(each, moved) for each in self.pixels), self.texts and Texts(*map(moved, self.texts))
        cached = tuple(
            each._replace(features=each.features.to(device, non_blocking=True)) if each and each.features else each
            for each in self.cached
        )
        seen = self.seen and Seen(*map(moved, self.seen))
        visual = self._replace(pixels=pixels, index=moved(self.index), texts=texts, cached=cached, seen=seen)
        visual = visual.normalized()
        if dtype is None:
            return visual
        return visual._replace(pixels=tuple(_each(each, lambda image: image.to(dtype)) for each in visual.pixels))

    def normalized(self) -> Visual:
        """With normalized pixels, for a batch that was not moved by `to`."""
        if self.mean_std is None:  # made by hand
            if any(image.dtype == torch.uint8 for each in self.pixels for image in each):
                raise ValueError("a Visual with uint8 pixels needs mean_std, to normalize them")
            return self
        return self._replace(pixels=tuple(normalized(each, *look) for each, look in zip(self.pixels, self.mean_std)))


def joined(plans: Sequence[MediaPlan]) -> MediaPlan:
    """The plans of several conversations as one, with indices of media and items that count over all of them."""
    items: list[Item] = []
    placements: list[Placement] = []
    media = 0
    for plan in plans:
        before = len(items)
        items += [item._replace(medium=media + item.medium) for item in plan.items]
        placements += [
            each._replace(medium=media + each.medium, items=tuple(before + item for item in each.items))
            for each in plan.placements
        ]
        media += len(plan.by_medium)
    return MediaPlan(tuple(items), tuple(placements))
