"""What a connector is: features of an `H x W` grid in, visual tokens of the language model's width out."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn


class VisionFeatures(NamedTuple):
    """What a vision encoder hands to a connector.

    patches: ``(B, H, W, C)``, raster order.
    prefix:  ``(B, P, C)``, CLS and register tokens, or None.
    levels:  further hidden layers, shallow to deep, each shaped like ``patches``.

    A NamedTuple, because ZeRO-3 loses gradients of tensors that travel inside a dataclass.
    """

    patches: Tensor
    prefix: Tensor | None = None
    levels: tuple[Tensor, ...] = ()


class Connector(nn.Module):
    """Base of all connectors.

    A subclass sets `in_dim` and `out_dim` and says how many tokens it makes from a grid; its
    `forward` must agree, because sequence lengths are planned before any model runs.
    """

    in_dim: int | tuple[int, ...]
    out_dim: int

    def output_grid(self, height: int, width: int) -> tuple[int, int] | None:
        """Grid of the output tokens in raster order, or None where they form none."""
        raise NotImplementedError

    def num_tokens(self, height: int, width: int) -> int:
        """Number of visual tokens made from a ``height x width`` grid. Raises ValueError for a grid it cannot take."""
        grid = self.output_grid(height, width)
        assert grid is not None, f"{type(self).__name__} has no output grid: override num_tokens"
        return grid[0] * grid[1]

    def forward(self, features: VisionFeatures) -> Tensor:
        """Features to ``(B, num_tokens, out_dim)``."""
        raise NotImplementedError

    def load_published(self, state_dict: dict[str, Tensor]) -> None:
        """Load weights under their published names, with or without the published prefix.

        Strict: missing, unexpected or wrongly shaped tensors raise a ValueError that names them.
        """
        raise NotImplementedError
