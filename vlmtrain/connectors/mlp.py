"""Token-wise projections: `linear` (LLaVA, 2023) and `mlp` (LLaVA-1.5, 2023)."""

from __future__ import annotations

from torch import Tensor, nn

from .base import Connector, VisionFeatures


class MLP(Connector):
    """`depth` linear layers with exact GELU between; one token a patch (LLaVA-1.5, section 3.2: depth 2)."""

    def __init__(self, in_dim: int, out_dim: int, depth: int = 2):
        super().__init__()
        if depth < 1:
            raise ValueError(f"connector.depth={depth}: an mlp needs at least one layer")
        self.in_dim, self.out_dim = in_dim, out_dim
        layers: list[nn.Module] = [nn.Linear(in_dim, out_dim)]
        for _ in range(depth - 1):
            layers += [nn.GELU(), nn.Linear(out_dim, out_dim)]
        self.layers = nn.Sequential(*layers)

    def output_grid(self, height: int, width: int) -> tuple[int, int]:
        return height, width

    def forward(self, features: VisionFeatures) -> Tensor:
        return self.layers(features.patches.flatten(1, 2))


def linear(in_dim: int, out_dim: int) -> MLP:
    """A single linear layer a patch (LLaVA, section 4.1)."""
    return MLP(in_dim, out_dim, depth=1)
