"""Plans how images are shown to an encoder and how many tokens each becomes, from their sizes alone."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import torch

from ..frames import PLAIN, Joining
from ..model.parts import connector_from
from ..tiling import Overlap, Tiles, tiled_tokens
from ..visual import WHOLE, Item, MediaPlan, Placement, Size
from .encoded import MAX_ASPECT
from .images import ANTIALIASED, FITS, frame_of
from .native_sizes import PADDED, SIZE_RULES, SMART_RESIZE, padded, whole_multiple
from .records import BadSample, VideoFacts
from .regions import Frame
from .tile_styles import LLAVA_NEXT, TILE_STYLES, Molmo2, TileStyle
from .video_plan import Clip, VideoPlan


class View(NamedTuple):
    """How images are prepared for a further encoder, see `Geometry`. fit: None if it is that of the first encoder."""

    size: Size
    fit: str | None
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    patch_size: Size


@dataclass(frozen=True)
class Geometry:
    """How images are prepared for the encoder, and how many tokens each becomes.

    size ``(H, W)`` in pixels; fit: ``squash``, ``pad``, ``crop``, ``tiles`` or ``native``; mean, std: of the channels
    in [0, 1]. tokens, grid: number and grid of the tokens of one image of `size`; grid is None if the tokens form none.
    tile_grids: for ``tiles``, the ``(rows, columns)`` into which an image may be cut; tiles_most: maximum number of
    tiles whose tokens are kept, 0 for all; tiles_alone: whether an image is cut only if its sample has no other image;
    tile_style: a name in `TILE_STYLES`; tile_margin: of overlapping crops, in patches.
    patch_size ``(H, W)`` in pixels, None in model folders of earlier versions. framed_grid: see `Placement`. frame:
    text of the template before and after each image, such as the tokens that start and end one. newline: token of the
    template after each row of the tokens of an image, or empty. For ``native``: image_pixels, smallest and largest
    number of pixels; multiple: both sides are multiples of this many patches; size_rule: of the encoder, one of
    `SIZE_RULES`, or ``padded``, for which `size` is the largest height and width. connector: for ``native`` and
    overlapping crops, the configuration of the connector, which says how many tokens it makes of each grid. others: of
    further encoders; tiles show them the same parts of the image, and ``native`` the sizes at which they have the same
    grids. video: how videos are shown; None if they are refused. slot_token: the token at the single text position of
    an image, for a fusion whose visual tokens are not in the text; None if they are. frame_shared: whether images with
    nothing between them share the token of `frame` there, and spaces next to images are dropped (IDEFICS).
    """

    size: Size
    fit: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    tokens: int
    grid: Size | None = None
    tile_grids: tuple[Size, ...] = ()
    tiles_most: int = 0
    tiles_alone: bool = False
    patch_size: Size | None = None
    image_pixels: tuple[int, int] | None = None
    multiple: int = 1
    connector: dict[str, Any] | None = None
    framed_grid: Size | None = None
    frame: tuple[str, str] = ("", "")
    tile_style: str = LLAVA_NEXT
    size_rule: str = SMART_RESIZE
    others: tuple[View, ...] = ()
    video: VideoPlan | None = None
    tile_margin: int = 0
    slot_token: str | None = None
    newline: str = ""
    frame_shared: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "others", tuple(View(*view) for view in self.others))
        if isinstance(self.video, dict):
            object.__setattr__(self, "video", VideoPlan.saved(self.video))
        for fit in (self.fit, *(view.fit for view in self.others if view.fit)):
            if fit not in FITS:
                raise ValueError(f"image_fit={fit}: expected one of {', '.join(FITS)}")
        if self.frame_shared and (not self.frame[0] or self.frame[0] != self.frame[1]):
            raise ValueError(f"llm.image_frame_shared needs the same token twice in llm.image_frame, got {self.frame}")
        if self.frame_shared and self.fit == "tiles":
            raise ValueError(
                "llm.image_frame_shared does not go with image_fit=tiles: expected squash, pad, crop or native"
            )
        if self.fit == "tiles" and not (self.tile_grids and all(min(grid) > 0 for grid in self.tile_grids)):
            raise ValueError(
                f"image_fit=tiles needs image_tiles, a list of [rows, columns], got {list(self.tile_grids)}"
            )
        if self.tile_style not in TILE_STYLES:
            raise ValueError(f"image_tile_style={self.tile_style}: expected one of {', '.join(TILE_STYLES)}")
        if self.fit == "tiles":
            if TILE_STYLES[self.tile_style].overlaps and (self.others or self.patch_size is None):
                raise ValueError(f"image_tile_style={self.tile_style}: expected one encoder of images, with patches")
            self._style.check(self.tile_grids)
        if self.fit == "native" and not (self.image_pixels and 0 < self.image_pixels[0] <= self.image_pixels[1]):
            raise ValueError(f"image_fit=native needs image_pixels, [MIN, MAX] pixels, got {self.image_pixels}")
        if self.fit == "native" and (self.patch_size is None or self.connector is None):
            raise ValueError("image_fit=native needs an encoder and a connector whose tokens enter the text")
        if self.fit == "native" and math.prod(self.factors) > self.image_pixels[1]:
            window = math.prod(self.factors)
            raise ValueError(f"image_pixels={list(self.image_pixels)}: expected a MAX of at least one window, {window}")

    @cached_property
    def _style(self) -> TileStyle:
        style = TILE_STYLES[self.tile_style]
        return Molmo2(self.tile_margin, self._grid(self.size)) if style.overlaps else style

    @property
    def view_words(self) -> tuple[str, ...]:
        """The words that the style of tiles puts around the views of images."""
        if self.fit != "tiles":
            return ()
        places = [place for grid in (None, *self.tile_grids) for place in self._style.places(grid)]
        words = [word for place in places for word in (place.before, place.after)]
        return tuple(dict.fromkeys(filter(None, words)))

    @property
    def controls(self) -> tuple[str, ...]:
        """The tokens of the template around images, views and videos."""
        of_videos = (self.video and self.video.frame_tokens) or ()
        return tuple(filter(None, (*self.frame, *self.view_words, *of_videos, self.slot_token, self.newline)))

    @property
    def most_control_tokens(self) -> int:
        """The largest number of tokens of the template around the tokens of an image that is alone in its sample."""
        words = 0
        if self.fit == "tiles":
            cuts = map(self._style.places, self.tile_grids)
            words = max(sum(bool(word) for place in places for word in (place.before, place.after)) for places in cuts)
        return sum(map(bool, self.frame)) + words + self._most_newlines

    @property
    def _most_newlines(self) -> int:
        """The largest number of newlines of the template in an image."""
        if not self.newline:
            return 0
        if self.fit != "native":
            return self.grid[0]
        return max(self._counted(self._grid(size))[1][0] for size in self._extremes())

    @property
    def reads_sizes(self) -> bool:
        """Whether the plan depends on the sizes of the images."""
        return self.fit in ("tiles", "native")

    def plan(self, media: Sequence[Size | VideoFacts | None], room: int | None = None) -> MediaPlan:
        """The items and placements of the media of a sample: sizes ``(H, W)`` of images if `reads_sizes`, and videos.

        room: maximum number of tokens of each video; None for no limit beside that of `video`. Raises ValueError for an
        image whose grid the connector does not support, and BadSample for a video that cannot be shown.
        """
        items: list[Item] = []
        placements: list[Placement] = []
        images = sum(not isinstance(size, VideoFacts) for size in media)
        for medium, size in enumerate(media):
            if isinstance(size, VideoFacts):
                shown, placed = self._video(medium, size, len(items), room)
                items += shown
                placements += placed
                continue
            places = self._places(medium, size, images)
            for number, (shown, tiles, *around) in enumerate(places):
                tokens, grid, framed = self.tokens, self.grid, self.framed_grid
                if self.fit == "native":
                    tokens, grid, framed = self._counted(shown[0].grids[0])
                if tiles:
                    tokens, grid, framed = self._joined(tiles), None, None
                numbers = tuple(range(len(items), len(items) + len(shown)))
                before = (self.frame[0] if number == 0 else "") + around[0]
                after = around[1] + (self.frame[1] if number == len(places) - 1 else "")
                if self.slot_token:
                    grid = framed = None
                slots = 1 if self.slot_token else tokens
                rows = 0
                if self.newline:
                    rows, grid = grid[0], None
                placements.append(
                    Placement(medium, numbers, slots, tokens, grid, tiles, framed, before, after, newlines=rows)
                )
                items += shown
        return MediaPlan(tuple(items), tuple(placements))

    def _video(
        self, medium: int, facts: VideoFacts, first: int, room: int | None
    ) -> tuple[list[Item], list[Placement]]:
        """Items and placements of a video, whose items are numbered from `first`."""
        video = self.video
        if video is None and self.slot_token:
            raise BadSample("the fusion of the model supports images, not videos")
        if video is None:
            raise BadSample("the model has no settings for videos, stages.<name>.video")

        def shown(most: int, stride: int) -> tuple[list[Clip], Size, int, Size | None, Joining]:
            """The clips for a maximum number of frames, the size, tokens and grid of each, and how they are joined."""
            clips, joining = video.clips(facts, most), video.joining._replace(stride=stride)
            if self.fit != "native":
                return clips, self.size, video.tokens, video.grid, joining
            size = video.size(facts, clips, self.factors, self._rule)
            return clips, size, *self._counted(self._grid(self._whole(size)))[:2], joining

        def count(most: int, stride: int) -> int:
            clips, _, tokens, grid, joining = shown(most, stride)
            return joining.count(len(clips), tokens, grid)

        clips, size, tokens, grid, joining = shown(*video.fitted(count, room))
        if self.fit == "native":
            item = self._native_item(medium, "clip", size)
        else:
            item = self._item(medium, "clip", video.fit or "squash")
        items = [item._replace(times=clip.times) for clip in clips]
        numbers, out_grid = list(range(first, first + len(items))), joining.pooled(grid) if grid else None
        joins = joining if joining != PLAIN else None
        before, after = video.frame_tokens or self.frame
        positions = video.positions(facts, clips)
        if video.timestamps != "frame":
            total, grid = joining.count(len(clips), tokens, grid), out_grid if joining.newline == "none" else None
            after += video.sentence(facts, clips)
            whole = Placement(medium, tuple(numbers), total, total, grid, None, None, before, after, joins, positions)
            return items, [whole]
        one, grid = joining.count(1, tokens, grid), out_grid if joining.newline == "none" else None
        return items, [
            Placement(
                medium, (number,), one, one, grid, None, None, video.heading(i, clip) + before, after, joins, (0,)
            )
            for i, (number, clip) in enumerate(zip(numbers, clips))
        ]

    @property
    def separate_frames(self) -> Joining | None:
        """How frames are pooled if the connector must be called for them alone."""
        return self.video.joining if self.video is not None and self.video.joining.changes_input else None

    def _rule(self, size: Size, limits: tuple[int, int] | None = None) -> Size:
        """The size to which an image or a frame of `size` is scaled. limits: None for those of images."""
        limits = limits or self.image_pixels
        if self.size_rule == PADDED:
            return padded(size, self.factors, limits, self.size)
        return SIZE_RULES[self.size_rule](size, self.factors, limits)

    def _whole(self, scaled: Size) -> Size:
        """The size at which an image that is scaled to `scaled` is shown: of whole patches."""
        return whole_multiple(scaled, self.factors)

    def _native_item(self, medium: int, kind: str, scaled: Size) -> Item:
        """An item of an image or a frame that is scaled to `scaled`, in the upper left corner of what is shown."""
        shown, fit = self._whole(scaled), ANTIALIASED if self.size_rule == PADDED else "squash"
        return self._item(medium, kind, fit, (0.0, 0.0, shown[1] / scaled[1], shown[0] / scaled[0]), shown)

    def _places(
        self, medium: int, size: Size | None, images: int
    ) -> list[tuple[list[Item], Tiles | Overlap | None, str, str]]:
        """The items, how they are joined and the words around them, at each place in the text that an image has.

        images: number of images in its sample.
        """
        if self.fit == "native":
            return [([self._native_item(medium, "image", self._rule(size))], None, "", "")]
        if self.fit != "tiles":
            return [([self._item(medium, "image", self.fit)], None, "", "")]
        style, cut, found = self._style, images == 1 or not self.tiles_alone, []
        grid = style.choose(size, self.size, self.tile_grids, images) if cut else None
        heading = style.heading(medium, images)
        for place in style.places(grid):
            items = [self._item(medium, view.kind, view.fit, view.box) for view in place.views]
            joined = style.joined(place, grid, size, self.tiles_most)
            found.append((items, joined, heading + place.before, place.after))
            heading = ""
        return found

    def _joined(self, tiles: Tiles | Overlap) -> int:
        """Number of tokens of the views that a connector joins."""
        if isinstance(tiles, Tiles):
            return tiled_tokens(tiles, self.tokens, self.grid)
        tokens, grid, _ = self._counted(tiles.patches(self._grid(self.size)))
        return tokens if grid is None else grid[0] * (grid[1] + 1)

    def map(self, size: Size, images: int = 1) -> Frame:
        """Where an image of `size` ``(H, W)``, one of `images` in its sample, lies in what the first encoder is shown.

        With tiles, this is the view of the complete image.
        """
        shown = (item for items, *_ in self._places(0, size, images) for item in items)
        whole = next(item for item in shown if item.box[:2] == WHOLE[:2] and min(item.box[2:]) >= 1)
        (height, width) = whole.pixels[0]
        return frame_of(size, whole.canvas(), whole.fits[0])._replace(seen=(width, height))

    def _item(
        self,
        medium: int,
        kind: str,
        fit: str,
        box: tuple[float, float, float, float] = WHOLE,
        pixels: Size | None = None,
    ) -> Item:
        sizes = self.sizes(pixels or self.size)
        fits = (fit, *((view.fit or fit) if self.fit == fit else fit for view in self.others))
        patches = () if self.patch_size is None else (self.patch_size, *(view.patch_size for view in self.others))
        grids = tuple((size[0] // patch[0], size[1] // patch[1]) for size, patch in zip(sizes, patches))
        return Item(medium, kind, fits, box, (), sizes, grids)

    def sizes(self, pixels: Size) -> tuple[Size, ...]:
        """The size in pixels at which each encoder is shown what the first one is shown at a size."""
        if self.fit != "native":
            return (pixels, *(view.size for view in self.others))
        height, width = self._grid(pixels)
        return (pixels, *((height * view.patch_size[0], width * view.patch_size[1]) for view in self.others))

    @property
    def mean_std(self) -> tuple[tuple[tuple[float, ...], tuple[float, ...]], ...]:
        """Mean and standard deviation of the channels for each encoder."""
        return ((self.mean, self.std), *((view.mean, view.std) for view in self.others))

    def _grid(self, pixels: Size) -> Size:
        return pixels[0] // self.patch_size[0], pixels[1] // self.patch_size[1]

    def _counted(self, grid: Size) -> tuple[int, Size | None, Size | None]:
        return _tokens_of(self._described, grid)

    @cached_property
    def _described(self) -> str:
        return json.dumps(self.connector, sort_keys=True)

    @property
    def factors(self) -> Size:
        """The sides ``(H, W)`` in pixels of which those of a native image are multiples."""
        return self.patch_size[0] * self.multiple, self.patch_size[1] * self.multiple

    def native_size(self, size: Size) -> Size:
        """The size ``(H, W)`` at which an image of `size` is shown."""
        return self._whole(self._rule(size))

    @property
    def smallest(self) -> Size:
        """Size of the stand-in for a batch without images: the smallest legal one."""
        return self.native_size((1, 1)) if self.fit == "native" else self.size

    @property
    def largest(self) -> Size:
        """The largest size of an image."""
        if self.fit != "native":
            return self.size
        return max(self._extremes(), key=lambda size: (size[0] * size[1], min(size)))

    @property
    def most_items(self) -> int:
        """The largest number of items of any image."""
        cuts = map(self._style.places, self.tile_grids)
        return max((sum(len(place.views) for place in places) for places in cuts), default=1)

    @property
    def least_tokens(self) -> int:
        """Number of text positions of one view of `size`, or of the smallest image with ``native``."""
        if self.slot_token:
            return 1
        return self._counted(self._grid(self.smallest))[0] if self.fit == "native" else self.tokens

    @property
    def most_tokens(self) -> int:
        """The largest number of text positions of any image."""
        if self.slot_token:
            return max((len(self._style.places(grid)) for grid in self.tile_grids), default=1)
        if self.fit == "native":
            return max(self._counted(self._grid(size))[0] for size in self._extremes())
        return max(map(self._tokens_of_cut, self.tile_grids), default=self.tokens)

    def _tokens_of_cut(self, grid: Size) -> int:
        """Number of tokens of an image that is cut into `grid` and has no padding."""
        size, tokens = tuple(side * count for side, count in zip(self.size, grid)), 0
        for place in self._style.places(grid):
            joined = self._style.joined(place, grid, size, self.tiles_most)
            tokens += self._joined(joined) if joined else self.tokens * len(place.views)
        return tokens

    def _extremes(self) -> list[Size]:
        """The largest native sizes, one for each height that an image may have."""
        (_, most), (down, across) = self.image_pixels, self.factors
        tallest = min(most // across, math.isqrt(MAX_ASPECT * most) + down)
        widest = most
        if self.size_rule == PADDED:
            height, widest = self._whole(self.size)
            tallest = min(tallest, height)
        heights = range(down, max(down, tallest) + 1, down)
        return [(height, max(1, min(widest, most // height) // across) * across) for height in heights]


@lru_cache(maxsize=2**16)
def _tokens_of(connector: str, grid: Size) -> tuple[int, Size | None, Size | None]:
    """Number, grid and framed grid of the tokens that a connector, given by its configuration, makes of patches."""
    skeleton = _skeleton(connector)
    return skeleton.num_tokens(*grid), skeleton.output_grid(*grid), skeleton.framed_grid(*grid)


@lru_cache(maxsize=16)
def _skeleton(connector: str):
    with torch.device("meta"):
        return connector_from(json.loads(connector))
