"""The pixels of images as features, for language models without a vision encoder."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...connectors import Features, PackedFeatures, VisionFeatures
from ...visual import Pixels, Size
from .base import VisionEncoder, as_size
from .native import squares


class PatchVision(VisionEncoder):
    """The pixels of each patch in place of an encoder (Fuyu, published code). It has no weights.

    ``(B, 3, H, W)`` -> ``(B, H/p, W/p, 3*p*p)`` for patches of p x p pixels. The channels of a pixel are adjacent.
    """

    provider = "patches"
    size_rule = "padded"
    num_blocks = 0
    image_mean = image_std = (0.5, 0.5, 0.5)

    def __init__(self, patch_size: int | Size, image_size: int | Size | None = None):
        super().__init__()
        self.patch_size = as_size(patch_size)
        self.image_size = as_size(image_size or tuple(10 * side for side in self.patch_size))
        self.width = 3 * math.prod(self.patch_size)
        self.layer, self.levels = 0, []
        self.blocks = nn.ModuleList()
        self._check_geometry()

    @classmethod
    def build(
        cls,
        patch_size: int,
        image_size: int | Size | None = None,
        dtype: torch.dtype = torch.float32,
        weights: bool = True,
    ) -> PatchVision:
        """Build it from the keys of ``vision``.

        patch_size: side of a patch in pixels. image_size: in pixels, None for 10 x 10 patches; with
        ``image_fit=native``, the largest height and width.
        """
        return cls(patch_size, image_size)

    def give_levels(self, count: int) -> None:
        if count:
            raise ValueError(f"the connector reads {count} hidden layers, but vision=patches has none: use linear")

    def check_any_size(self) -> None:
        """Do nothing: images of all sizes have patches."""

    def _resize(self, before: Size) -> None:
        """Do nothing: nothing depends on the size."""

    def encode(self, pixels: Pixels, calls: int = 1, chunks: int = 1) -> Features:
        """As `VisionEncoder.encode`, in one call: without weights, ranks need not agree on the number of calls."""
        return self(pixels)

    def forward(self, images: Pixels) -> Features:
        patches = squares(images, self.patch_size).permute(0, 2, 3, 1).flatten(1)
        if isinstance(images, Tensor):
            return VisionFeatures(patches.unflatten(0, (len(images), *self.grid_of(images.shape[-2:]))))
        return PackedFeatures(patches, tuple(self.grid_of(image.shape[-2:]) for image in images))

    def describe(self) -> dict:
        return {"image_size": list(self.image_size), "options": {"patch_size": list(self.patch_size)}}

    @classmethod
    def from_description(cls, saved: Mapping[str, Any]) -> PatchVision:
        return cls(**saved["options"], image_size=saved["image_size"])
