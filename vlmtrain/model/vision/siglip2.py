"""Vision tower of SigLIP 2 NaFlex."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from ...visual import Pixels
from .base import as_size
from .image_attention import Segments
from .native import Grids, NativeVision, PositionTable, squares


class Siglip2NaflexVision(NativeVision):
    """Vision tower of SigLIP 2 NaFlex (2025, published code), without its final norm and its head."""

    provider = "siglip2_naflex"
    size_rule = "naflex"
    model_types = ("siglip2", "siglip2_vision_model")
    prefixes = ("vision_model.", "")
    dropped = ("post_layernorm.", "head.")

    def __init__(self, config, geometry: dict, layer: int, levels: Sequence[int] | None = None):
        from transformers.models.siglip2.modeling_siglip2 import Siglip2EncoderLayer

        super().__init__(config, geometry, layer, levels)
        self._check_geometry()
        embed = nn.Linear(config.num_channels * math.prod(self.patch_size), self.width)
        table = PositionTable(config.num_patches, self.width, align_corners=False, antialias=True)
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
