"""Vision towers of Qwen2-VL, Qwen2.5-VL and Qwen3-VL."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...visual import Pixels, Size
from .base import as_size
from .image_attention import Segments, sent
from .native import Grids, NativeVision, PositionTable, clip_squares


class QwenVision(NativeVision):
    """Base class of the towers of Qwen-VL.

    A patch is two frames, embedded by one matrix; those of an image are equal. Attention has rotary positions, which
    count from 0 in each image. Patches are processed in the published order: squares of `multiple` x `multiple`.

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
        self.frames_per_item, self.head_width = config.temporal_patch_size, self.width // config.num_attention_heads
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

        x = self._embed(clip_squares(images, self.patch_size, self.frames_per_item), grids).index_select(
            0, sent(order, device)
        )
        states = {}
        for index, block in zip(range(max(wanted) + 1), self.blocks):
            segments = within_images if self._sees_image(index) else within_windows
            x = block(x, cu_seqlens=one_piece, position_embeddings=rotation, segments=segments)
            if index in wanted:
                states[index] = x.index_select(0, inverse)
        return states

    def _embed(self, patches: Tensor, grids: Grids) -> Tensor:
        return self.patch_embed["proj"](patches.flatten(1))

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
    model_types = ("qwen2_vl",)
    width_key = "embed_dim"  # its hidden_size is the width of the language model

    def _block(self) -> nn.Module:
        from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLVisionBlock

        return Qwen2VLVisionBlock(self.config)


class Qwen25VLVision(QwenVision):
    """Vision tower of Qwen2.5-VL, most of whose blocks attend within windows (2025, published code)."""

    provider = "qwen2_5_vl"
    model_types = ("qwen2_5_vl",)

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
    model_types = ("qwen3_vl",)
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


class PatchProjection(nn.Conv3d):
    """A convolution whose kernel is one patch, as a matrix product of rows ``(N, C * T * h * w)`` -> ``(N, D)``.

    ``nn.Conv3d`` itself can be slower by orders of magnitude (transformers issue 45750).
    """

    def __init__(self, channels: int, width: int, kernel: tuple[int, int, int], bias: bool):
        super().__init__(channels, width, kernel, stride=kernel, bias=bias)

    def forward(self, rows: Tensor) -> Tensor:
        return F.linear(rows, self.weight.flatten(1), self.bias)
