"""An encoder that sees images at several scales: S2 (Shi et al., "When Do We Not Need Larger Vision Models?", 2024)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ...connectors import VisionFeatures
from ...files import read_object, write_json
from ...visual import Size
from ..blocks import block_list
from .base import VisionEncoder, description_file
from .native import squares

SCALES = "ascending integers that start at 1, such as [1,2,3]"


def are_scales(value: Any) -> bool:
    """Whether a value is a list of ascending integers that start at 1."""
    if not isinstance(value, Sequence) or isinstance(value, str) or not all(type(scale) is int for scale in value):
        return False
    return list(value[:1]) == [1] and all(one < other for one, other in pairwise(value))


class MultiscaleVision(VisionEncoder):
    """An encoder whose features are those of an image at several scales (S2-Wrapper, published code).

    The normalized image is resized bicubically to each of `scales` times the encoder's own size, and cut into crops of
    that size, which the encoder sees in one call. The features of a scale are put together again, and averaged to the
    grid of the first scale. The channels of all scales are concatenated. Prefix tokens are dropped.

    encoder: an encoder of one scale. image_size: the largest scale times the encoder's own size, for images with all
    the detail that it sees.
    """

    def __init__(self, encoder: VisionEncoder, scales: Sequence[int]):
        super().__init__()
        if not are_scales(scales):
            raise ValueError(f"vision.scales={scales}: expected {SCALES}")
        self.encoder, self.scales, self.provider = encoder, tuple(scales), encoder.provider
        self.image_mean, self.image_std = encoder.image_mean, encoder.image_std
        self._follow()

    def _follow(self) -> None:
        """Take over what depends on the image size and the layers of the encoder."""
        encoder, most = self.encoder, self.scales[-1]
        self.image_size, self.patch_size = (
            (size[0] * most, size[1] * most) for size in (encoder.image_size, encoder.patch_size)
        )
        self.width = encoder.width * len(self.scales)
        self.layer, self.levels = encoder.layer, encoder.levels
        self.num_blocks, self.multiple = encoder.num_blocks, encoder.multiple

    @property
    def block_path(self) -> str:
        return f"encoder.{block_list(self.encoder)[0]}"

    def resize(self, image_size: int | Size, key: str = "vision.image_size") -> None:
        """Change the image size of the first scale, as `VisionEncoder.resize`."""
        self.encoder.resize(image_size, key)
        self._follow()

    def set_layers(self, layer: int, levels: Sequence[int] | None) -> None:
        self.encoder.set_layers(layer, levels)
        self._follow()

    def check_any_size(self) -> None:
        raise ValueError(
            f"image_fit=native cannot be combined with vision.scales={list(self.scales)}, which cut images of one "
            "size into crops: use another image_fit, or set vision.scales=null"
        )

    def forward(self, images: Tensor) -> VisionFeatures:
        features = self.encoder(torch.cat([self._crops(images, scale) for scale in self.scales]))
        patches, *levels = (self._joined(grids, len(images)) for grids in (features.patches, *features.levels))
        return VisionFeatures(patches, None, tuple(levels))

    def _crops(self, images: Tensor, scale: int) -> Tensor:
        """The ``scale * scale`` crops of each image at one scale, in raster order: ``(N * scale * scale, 3, h, w)``."""
        height, width = self.encoder.image_size
        resized = F.interpolate(_at_least_float32(images), (scale * height, scale * width), mode="bicubic")
        return squares(resized.to(images.dtype), self.encoder.image_size)

    def _joined(self, crops: Tensor, images: int) -> Tensor:
        """Features ``(N, H, W, C * scales)`` of images, from those of the crops of all scales, ``(crops, H, W, C)``."""
        found = []
        for scale, own in zip(self.scales, crops.split([images * scale**2 for scale in self.scales])):
            whole = own.unflatten(0, (images, scale, scale)).permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)
            # area interpolation, by a whole factor
            found.append(F.avg_pool2d(_at_least_float32(whole), scale).to(crops.dtype))
        return torch.cat(found, 1).permute(0, 2, 3, 1).contiguous()

    @property
    def architecture(self) -> dict:
        return {**self.encoder.architecture, "scales": list(self.scales)}

    def describe(self) -> dict:
        return {**self.encoder.describe(), "scales": list(self.scales)}

    def save(self, folder: Path, state: dict[str, Tensor]) -> None:
        """Write the encoder as it writes itself, with ``scales`` in its description."""
        self.encoder.save(folder, {name.removeprefix("encoder."): tensor for name, tensor in state.items()})
        file = description_file(folder)
        write_json(file, {**read_object(file), "scales": list(self.scales)})


def with_scales(encoder: VisionEncoder, scales: Sequence[int] | None) -> VisionEncoder:
    """The encoder, seeing images at several scales unless `scales` is None."""
    return encoder if scales is None else MultiscaleVision(encoder, scales)


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
