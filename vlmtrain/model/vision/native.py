"""Base class and parts of vision encoders of native resolution.

They encode images of any size, each with a grid of its own, in one call. The features are those before the merger of
the published model, in raster order.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from functools import lru_cache

import torch
import transformers
from torch import Tensor, nn

from ...connectors import Features, PackedFeatures, VisionFeatures
from ...visual import Pixels, Size
from ..loading import load_hf_config
from .base import VisionEncoder, as_size, block_index, concatenated, with_unseen
from .checkpoint import facts, read_part, read_preprocessor
from .image_attention import NAME, register_image_attention, sent

Grids = tuple[Size, ...]


class NativeVision(VisionEncoder):
    """Base class of vision encoders of native resolution.

    config: the Hugging Face configuration of the tower; geometry: ``image_size``, ``image_mean`` and ``image_std``.
    A subclass sets `provider`, `model_types` (of published models with the tower), `prefixes`, `dropped` and `renames`
    (names in a published checkpoint, see `read_part`) and `width_key` (of `width` in the configuration), makes its
    modules under their published names, and implements `states` and `nominal_side`.
    """

    model_types: tuple[str, ...]
    prefixes: tuple[str, ...]
    dropped: tuple[str, ...]
    renames: tuple[tuple[str, str], ...] = ()
    width_key = "hidden_size"

    def __init__(self, config, geometry: dict, layer: int, levels: Sequence[int] | None = None):
        super().__init__()
        register_image_attention()
        self.config = copy.deepcopy(config)
        self.config._attn_implementation = NAME
        self.geometry = geometry
        self.image_size, self.patch_size = as_size(geometry["image_size"]), as_size(config.patch_size)
        self.image_mean, self.image_std = tuple(geometry["image_mean"]), tuple(geometry["image_std"])
        self.width, self.num_blocks = getattr(config, self.width_key), config.num_hidden_layers
        self.set_layers(layer, levels)

    @classmethod
    def build(
        cls,
        path: str,
        image_size: int | Size | None = None,
        layer: int = -1,
        levels: Sequence[int] | None = None,
        image_mean: list[float] | None = None,
        image_std: list[float] | None = None,
        dtype: torch.dtype = torch.float32,
        weights: bool = True,
        trust_remote_code: bool = False,
    ) -> NativeVision:
        """Load the tower of a published model from a Hub ID or a folder; without `weights`, build its architecture.

        image_size: nominal size in pixels, for images that do not keep their own; None means `nominal_side`.
        image_mean, image_std: None means those of ``preprocessor_config.json``. Raises ValueError for a checkpoint of
        another kind, and for one that lacks a tensor of the tower.
        """
        config = load_hf_config(path, "vision.path", trust_remote_code)
        if config.model_type not in cls.model_types:
            raise ValueError(f"vision.path={path} is a model of the type {config.model_type}: use vision=hf")
        config = getattr(config, "vision_config", config)
        preprocessor, look = read_preprocessor(path, image_mean, image_std)
        geometry = {"image_size": image_size or cls.nominal_side(config, preprocessor), **look}
        if not weights:
            return cls(config, geometry, layer, levels).to(dtype)
        with torch.device("meta"):
            encoder = cls(config, geometry, layer, levels)
        own = encoder.state_dict()
        encoder.load_state_dict(read_part(path, own, cls.prefixes, cls.dropped, cls.__name__, cls.renames), assign=True)
        return encoder.to(dtype)

    @staticmethod
    def nominal_side(config, preprocessor: Mapping) -> int:
        """Side in pixels of the images that stand for those of any size."""
        raise NotImplementedError

    def _resize(self, before: Size) -> None:
        self.geometry = {**self.geometry, "image_size": list(self.image_size)}

    def encode(self, pixels: Pixels, calls: int = 1, chunks: int = 1) -> Features:
        """As `VisionEncoder.encode`, but a chunk is one call, whatever the sizes of its images; `calls` is ignored."""
        parts = [self(part) for part in self._chunks(pixels)]
        return with_unseen(concatenated(parts), [self._unseen(pixels[:1]) for _ in range(chunks - len(parts))])

    def forward(self, images: Pixels) -> Features:
        """Map normalized images to features, `PackedFeatures` for images of their own sizes.

        Raises ValueError for an image whose sides are not multiples of the patch size and `multiple`.
        """
        sizes = [tuple(image.shape[-2:]) for image in images]
        for height, width in set(sizes):
            if any(side < step or side % step for side, step in zip((height, width), self.step)):
                raise ValueError(
                    f"{type(self).__name__} cannot encode an image of {height}x{width} pixels: "
                    f"expected multiples of {self.step[0]}x{self.step[1]}"
                )
        grids = tuple(map(self.grid_of, sizes))
        wanted = [block_index(layer, self.num_blocks) for layer in (self.layer, *self.levels)]
        states = self.states(images, grids, set(wanted))
        patches, *levels = (states[index] for index in wanted)
        if not isinstance(images, Tensor):
            return PackedFeatures(patches, grids, None, tuple(levels))
        shape = (len(images), *grids[0])
        return VisionFeatures(patches.unflatten(0, shape), None, tuple(level.unflatten(0, shape) for level in levels))

    def states(self, images: Pixels, grids: Grids, wanted: set[int]) -> dict[int, Tensor]:
        """Outputs ``(N, C)`` of the blocks `wanted`, for the patches of all images in raster order.

        Deeper blocks are not called. Each module is called once, because under ZeRO-3 all ranks must call it equally
        often; and its tensors are used in its own forward only, because they are gathered there and nowhere else.
        """
        raise NotImplementedError

    @property
    def architecture(self) -> dict:
        return {self.provider: facts(self.config)}

    def describe(self) -> dict:
        chosen = {"layer": self.layer, "levels": self.levels, "geometry": self.geometry}
        return {**chosen, "encoder": facts(self.config)}

    @classmethod
    def from_description(cls, saved: Mapping) -> NativeVision:
        config = transformers.AutoConfig.for_model(**saved["encoder"])
        return cls(config, saved["geometry"], saved["layer"], saved["levels"])


class PositionTable(nn.Embedding):
    """A square table of positions, interpolated bilinearly to the grid of each image.

    align_corners, antialias: as in `torch.nn.functional.interpolate`. unused: rows before those of the table.
    """

    def __init__(self, positions: int, width: int, align_corners: bool, antialias: bool = False, unused: int = 0):
        super().__init__(unused + positions, width)
        self.side, self.unused = math.isqrt(positions), unused
        self.align_corners, self.antialias = align_corners, antialias

    def forward(self, grids: Grids) -> Tensor:
        """Positions ``(N, C)`` of the patches of all grids in raster order, at least float32."""
        table = self.weight[self.unused :].unflatten(0, (self.side, self.side))
        table = table.to(torch.promote_types(table.dtype, torch.float32))

        def along(size: int) -> Tensor:
            return sent(_interpolation(size, self.side, self.align_corners, self.antialias), table.device).to(
                table.dtype
            )

        found = {
            grid: torch.einsum("hs,wt,stc->hwc", along(grid[0]), along(grid[1]), table) for grid in dict.fromkeys(grids)
        }
        return torch.cat([found[grid].flatten(0, 1) for grid in grids])


@lru_cache(maxsize=1024)
def _interpolation(size: int, side: int, align_corners: bool, antialias: bool) -> Tensor:
    """Weights ``(size, side)`` with which `side` points are interpolated to `size` points, on the host."""
    targets, points = (torch.arange(count, dtype=torch.float64, device="cpu") for count in (size, side))
    if align_corners:
        at, reach = targets * (side - 1) / max(size - 1, 1), 1.0
    else:
        at, reach = (targets + 0.5) * side / size - 0.5, max(side / size, 1.0) if antialias else 1.0
        at = at if antialias else at.clamp(0, side - 1)
    weights = (1 - (points - at[:, None]).abs() / reach).clamp(min=0)
    return (weights / weights.sum(1, keepdim=True)).float()


def squares(images: Pixels, patch: Size) -> Tensor:
    """The patches ``(N, 3, h, w)`` of images, one after another, each in raster order."""
    if not isinstance(images, Tensor):
        return torch.cat([squares(image[None], patch) for image in images])
    cut = images.unflatten(3, (-1, patch[1])).unflatten(2, (-1, patch[0]))
    return cut.permute(0, 2, 4, 1, 3, 5).flatten(0, 2)


def clip_squares(images: Pixels, patch: Size, frames: int) -> Tensor:
    """The patches ``(N, 3, T, h, w)`` of clips ``(T, 3, H, W)`` of T `frames`; images are T equal frames."""
    if not isinstance(images, Tensor):
        if any(image.ndim == 4 for image in images):
            return torch.cat([clip_squares(image[None], patch, frames) for image in images])
        return squares(images, patch)[:, :, None].expand(-1, -1, frames, -1, -1)
    if images.ndim == 4:
        return squares(images, patch)[:, :, None].expand(-1, -1, frames, -1, -1)
    cut = squares(images.flatten(0, 1), patch).unflatten(0, (len(images), images.shape[1], -1))
    return cut.permute(0, 2, 3, 1, 4, 5).flatten(0, 1)
