"""Visual tokens of images and videos, computed without running a model."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from omegaconf import OmegaConf

from ..connectors import CONNECTORS, Connector, build_connector
from ..data.encoded import MAX_ASPECT
from ..data.native_sizes import smart_resize
from ..data.records import VideoFacts
from ..settings.fields import POSITIVE, read
from ..settings.locations import CONFIGS
from ..settings.stage import VideoOptions
from ..training.processing import video_plan

# The number of a connector's tokens does not depend on the widths; these are LLaVA-1.5's.
IN_DIM, OUT_DIM = 1024, 4096
VIDEO_RATE = 30  # frames per second of the videos that are counted


@dataclass(frozen=True)
class VisualTokens:
    """Visual tokens of one image. `views` counts its tiles and its thumbnail."""

    connector: str
    grid: tuple[int, int]
    views: int
    tokens_per_view: int
    tokens: int
    context_share: float


@dataclass(frozen=True)
class VideoTokens:
    """Visual tokens of a video. tokens_per_frame: with its newlines, without that of the video."""

    connector: str
    sampling: str
    seconds: float
    frames: int
    tokens_per_frame: float
    tokens: int
    context_share: float


def visual_tokens(
    image_size: tuple[int, int],
    patch_size: int,
    connector: str = "linear",
    options: Mapping | None = None,
    tiles: int = 1,
    thumbnail: bool = False,
    context: int = 4096,
    image_pixels: tuple[int, int] | None = None,
) -> VisualTokens:
    """Count the tokens of an image in `tiles` views of `image_size` ``(H, W)`` pixels, and their share of `context`.

    thumbnail: add one view of the complete image. image_pixels: smallest and largest number of pixels of an image of
    its own size, `image_size`, as for ``image_fit=native``. Raises ValueError for sizes that do not fit.
    """
    for name, value in (("--tiles", tiles), ("--context", context)):
        _check_positive(name, value)
    if image_pixels is not None and (tiles > 1 or thumbnail):
        raise ValueError("--image-pixels: images of their own size are not split into tiles")
    module, grid = _connector(image_size, patch_size, connector, options, image_pixels)
    each = module.num_tokens(*grid)
    views = tiles + thumbnail
    return VisualTokens(connector, grid, views, each, each * views, each * views / context)


def video_tokens(
    seconds: float,
    image_size: tuple[int, int],
    patch_size: int,
    connector: str = "linear",
    options: Mapping | None = None,
    context: int = 4096,
    image_pixels: tuple[int, int] | None = None,
    frames_per_item: int = 1,
    **video: object,
) -> VideoTokens:
    """Count the tokens of a video of `seconds` whose frames have `image_size` ``(H, W)``, and their share of `context`.

    frames_per_item: frames that the encoder reads together. image_pixels: see `visual_tokens`. video: keys of
    ``stages.<name>.video``. Raises ValueError for options that do not fit.
    """
    POSITIVE(seconds, "--video")
    for name, value in (("--frames-per-item", frames_per_item), ("--context", context)):
        _check_positive(name, value)
    module, grid = _connector(image_size, patch_size, connector, options, image_pixels)
    defaults = OmegaConf.to_container(OmegaConf.load(CONFIGS / "objective" / "language_modelling.yaml").video)
    if video.get("sampling") == "uniform":
        defaults["fps"] = None
    chosen = read(VideoOptions, {**defaults, **video}, "video.")
    plan = video_plan(chosen, "video.", grid, frames_per_item, module, "squash")
    times = np.arange(max(1, round(seconds * VIDEO_RATE))) / VIDEO_RATE
    clips = plan.clips(VideoFacts(times, len(times) / VIDEO_RATE, image_size), plan.frames)
    alone = plan.joining._replace(newline="none") if plan.joining.newline == "video" else plan.joining
    each = alone.count(1, plan.tokens, plan.grid) / frames_per_item
    tokens = plan.joining.count(len(clips), plan.tokens, plan.grid)
    frames = len(clips) * frames_per_item
    return VideoTokens(connector, chosen.sampling, seconds, frames, each, tokens, tokens / context)


def _check_positive(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name} {value}: must be positive")


def _connector(
    image_size: tuple[int, int],
    patch_size: int,
    connector: str,
    options: Mapping | None,
    image_pixels: tuple[int, int] | None,
) -> tuple[Connector, tuple[int, int]]:
    """The connector, without weights, and the grid of patches that it reads."""
    _check_positive("--patch-size", patch_size)
    height, width = image_size
    if height < 1 or width < 1:
        raise ValueError(f"--image-size {height}x{width}: must be positive")
    build = partial(build_connector, connector, IN_DIM, OUT_DIM, **(options or {}))
    if image_pixels is not None:
        if max(image_size) > MAX_ASPECT * min(image_size):
            raise ValueError(f"--image-size {height}x{width}: one side is more than {MAX_ASPECT} times the other")
        if not 1 <= image_pixels[0] <= image_pixels[1]:
            raise ValueError(f"--image-pixels {image_pixels[0]} {image_pixels[1]}: expected 1 <= MIN <= MAX")
        if "input_grid" in inspect.signature(CONNECTORS.find(connector)).parameters:
            raise ValueError(f"--image-pixels: {connector} supports only one grid, not images of different sizes")
        with torch.device("meta"):
            factor = patch_size * build().multiple
        height, width = smart_resize(image_size, (factor, factor), image_pixels)
    if height < patch_size or width < patch_size or height % patch_size or width % patch_size:
        raise ValueError(f"--image-size {height}x{width} is not a multiple of --patch-size {patch_size}")
    grid = (height // patch_size, width // patch_size)
    with torch.device("meta"):
        return build(input_grid=grid), grid
