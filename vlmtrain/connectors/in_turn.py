"""One connector for each of several encoders."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .base import Connector, VisionFeatures
from .checks import GridError


class ConnectorsInTurn(Connector):
    """Connectors of several encoders, whose tokens follow one another in the order of the encoders.

    grids: ``(H, W)`` of the encoders, which are fixed.
    """

    several_encoders = True

    def __init__(self, connectors: Sequence[Connector], grids: Sequence[Sequence[int]]):
        super().__init__(tuple(each.in_dim for each in connectors), connectors[0].out_dim)
        if any(each.num_added for each in connectors):
            raise ValueError(
                f"vision.join=tokens: {type(connectors[0]).__name__} adds levels to the language model, which only a "
                "connector of one encoder can"
            )
        self.connectors = nn.ModuleList(connectors)
        self.grids = [tuple(grid) for grid in grids]
        self.num_levels, self.reads_text = connectors[0].num_levels, connectors[0].reads_text

    def output_grid(self, height: int, width: int) -> None:
        """None, as the tokens of several grids form none. The size is that of the first encoder's grid."""
        if (height, width) != self.grids[0]:
            expected = "x".join(map(str, self.grids[0]))
            raise GridError(
                f"vision.join=tokens: expected a {expected} grid of the first encoder, got {height}x{width}"
            )

    def num_tokens(self, height: int, width: int) -> int:
        self.output_grid(height, width)
        return sum(each.num_tokens(*grid) for each, grid in zip(self.connectors, self.grids, strict=True))

    def check_encoders(self, features: tuple[VisionFeatures, ...]) -> tuple[VisionFeatures, ...]:
        return features  # each connector checks its own

    def forward(self, features: tuple[VisionFeatures, ...], **text: Tensor | None) -> Tensor:
        each = zip(self.connectors, features, strict=True)
        return torch.cat([connector(own, **text) for connector, own in each], dim=1)
