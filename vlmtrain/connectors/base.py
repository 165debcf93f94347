"""Base class of connectors: features of an `H x W` grid in, visual tokens of the language model's width out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, NamedTuple

import torch
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

    grids = None  # not a field: all images have the grid of `patches`

    def to(self, *args, **options) -> VisionFeatures:
        """With tensors that are converted as by `Tensor.to`."""
        return _each(self, lambda tensor: tensor.to(*args, **options))


class PackedFeatures(NamedTuple):
    """Features of images with unequal grids.

    patches: ``(N, C)``, the patches of all images one after another, each in raster order.
    grids:   ``(H, W)`` of each image; N is the sum of ``H * W``.
    prefix:  ``(B, P, C)`` of B images, CLS and register tokens, or None.
    levels:  additional hidden layers, shallow to deep, each shaped like ``patches``.

    This is a NamedTuple for the same reason as `VisionFeatures`.
    """

    patches: Tensor
    grids: tuple[tuple[int, int], ...]
    prefix: Tensor | None = None
    levels: tuple[Tensor, ...] = ()

    def to(self, *args, **options) -> PackedFeatures:
        """With tensors that are converted as by `Tensor.to`."""
        return _each(self, lambda tensor: tensor.to(*args, **options))

    def batch(self, images: Sequence[int]) -> VisionFeatures:
        """The features of some images, which must have the same grid."""
        sizes, grid = [height * width for height, width in self.grids], self.grids[images[0]]

        def stacked(x: Tensor) -> Tensor:
            return _rows(x.split(sizes), images).unflatten(1, grid)

        prefix = None if self.prefix is None else _rows(self.prefix, images)
        return VisionFeatures(stacked(self.patches), prefix, tuple(map(stacked, self.levels)))


Features = VisionFeatures | PackedFeatures


def are_several(features: Any) -> bool:
    """Whether these are the features of several encoders, a tuple, rather than those of one."""
    return isinstance(features, tuple | list) and not isinstance(features, Features)


def _each(features: Features, change: Callable[[Tensor], Tensor]) -> Features:
    prefix = None if features.prefix is None else change(features.prefix)
    return features._replace(
        patches=change(features.patches), prefix=prefix, levels=tuple(map(change, features.levels))
    )


def _dispatching(forward: Callable) -> Callable:
    """Let a `forward` pass packed features to `forward_packed`, inside the module's call and therefore its hooks."""

    @wraps(forward)
    def dispatch(self, *args, **options):
        features = args[0] if args else options.get("features")
        encoders = features if are_several(features) else (features,)
        if encoders and all(isinstance(encoder, PackedFeatures) for encoder in encoders):
            return self.forward_packed(*args, **options)
        return forward(self, *args, **options)

    return dispatch


def _rows(x: Tensor | Sequence[Tensor], rows: Sequence[int]) -> Tensor:
    return torch.stack([x[row] for row in rows])


def _tensors(output: Any) -> tuple[Tensor, ...]:
    """The tensors of an output: the tokens, followed by the levels if there are any."""
    return (output[0], *output[1]) if isinstance(output, tuple) else (output,)


def _blank(features: VisionFeatures) -> VisionFeatures:
    """Zeros that require gradients where the features do, because the backward passes of ranks must also agree."""

    def zeros(x: Tensor) -> Tensor:
        return torch.zeros_like(x, requires_grad=x.requires_grad)

    return _each(features, zeros)


