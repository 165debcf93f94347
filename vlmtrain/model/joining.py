"""A connector whose tokens are joined: those of an image's tiles in one grid, and those of a video's frames.

features of all items --connector--> tokens of each item --pool, newlines--> tokens of each placement
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..connectors import Features, VisionFeatures
from ..connectors.base import are_several
from ..frames import Joining
from ..tiling import Tiles, kept_grid, shown_part
from ..visual import Placement


class JoiningConnector(nn.Module):
    """Applies `connector` to every item, and joins the tokens of the items of each placement.

    Tiles form one grid with a newline after each row (LLaVA-NeXT, published code, ``image_newline``); if the tokens of
    the connector form no grid, those of all items are concatenated without newlines. Frames of a video are joined as
    their `Joining` says. Levels for the language model are joined like the tokens; at newlines they are zero.

    newline: whether it has a newline, a learned token.
    """

    joins = True

    def __init__(self, connector: nn.Module, newline: bool = True):
        super().__init__()
        self.connector = connector
        self.in_dim, self.out_dim, self.num_levels = connector.in_dim, connector.out_dim, connector.num_levels
        self.num_added, self.multiple = connector.num_added, connector.multiple
        self.reads_text, self.takes_window = connector.reads_text, connector.takes_window
        initial = torch.randn(connector.out_dim) / connector.out_dim**0.5 if newline else None
        self.newline = None if initial is None else nn.Parameter(initial)

    @property
    def config(self) -> dict:
        return {**self.connector.config, "newline": self.newline is not None}

    def num_tokens(self, height: int, width: int) -> int:
        return self.connector.num_tokens(height, width)

    def output_grid(self, height: int, width: int, **window: int) -> tuple[int, int] | None:
        return self.connector.output_grid(height, width, **window)

    def framed_grid(self, height: int, width: int) -> tuple[int, int] | None:
        return self.connector.framed_grid(height, width)

    def forward(
        self, features: Features, placements: Sequence[Placement] = (), frames: Joining | None = None, **options
    ) -> Tensor | tuple[Tensor, tuple[Tensor, ...]]:
        """Tokens ``(V, n, D)`` of V items, or ``(K, D)`` if those of some of the `placements` are joined.

        frames: see `vlmtrain.visual.Visual`. options: further arguments of the connector. A connector with levels for
        the language model returns a pair.
        """
        if frames is None and not any(placement.tiles or placement.frames for placement in placements):
            found = self.connector(features, **options)
            tokens, levels = (found, ()) if isinstance(found, Tensor) else found
        else:
            found, grids = self._of_items(features, placements, frames, options)
            tokens, *levels = (
                self._joined(each, placements, grids, number == 0) for number, each in enumerate(zip(*found))
            )
        if self.newline is not None:
            tokens = tokens + 0.0 * self.newline  # keeps the newline in the graph, as on ranks whose batch has tiles
        return (tokens, tuple(levels)) if levels else tokens

    def _of_items(
        self, features: Features, placements: Sequence[Placement], frames: Joining | None, options: dict
    ) -> tuple[list[tuple[Tensor, ...]], list[tuple[int, int] | None]]:
        """For each item, its tokens and levels, ``(n, D)``, and the grid of the tokens."""
        first = features[0] if are_several(features) else features
        grid = first.patches.shape[1:3]
        if frames is None:
            found, count = self.connector(features, **options), len(first.patches)
            return _rows(found), [self.connector.output_grid(*grid)] * count
        moving = [placement.frames is not None for placement in placements for _ in placement.items]
        found: dict[int, tuple[Tensor, ...]] = {}
        grids: dict[int, tuple[int, int] | None] = {}
        unused = 0.0
        for joining in (None, frames):
            numbers = [number for number, is_frame in enumerate(moving) if is_frame == (joining is not None)]
            taken, more, own = self._input(_taken(features, numbers or [0]), joining, grid)
            more |= {name: value and _rows_of(value, numbers or [0]) for name, value in options.items()}
            rows = _rows(self.connector(taken, **more))
            found |= dict(zip(numbers, rows))
            grids |= dict.fromkeys(numbers, own)
            if not numbers:  # a call that other ranks make too
                unused = unused + sum((0.0 * each).sum() for each in rows[0])
        ordered = [found[number] for number in range(len(moving))] or [tuple(each + unused for each in rows[0])]
        ordered[0] = (ordered[0][0] + unused, *ordered[0][1:])
        return ordered, [grids[number] for number in range(len(moving))]

    def _input(
        self, features: Features, joining: Joining | None, grid: tuple[int, int]
    ) -> tuple[Features, dict, tuple[int, int] | None]:
        """What the connector is called with for images, or for the frames of videos; and the grid of its tokens."""
        if joining is None:
            return features, {}, self.connector.output_grid(*grid)
        if joining.pool == "window":
            window = {"window": joining.stride}
            return features, window, self.connector.output_grid(*grid, **window)
        pooled = _each_encoder(features, lambda one: _averaged(one, joining.stride))
        return pooled, {}, self.connector.output_grid(grid[0] // joining.stride, grid[1] // joining.stride)

    def _joined(
        self,
        items: Sequence[Tensor],
        placements: Sequence[Placement],
        grids: Sequence[tuple[int, int] | None],
        has_newlines: bool,
    ) -> Tensor:
        """The tokens ``(K, D)`` of all placements, from those of each item. Without `has_newlines`, they are zero."""
        if not placements:
            return items[0]
        newline = None
        if self.newline is not None:
            newline = self.newline if has_newlines else torch.zeros_like(self.newline)
            newline = newline.to(items[0].dtype)
        parts, start = [], 0
        for placement in placements:
            end = start + len(placement.items)
            own, grid = torch.stack(list(items[start:end])), grids[start]
            if placement.frames is not None:
                parts.append(_joined_frames(own, newline, placement.frames, grid))
            elif placement.tiles is not None:
                parts.append(_joined_tiles(own, newline, placement.tiles, grid))
            else:
                parts.append(own.flatten(0, 1))
            start = end
        return torch.cat(parts)


def joining(connector: nn.Module, newline: bool | None) -> nn.Module:
    """The connector, made able to join tokens. newline: whether with newlines; None if nothing is joined."""
    if newline is None or (isinstance(connector, JoiningConnector) and (connector.newline is not None or not newline)):
        return connector
    inner = connector.connector if isinstance(connector, JoiningConnector) else connector
    return JoiningConnector(inner, newline).to(next(inner.parameters()).dtype)


def _rows(found: Tensor | tuple[Tensor, tuple[Tensor, ...]]) -> list[tuple[Tensor, ...]]:
    """The tokens and levels of each item."""
    tokens, levels = (found, ()) if isinstance(found, Tensor) else found
    return list(zip(tokens, *levels))


def _rows_of(value: Tensor, numbers: Sequence[int]) -> Tensor:
    return value[torch.tensor(numbers, device=value.device)]


def _each_encoder(features, change: Callable[[VisionFeatures], VisionFeatures]):
    return tuple(map(change, features)) if are_several(features) else change(features)


def _taken(features: Features | tuple[Features, ...], numbers: Sequence[int]) -> Features | tuple[Features, ...]:
    """The features of some items."""

    def of_one(one: VisionFeatures) -> VisionFeatures:
        prefix = None if one.prefix is None else _rows_of(one.prefix, numbers)
        return VisionFeatures(
            _rows_of(one.patches, numbers), prefix, tuple(_rows_of(level, numbers) for level in one.levels)
        )

    return _each_encoder(features, of_one)


def _averaged(features: VisionFeatures, stride: int) -> VisionFeatures:
    """Means of squares of patches; an incomplete edge is dropped (LLaVA-NeXT-Video, published code)."""

    def averaged(patches: Tensor) -> Tensor:
        return F.avg_pool2d(patches.permute(0, 3, 1, 2), stride).permute(0, 2, 3, 1)

    return features._replace(patches=averaged(features.patches), levels=tuple(map(averaged, features.levels)))


def _joined_frames(items: Tensor, newline: Tensor | None, joining: Joining, grid: tuple[int, int] | None) -> Tensor:
    """Tokens ``(K, D)`` of a video, from those of its frames, ``(F, n, D)`` (LLaVA-OneVision, published code)."""
    if joining.pool in ("bilinear", "average"):
        canvas = items.unflatten(1, grid).permute(0, 3, 1, 2)
        grid = joining.pooled(grid)
        if joining.pool == "bilinear":
            canvas = F.interpolate(canvas, grid, mode="bilinear")
        else:
            canvas = F.avg_pool2d(canvas, joining.stride)
        items = canvas.flatten(2).transpose(1, 2)
    if joining.newline == "row":
        items = items.unflatten(1, grid).flatten(0, 1)
    if joining.newline in ("row", "frame"):
        items = torch.cat([items, newline.expand(len(items), 1, -1)], dim=1)
    tokens = items.flatten(0, 1)
    return torch.cat([tokens, newline[None]]) if joining.newline == "video" else tokens


def _joined_tiles(items: Tensor, newline: Tensor, tiles: Tiles, grid: tuple[int, int] | None) -> Tensor:
    whole, parts = items[0], items[1:]
    if grid is None:
        return items.flatten(0, 1)
    if tiles.views == 1:
        return torch.cat([whole, newline[None]])
    rows, columns = tiles.rows * grid[0], tiles.columns * grid[1]
    canvas = parts.unflatten(1, grid).unflatten(0, (tiles.rows, tiles.columns))
    canvas = canvas.transpose(1, 2).reshape(rows, columns, -1)  # (rows, h, columns, w, D) flattened
    top, bottom, left, right = shown_part((rows, columns), (tiles.height, tiles.width))
    shown = canvas[top:bottom, left:right]
    kept = kept_grid(tiles, shown.shape[:2], grid)
    if kept != shown.shape[:2]:
        shown = F.interpolate(shown.movedim(-1, 0)[None], kept, mode="bilinear")[0].movedim(0, -1)
    newlines = newline.expand(len(shown), 1, -1)
    return torch.cat([whole, torch.cat([shown, newlines], dim=1).flatten(0, 1)])
