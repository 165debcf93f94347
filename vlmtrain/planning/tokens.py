"""Visual tokens of an image, computed without running a model."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch

from ..connectors import CONNECTORS, build_connector
from ..data.encoded import MAX_ASPECT
from ..data.native_sizes import smart_resize

# The number of a connector's tokens does not depend on the widths; these are LLaVA-1.5's.
IN_DIM, OUT_DIM = 1024, 4096


@dataclass(frozen=True)
class VisualTokens:
    """Visual tokens of one image. `views` counts its tiles and its thumbnail."""

    connector: str
    grid: tuple[int, int]
    views: int
    tokens_per_view: int
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
    for name, value in (("--patch-size", patch_size), ("--tiles", tiles), ("--context", context)):
        if value < 1:
            raise ValueError(f"{name} {value}: must be positive")
    height, width = image_size
    if height < 1 or width < 1:
        raise ValueError(f"--image-size {height}x{width}: must be positive")
    build = partial(build_connector, connector, IN_DIM, OUT_DIM, **(options or {}))
    if image_pixels is not None:
        if tiles > 1 or thumbnail:
            raise ValueError("--image-pixels: images of their own size are not split into tiles")
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
        module = build(input_grid=grid)
    each = module.num_tokens(*grid)
    views = tiles + thumbnail
    return VisualTokens(connector, grid, views, each, each * views, each * views / context)
