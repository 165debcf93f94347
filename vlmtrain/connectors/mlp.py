"""Token-wise projections: `linear` (LLaVA, 2023) and `mlp` (LLaVA-1.5, 2023)."""

from __future__ import annotations

from torch import Tensor

from .base import Connector, PackedFeatures, VisionFeatures
from .checks import require_choice, require_grid, require_positive
from .layers import ACTIVATIONS, mlp
from .published import Names


class MLP(Connector):
    """`depth` linear layers with activations in between; one token per patch (LLaVA-1.5, section 3.2: depth 2, GELU).

    ``(B, H, W, in_dim)`` -> ``(B, H*W, out_dim)``. Hidden layers are `hidden_dim` wide (None: out_dim), or a
    list has the width of each (Prismatic: 4 * in_dim, out_dim).
    """

    PUBLISHED = (
        Names("model.mm_projector.", ((r"^layers\.", ""),)),
        Names("model.multi_modal_projector.", ((r"^layers\.(\d+)", lambda match: f"linear_{int(match[1]) // 2 + 1}"),)),
        Names("", ((r"^layers\.(\d+)", lambda match: f"proj{int(match[1]) // 2 + 1}"),)),  # KempnerForge
    )

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        depth: int = 2,
        hidden_dim: int | list[int] | None = None,
        activation: str = "gelu",
    ):
        super().__init__(in_dim, out_dim)
        require_positive(depth=depth)
        each = out_dim if hidden_dim is None else hidden_dim
        widths = list(each) if isinstance(each, list | tuple) else [each] * (depth - 1)
        for width in widths:
            require_positive(hidden_dim=width)
        if len(widths) != depth - 1:
            raise ValueError(
                f"connector.hidden_dim={widths}: expected one width, or one for each of the {depth - 1} hidden "
                f"layers of connector.depth={depth}"
            )
        require_choice(activation, ACTIVATIONS, "activation")
        self.layers = mlp([in_dim, *widths, out_dim], ACTIVATIONS[activation])

    def output_grid(self, height: int, width: int) -> tuple[int, int]:
        require_grid(height, width)
        return height, width

    def forward(self, features: VisionFeatures) -> Tensor:
        return self.layers(self.check(features).flatten(1, 2))

    def forward_packed(self, features: PackedFeatures, calls: int = 0) -> Tensor:
        return self.layers(self.check(features))


class Linear(MLP):
    """One linear layer per patch (LLaVA, section 4.1; Fuyu, whose patches are pixels)."""

    PUBLISHED = (
        Names("model.mm_projector.", ((r"^layers\.0\.", ""),)),
        Names("model.vision_embed_tokens.", ((r"^layers\.0\.", ""),)),  # Fuyu
        *MLP.PUBLISHED,
    )

    def __init__(self, in_dim: int, out_dim: int):
        super().__init__(in_dim, out_dim, depth=1)
