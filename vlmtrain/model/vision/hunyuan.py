"""Vision tower of HunyuanOCR."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...visual import Pixels
from .base import as_size
from .image_attention import Segments
from .native import Grids, NativeVision, PositionTable, squares


class HunyuanVision(NativeVision):
    """Vision tower of HunyuanOCR, with an interpolated position table (2025, published code).

    Raises ValueError for an interpolation that is not bilinear.
    """

    provider = "hunyuan_vl"
    model_types = ("hunyuan_vl",)
    prefixes = ("model.vision_tower.", "vit.", "model.vit.")
    dropped = ("patch_merger.", "perceive.")
    renames = (
        (r"\.mlp\.dense_h_to_4h\.", ".mlp.fc1."),
        (r"\.mlp\.dense_4h_to_h\.", ".mlp.fc2."),
        (r"\.input_layernorm\.", ".layer_norm1."),
        (r"\.post_attention_layernorm\.", ".layer_norm2."),
    )

    def __init__(self, config, geometry: dict, layer: int, levels: Sequence[int] | None = None):
        from transformers.models.hunyuan_vl.modeling_hunyuan_vl import HunYuanVLVisionBlock

        if config.interpolate_mode != "bilinear":
            raise ValueError(f"vision_config.interpolate_mode={config.interpolate_mode}: expected bilinear")
        super().__init__(config, geometry, layer, levels)
        self._check_geometry()
        side = config.max_image_size // config.patch_size
        table = PositionTable(side**2, self.width, align_corners=False, unused=1)
        embed = PatchMatrix(config.num_channels, self.width, self.patch_size, stride=self.patch_size)
        self.embeddings = nn.ModuleDict({"patch_embedding": embed, "position_embedding": table})
        self.layers = nn.ModuleList(HunYuanVLVisionBlock(self.config) for _ in range(self.num_blocks))

    @staticmethod
    def nominal_side(config, preprocessor: Mapping) -> int:
        """The published smallest side, rounded to whole squares of patches."""
        step = as_size(config.patch_size)[0] * config.spatial_merge_size
        return max(1, round(config.min_image_size / step)) * step

    def states(self, images: Pixels, grids: Grids, wanted: set[int]) -> dict[int, Tensor]:
        x = self.embeddings["patch_embedding"](squares(images, self.patch_size))
        x = (x + self.embeddings["position_embedding"](grids).to(x.dtype))[None]
        lengths = [height * width for height, width in grids]
        segments, states = Segments.of(lengths, x.device), {}
        # transformers' attention splits the row at these, with a wait for a GPU unless they are on the host
        one_piece = torch.tensor([0, sum(lengths)], device="cpu")
        for index, layer in zip(range(max(wanted) + 1), self.layers):
            x = layer(x, attention_mask=None, cu_seqlens=one_piece, segments=segments)
            if index in wanted:
                states[index] = x[0]
        return states


class PatchMatrix(nn.Conv2d):
    """A convolution whose kernel is one patch, as a matrix product of patches ``(N, C, h, w)`` -> ``(N, D)``."""

    def forward(self, patches: Tensor) -> Tensor:
        return F.linear(patches.flatten(1), self.weight.flatten(1), self.bias)
