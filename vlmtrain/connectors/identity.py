"""`identity`: the features themselves, for layers of the language model that read them (IDEFICS, 2023)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .base import Connector, VisionFeatures
from .checks import require_grid
from .published import Names


class Identity(Connector):
    """One token per patch, after `prefix` tokens for those before the patches (CLS).

    ``(B, H, W, in_dim)`` -> ``(B, prefix + H*W, out_dim)``. A linear layer follows unless in_dim equals out_dim, as it
    does with ``fusion=gated_cross_attention``; the connector then has no weights.
    """

    PUBLISHED = (Names(unpublished=r"^proj\."),)

    def __init__(self, in_dim: int, out_dim: int, prefix: int = 0):
        super().__init__(in_dim, out_dim)
        if type(prefix) is not int or prefix < 0:
            raise ValueError(f"connector.prefix={prefix}: expected a whole number of at least 0")
        self.prefix = prefix
        self.proj = nn.Identity() if in_dim == out_dim else nn.Linear(in_dim, out_dim)

    def output_grid(self, height: int, width: int) -> tuple[int, int] | None:
        require_grid(height, width)
        return None if self.prefix else (height, width)

    def num_tokens(self, height: int, width: int) -> int:
        require_grid(height, width)
        return self.prefix + height * width

    def forward(self, features: VisionFeatures) -> Tensor:
        tokens = self.check(features).flatten(1, 2)
        if self.prefix:
            found = 0 if features.prefix is None else features.prefix.shape[1]
            if found != self.prefix:
                raise ValueError(f"connector.prefix={self.prefix}: the encoder has {found} tokens before its patches")
            tokens = torch.cat([features.prefix, tokens], dim=1)
        return self.proj(tokens)
