"""Base class of connectors: features of an `H x W` grid in, visual tokens of the language model's width out."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from .checks import check_features, require_grid, require_positive
from .published import Names, load


class VisionFeatures(NamedTuple):
    """Output of a vision encoder and input of a connector.

    patches: ``(B, H, W, C)``, raster order.
    prefix:  ``(B, P, C)``, CLS and register tokens, or None.
    levels:  additional hidden layers, shallow to deep, each shaped like ``patches``.

    This is a NamedTuple because ZeRO-3 loses the gradients of tensors that are passed inside a dataclass.
    """

    patches: Tensor
    prefix: Tensor | None = None
    levels: tuple[Tensor, ...] = ()


class Connector(nn.Module):
    """Base class of all connectors.

    A subclass reports how many tokens it makes from a grid. Its `forward` must agree with that number, because
    sequence lengths are planned before any model runs.

    in_dim:     width of the encoder's features; a tuple with one width per encoder if `several_encoders`.
    out_dim:    width of the language model.
    num_levels: number of hidden layers read from ``features.levels``, in addition to ``features.patches``.
                A connector with 0 ignores the levels.
    reads_text: whether `forward` also requires ``text_ids`` (an instruction in the connector's own
                vocabulary) and ``text_mask``.
    stands_alone: whether the connector can be trained without a language model, with `out_dim` None.
    PUBLISHED:  published names of the tensors, one entry per naming convention.
    """

    several_encoders = False
    num_levels = 0
    reads_text = False
    stands_alone = False
    PUBLISHED: tuple[Names, ...] = (Names(),)

    in_dim: int | tuple[int, ...]
    out_dim: int

    def __init__(self, in_dim: int | tuple[int, ...], out_dim: int):
        super().__init__()
        if not self.several_encoders and isinstance(in_dim, tuple | list):
            raise ValueError(
                f"connector {type(self).__name__} takes one encoder, got in_dim={in_dim!r}: pass one width, "
                "or choose a connector for several encoders (meq_former)"
            )
        require_positive(out_dim=out_dim)
        for width in in_dim if isinstance(in_dim, tuple) else (in_dim,):
            require_positive(in_dim=width)
        self.in_dim, self.out_dim = in_dim, out_dim

    def output_grid(self, height: int, width: int) -> tuple[int, int] | None:
        """Grid of the output tokens in raster order, or None if they form no grid.

        Raises ValueError for a grid that the connector does not support.
        """
        raise NotImplementedError

    def num_tokens(self, height: int, width: int) -> int:
        """Number of visual tokens for a ``height x width`` grid. Raises ValueError for an unsupported grid."""
        grid = self.output_grid(height, width)
        assert grid is not None, f"{type(self).__name__} has no output grid: override num_tokens"
        return grid[0] * grid[1]

    def check(self, features: VisionFeatures) -> Tensor:
        """Return the patches after checking rank, width, levels and grid. Raises ValueError if one does not fit."""
        if not isinstance(features, VisionFeatures):
            got = f"{len(features)} encoders" if isinstance(features, tuple | list) else type(features).__name__
            raise ValueError(
                f"connector {type(self).__name__} takes the VisionFeatures of one encoder, got {got}: "
                "choose one encoder, or a connector for several (meq_former)"
            )
        check_features(features, self.in_dim, self.num_levels)
        self.num_tokens(*features.patches.shape[1:3])
        return features.patches

    def forward(self, features: VisionFeatures) -> Tensor:
        """Map features to tokens ``(B, num_tokens, out_dim)``."""
        raise NotImplementedError

    def load_published(self, state_dict: dict[str, Tensor]) -> None:
        """Load weights under their published names, with or without the published prefix.

        Loading is strict: missing, unexpected or wrongly shaped tensors raise a ValueError that lists them. Tensors
        without a published counterpart (see each class) keep their values, with a warning.
        """
        load(self, state_dict, self.PUBLISHED)


class QueryConnector(Connector):
    """A connector whose `num_queries` learned queries read a grid of any size; its tokens form no grid."""

    num_queries: int

    def output_grid(self, height: int, width: int) -> None:
        require_grid(height, width)

    def num_tokens(self, height: int, width: int) -> int:
        self.output_grid(height, width)
        return self.num_queries