class Connector(nn.Module):
    """Base class of all connectors.

    A subclass reports how many tokens it makes from a grid. Its `forward` must agree with that number, because
    sequence lengths are planned before any model runs.

    in_dim:     width of the encoder's features; a tuple with one width per encoder if `several_encoders`.
    out_dim:    width of the language model.
    num_levels: number of hidden layers read from ``features.levels``, in addition to ``features.patches``.
                A connector with 0 ignores the levels.
    num_added:  number of levels returned beside the tokens, for the first blocks of the language model.
    joins:      whether `forward` also requires the `placements` of the items, and `frames` and `calls` of a `Visual`.
    takes_window: whether `forward` and `output_grid` take another `window` than the connector's own.
    reads_text: whether `forward` also requires ``text_ids`` (an instruction in the connector's own
                vocabulary) and ``text_mask``.
    stands_alone: whether the connector can be trained without a language model, with `out_dim` None.
    multiple:   both sides of a patch grid should be multiples of this; images of their own size are rounded to it.
    PUBLISHED:  published names of the tensors, one entry per naming convention.
    """

    several_encoders = False
    num_levels = 0
    num_added = 0
    joins = False
    takes_window = False
    reads_text = False
    stands_alone = False
    multiple = 1
    PUBLISHED: tuple[Names, ...] = (Names(),)

    in_dim: int | tuple[int, ...]
    out_dim: int

    def __init_subclass__(cls, **options):
        super().__init_subclass__(**options)
        if "forward" in cls.__dict__:
            if "forward_packed" not in cls.__dict__:  # an inherited one may not call this class's forward
                cls.forward_packed = Connector.forward_packed
            cls.forward = _dispatching(cls.forward)

    def __init__(self, in_dim: int | tuple[int, ...], out_dim: int):
        super().__init__()
        if not self.several_encoders and isinstance(in_dim, tuple | list):
            raise ValueError(
                f"connector {type(self).__name__} takes one encoder, got in_dim={in_dim!r}: pass one width, "
                "or choose a connector for several encoders (meq_former, spatial_aggregator)"
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

    def framed_grid(self, height: int, width: int) -> tuple[int, int] | None:
        """Grid of the output tokens other than the first and the last, for a connector that adds these two; or None."""
        return None

    def num_tokens(self, height: int, width: int) -> int:
        """Number of visual tokens for a ``height x width`` grid. Raises ValueError for an unsupported grid."""
        grid = self.output_grid(height, width)
        assert grid is not None, f"{type(self).__name__} has no output grid: override num_tokens"
        return grid[0] * grid[1]

    def check_grid(self, height: int, width: int, encoder: int = 0) -> None:
        """Raise ValueError for a grid that the connector does not support from the encoder with this index."""
        self.num_tokens(height, width)

    def check(self, features: Features) -> Tensor:
        """Return the patches after checking rank, width, levels and grids. Raises ValueError if one does not fit."""
        return self.check_encoders(features)[0].patches

    def check_encoders(self, features: Features | tuple[Features, ...]) -> tuple[Features, ...]:
        """Return the features of each encoder after checking their number and, as `check` does, each of them."""
        name, one = type(self).__name__, isinstance(features, Features)
        if not one and not self.several_encoders:
            got = f"{len(features)} encoders" if isinstance(features, tuple | list) else type(features).__name__
            raise ValueError(
                f"connector {name} takes the VisionFeatures of one encoder, got {got}: "
                "choose one encoder, or a connector for several (meq_former, spatial_aggregator)"
            )
        encoders = (features,) if one else tuple(features)
        widths = self.in_dim if isinstance(self.in_dim, tuple) else (self.in_dim,)
        if len(encoders) != len(widths):
            raise ValueError(
                f"connector {name} was built for {len(widths)} encoders (in_dim={self.in_dim}), "
                f"got features of {len(encoders)}"
            )
        for i, (encoder, width) in enumerate(zip(encoders, widths, strict=True)):
            check_features(encoder, width, self.num_levels)
            for grid in encoder.grids or (encoder.patches.shape[1:3],):
                self.check_grid(*grid, encoder=i)
        images = [len(encoder.grids or encoder.patches) for encoder in encoders]
        if len(set(images)) > 1:
            raise ValueError(f"connector {name}: expected the same images from each encoder, got {images} images")
        return encoders

    def forward(self, features: VisionFeatures) -> Tensor:
        """Map features to tokens ``(B, num_tokens, out_dim)``.

        A subclass never gets `PackedFeatures` here: they go to `forward_packed`.
        """
        raise NotImplementedError

    def forward_packed(
        self, features: PackedFeatures | tuple[PackedFeatures, ...], calls: int = 0, **text: Tensor | None
    ) -> Tensor | tuple[Tensor, tuple[Tensor, ...]]:
        """Map packed features to the tokens of all images in their order, ``(K, out_dim)``.

        A connector whose `forward` returns tokens and levels returns a pair of such tensors and a tuple of them. text:
        ``text_ids`` and ``text_mask`` with one row per image, for a connector that reads text.

        By default, images are grouped by grid and `forward` is called once per group. With ZeRO-3 all ranks must call
        each module equally often: if `calls` is larger than the number of groups, the missing calls are made on zeros,
        without an effect on the tokens. Connectors that map all grids in one call ignore `calls`.
        """
        encoders = self.check_encoders(features)

        def call(batch: tuple[VisionFeatures, ...], images: Sequence[int]):
            rows = {name: None if value is None else _rows(value, images) for name, value in text.items()}
            return self.forward(batch[0] if isinstance(features, PackedFeatures) else batch, **rows)

        grids = list(zip(*(encoder.grids for encoder in encoders), strict=True))
        groups = {grid: [image for image, own in enumerate(grids) if own == grid] for grid in sorted(set(grids))}
        parts: list[tuple[Tensor, ...]] = [()] * len(grids)
        for images in groups.values():
            output = call(tuple(encoder.batch(images) for encoder in encoders), images)
            for image, *own in zip(images, *_tensors(output), strict=True):
                parts[image] = own
        tokens, *levels = (torch.cat(part) for part in zip(*parts, strict=True))

        smallest = min(groups, key=lambda grid: sum(height * width for height, width in grid))
        for _ in range(len(groups), calls):
            blank = call(tuple(_blank(encoder.batch(groups[smallest][:1])) for encoder in encoders), [0])
            for part in _tensors(blank):
                tokens = tokens + (0.0 * part).sum()  # keeps the call in the graph
        return (tokens, tuple(levels)) if isinstance(output, tuple) else tokens

    def load_published(self, state_dict: dict[str, Tensor]) -> None:
        """Load weights under their published names, with or without the published prefix.

        Loading is strict: missing, unexpected or wrongly shaped tensors raise a ValueError that lists them. Tensors
        without a published counterpart (see each class) keep their values, with a warning.
        """
        load(self, state_dict, self.PUBLISHED)


class OneCallConnector(Connector):
    """A connector that maps images with unequal grids in one call, with the same code as a batch of equal ones."""

    def tokens(self, features: Features, **text: Tensor | None) -> Tensor | tuple[Tensor, tuple[Tensor, ...]]:
        """Map features to tokens ``(B, num_tokens, out_dim)``, or packed features to ``(K, out_dim)``."""
        raise NotImplementedError

    def forward(self, features: VisionFeatures, *args, **text):
        return self.tokens(features, *args, **text)

    def forward_packed(self, features: PackedFeatures, calls: int = 0, **text):
        return self.tokens(features, **text)


class QueryConnector(OneCallConnector):
    """A connector whose `num_queries` learned queries read a grid of any size. By default its tokens form no grid.

    `tokens` is ``(B, num_queries, out_dim)`` for packed features too.
    """

    num_queries: int

    def output_grid(self, height: int, width: int) -> tuple[int, int] | None:
        require_grid(height, width)

    def num_tokens(self, height: int, width: int) -> int:
        self.output_grid(height, width)
        return self.num_queries

    def forward_packed(self, features: PackedFeatures, calls: int = 0, **text) -> Tensor:
        return self.tokens(features, **text).flatten(0, 1)
