"""Vision encoders of native resolution: Qwen2-VL, Qwen2.5-VL, Qwen3-VL and SigLIP 2 NaFlex.

They encode images of any size, each with a grid of its own, in one call. The features are those before the merger of
the published model, in raster order.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import accumulate

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

from ...connectors import Features, PackedFeatures, VisionFeatures
from ...visual import Pixels, Size
from ..loading import load_hf_config
from .base import VisionEncoder, as_size, block_index
from .checkpoint import facts, read_part, read_preprocessor
from .image_attention import NAME, Segments, register_image_attention, sent

Grids = tuple[Size, ...]


class NativeVision(VisionEncoder):
    """Base class of vision encoders of native resolution.

    config: the Hugging Face configuration of the tower; geometry: ``image_size``, ``image_mean`` and ``image_std``.
    A subclass sets `provider`, `prefixes` and `dropped` (names in a published checkpoint, see `read_part`) and
    `width_key` (of `width` in the configuration), makes its modules under their published names, and implements
    `states` and `nominal_side`.
    """

    prefixes: tuple[str, ...]
    dropped: tuple[str, ...]
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
        if NATIVE.get(config.model_type) is not cls:
            raise ValueError(f"vision.path={path} is a model of the type {config.model_type}: use vision=hf")
        config = getattr(config, "vision_config", config)
        preprocessor, look = read_preprocessor(path, image_mean, image_std)
        geometry = {"image_size": image_size or cls.nominal_side(config, preprocessor), **look}
        if not weights:
            return cls(config, geometry, layer, levels).to(dtype)
        with torch.device("meta"):
            encoder = cls(config, geometry, layer, levels)
        own = encoder.state_dict()
        encoder.load_state_dict(read_part(path, own, cls.prefixes, cls.dropped, cls.__name__), assign=True)
        return encoder.to(dtype)

    @staticmethod
    def nominal_side(config, preprocessor: Mapping) -> int:
        """Side in pixels of the images that stand for those of any size."""
        raise NotImplementedError

    def _resize(self, before: Size) -> None:
        self.geometry = {**self.geometry, "image_size": list(self.image_size)}

    def encode(self, pixels: Pixels, calls: int = 1) -> Features:
        """As `VisionEncoder.encode`, but every module is called once, whatever the sizes; `calls` is ignored."""
        return self(pixels)

    def forward(self, images: Pixels) -> Features:
        """Map normalized images to features, `PackedFeatures` for images of their own sizes.

        Raises ValueError for an image whose sides are not multiples of the patch size and `multiple`.
        """
        sizes = [images.shape[2:]] * len(images) if isinstance(images, Tensor) else [each.shape[1:] for each in images]
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


class QwenVision(NativeVision):
    """Base class of the towers of Qwen-VL.

    A patch is two equal frames, embedded by one matrix. Attention has rotary positions, which count from 0 in each
    image. Patches are processed in the published order, squares of `multiple` x `multiple` patches.

    window: side of the windows of attention in such squares; None means that every block sees the complete image.
    """

    prefixes = ("model.visual.", "visual.")
    dropped = ("merger.", "deepstack_merger_list.")
    multiple = 2
    bias = False
    window: int | None = None

    def __init__(self, config, geometry: dict, layer: int, levels: Sequence[int] | None = None):
        super().__init__(config, geometry, layer, levels)
        self.multiple = config.spatial_merge_size
        self._check_geometry()
        kernel = (config.temporal_patch_size, *self.patch_size)
        self.frames, self.head_width = config.temporal_patch_size, self.width // config.num_attention_heads
        self.patch_embed = nn.ModuleDict({"proj": PatchProjection(config.in_channels, self.width, kernel, self.bias)})
        self.blocks = nn.ModuleList(self._block() for _ in range(self.num_blocks))

    def _block(self) -> nn.Module:
        raise NotImplementedError

    @staticmethod
    def nominal_side(config, preprocessor: Mapping) -> int:
        """448, rounded to whole squares of patches."""
        step = as_size(config.patch_size)[0] * config.spatial_merge_size
        return max(1, round(448 / step)) * step

    def states(self, images: Pixels, grids: Grids, wanted: set[int]) -> dict[int, Tensor]:
        lengths = [height * width for height, width in grids]
        windows = [self._windows(grid) for grid in grids]
        order = [torch.cat(own) for own in windows]
        device = images[0].device
        rotation = self._rotation(order, grids, device)
        order = torch.cat([start + own for start, own in zip(accumulate(lengths, initial=0), order)])
        inverse = sent(order.argsort(), device)
        within_images = Segments.of(lengths, device)
        within_windows = Segments.of([len(window) for own in windows for window in own], device)
        # transformers' attention splits the row at these, with a wait for a GPU unless they are on the host
        one_piece = torch.tensor([0, sum(lengths)], device="cpu")

        x = self._embed(squares(images, self.patch_size), grids).index_select(0, sent(order, device))
        states = {}
        for index, block in zip(range(max(wanted) + 1), self.blocks):
            segments = within_images if self._sees_image(index) else within_windows
            x = block(x, cu_seqlens=one_piece, position_embeddings=rotation, segments=segments)
            if index in wanted:
                states[index] = x.index_select(0, inverse)
        return states

    def _embed(self, patches: Tensor, grids: Grids) -> Tensor:
        frames = patches[:, :, None].expand(-1, -1, self.frames, -1, -1)
        return self.patch_embed["proj"](frames.flatten(1))

    def _sees_image(self, block: int) -> bool:
        """Whether a block attends over complete images, not windows."""
        return True

    def _windows(self, grid: Size) -> list[Tensor]:
        """Indices in raster order of the patches of each window, on the host; windows at the border are smaller."""
        (height, width), side = grid, self.multiple
        patches = torch.arange(height * width, device="cpu")
        cells = patches.view(height // side, side, width // side, side).transpose(1, 2).flatten(2)
        if self.window is None:
            return [cells.flatten()]
        bands = cells.split(self.window)
        return [window.flatten() for band in bands for window in band.split(self.window, dim=1)]

    def _rotation(self, order: Sequence[Tensor], grids: Grids, device: torch.device) -> tuple[Tensor, Tensor]:
        """Cosines and sines ``(N, d)`` of the rotary positions, float32; half of the angles turn with the row."""
        positions = [torch.stack([own // width, own % width], 1) for own, (_, width) in zip(order, grids, strict=True)]
        half = self.head_width // 2
        exponents = torch.arange(0, half, 2, device=device, dtype=torch.float32) / half
        frequencies = self.config.rope_parameters["rope_theta"] ** -exponents
        angles = (sent(torch.cat(positions), device)[..., None] * frequencies).flatten(1)
        angles = torch.cat([angles, angles], 1)
        return angles.cos(), angles.sin()


class Qwen2VLVision(QwenVision):
    """Vision tower of Qwen2-VL (2024, published code)."""

    provider = "qwen2_vl"
    width_key = "embed_dim"  # its hidden_size is the width of the language model

    def _block(self) -> nn.Module:
        from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLVisionBlock

        return Qwen2VLVisionBlock(self.config)


class Qwen25VLVision(QwenVision):
    """Vision tower of Qwen2.5-VL, most of whose blocks attend within windows (2025, published code)."""

    provider = "qwen2_5_vl"

    def __init__(self, config, geometry: dict, layer: int, levels: Sequence[int] | None = None):
        super().__init__(config, geometry, layer, levels)
        self.window = config.window_size // config.spatial_merge_size // self.patch_size[0]

    def _block(self) -> nn.Module:
        from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLVisionBlock

        return Qwen2_5_VLVisionBlock(self.config)

    def _sees_image(self, block: int) -> bool:
        return block in self.config.fullatt_block_indexes


class Qwen3VLVision(QwenVision):
    """Vision tower of Qwen3-VL, with an interpolated position table (2025, published code).

    Its DeepStack features are `levels`, which a connector such as `qwen3_vl_merger` reads.
    """

    provider = "qwen3_vl"
    bias = True

    def __init__(self, config, geometry: dict, layer: int, levels: Sequence[int] | None = None):
        super().__init__(config, geometry, layer, levels)
        self.pos_embed = PositionTable(config.num_position_embeddings, self.width, align_corners=True)

    def _block(self) -> nn.Module:
        from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionBlock

        return Qwen3VLVisionBlock(self.config)

    def _embed(self, patches: Tensor, grids: Grids) -> Tensor:
        x = super()._embed(patches, grids)
        return x + self.pos_embed(grids).to(x.dtype)


class Siglip2NaflexVision(NativeVision):
    """Vision tower of SigLIP 2 NaFlex (2025, published code), without its final norm and its head."""

    provider = "siglip2_naflex"
    prefixes = ("vision_model.", "")
    dropped = ("post_layernorm.", "head.")

    def __init__(self, config, geometry: dict, layer: int, levels: Sequence[int] | None = None):
        from transformers.models.siglip2.modeling_siglip2 import Siglip2EncoderLayer

        super().__init__(config, geometry, layer, levels)
        self._check_geometry()
        embed = nn.Linear(config.num_channels * math.prod(self.patch_size), self.width)
        table = PositionTable(config.num_patches, self.width, align_corners=False)
        self.embeddings = nn.ModuleDict({"patch_embedding": embed, "position_embedding": table})
        layers = nn.ModuleList(Siglip2EncoderLayer(self.config) for _ in range(self.num_blocks))
        self.encoder = nn.ModuleDict({"layers": layers})

    @staticmethod
    def nominal_side(config, preprocessor: Mapping) -> int:
        """The side of a square image with the published maximum number of patches."""
        most = preprocessor.get("max_num_patches") or config.num_patches
        return math.isqrt(most) * as_size(config.patch_size)[0]

    def states(self, images: Pixels, grids: Grids, wanted: set[int]) -> dict[int, Tensor]:
        rows = squares(images, self.patch_size).permute(0, 2, 3, 1).flatten(1)
        x = self.embeddings["patch_embedding"](rows)
        x = (x + self.embeddings["position_embedding"](grids).to(x.dtype))[None]
        segments, states = Segments.of([height * width for height, width in grids], x.device), {}
        for index, layer in zip(range(max(wanted) + 1), self.encoder["layers"]):
            x = layer(x, attention_mask=segments)
            if index in wanted:
                states[index] = x[0]
        return states


class PatchProjection(nn.Conv3d):
    """A convolution whose kernel is one patch, as a matrix product of rows ``(N, C * T * h * w)`` -> ``(N, D)``.

    ``nn.Conv3d`` itself can be slower by orders of magnitude (transformers issue 45750).
    """

    def __init__(self, channels: int, width: int, kernel: tuple[int, int, int], bias: bool):
        super().__init__(channels, width, kernel, stride=kernel, bias=bias)

    def forward(self, rows: Tensor) -> Tensor:
        return F.linear(rows, self.weight.flatten(1), self.bias)


class PositionTable(nn.Embedding):
    """A square table of positions, interpolated bilinearly to the grid of each image.

    align_corners: as in `torch.nn.functional.interpolate`; if False, interpolation to a smaller grid is antialiased.
    """

    def __init__(self, positions: int, width: int, align_corners: bool):
        super().__init__(positions, width)
        self.align_corners = align_corners

    def forward(self, grids: Grids) -> Tensor:
        """Positions ``(N, C)`` of the patches of all grids in raster order, at least float32."""
        side = math.isqrt(self.num_embeddings)
        table = self.weight.to(torch.promote_types(self.weight.dtype, torch.float32)).unflatten(0, (side, side))

        def along(size: int) -> Tensor:
            return sent(_interpolation(size, side, self.align_corners), table.device).to(table.dtype)

        found = {
            grid: torch.einsum("hs,wt,stc->hwc", along(grid[0]), along(grid[1]), table) for grid in dict.fromkeys(grids)
        }
        return torch.cat([found[grid].flatten(0, 1) for grid in grids])


@lru_cache(maxsize=1024)
def _interpolation(size: int, side: int, align_corners: bool) -> Tensor:
    """Weights ``(size, side)`` with which `side` points are interpolated to `size` points, on the host."""
    targets, points = (torch.arange(count, dtype=torch.float64, device="cpu") for count in (size, side))
    if align_corners:
        at, reach = targets * (side - 1) / max(size - 1, 1), 1.0
    else:
        at, reach = (targets + 0.5) * side / size - 0.5, max(side / size, 1.0)
    weights = (1 - (points - at[:, None]).abs() / reach).clamp(min=0)
    return (weights / weights.sum(1, keepdim=True)).float()


def squares(images: Pixels, patch: Size) -> Tensor:
    """The patches ``(N, 3, h, w)`` of images, one after another, each in raster order."""
    if not isinstance(images, Tensor):
        return torch.cat([squares(image[None], patch) for image in images])
    cut = images.unflatten(3, (-1, patch[1])).unflatten(2, (-1, patch[0]))
    return cut.permute(0, 2, 4, 1, 3, 5).flatten(0, 2)


NATIVE: dict[str, type[NativeVision]] = {
    "qwen2_vl": Qwen2VLVision,
    "qwen2_5_vl": Qwen25VLVision,
    "qwen3_vl": Qwen3VLVision,
    "siglip2": Siglip2NaflexVision,
    "siglip2_vision_model": Siglip2NaflexVision,
}
