"""A connector whose tokens are joined: those of an image's tiles in one grid, and those of a video's frames.

features of all items --connector--> tokens of each item --pool, newlines--> tokens of each placement

Overlapping crops of an image are one grid of features already before the connector.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..connectors import Features, PackedFeatures, VisionFeatures
from ..connectors.base import are_several
from ..frames import Joining
from ..tiling import Overlap, Tiles, kept_grid, shown_part
from ..visual import Placement


class JoiningConnector(nn.Module):
    """Applies `connector` to every item, and joins the tokens of the items of each placement.

    Tiles form one grid with a newline after each row (LLaVA-NeXT, published code, ``image_newline``), as do
    overlapping crops (Molmo2, published code, ``<im_col>``); if the tokens of the connector form no grid, those of all
    items are concatenated without newlines. Frames of a video are joined as their `Joining` says. Levels for the
    language model are joined like the tokens; at newlines they are zero.

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
        self,
        features: Features | tuple[Features, ...],
        placements: Sequence[Placement] = (),
        frames: Joining | None = None,
        calls: int = 1,
        **options: Tensor | None,
    ) -> Tensor | tuple[Tensor, tuple[Tensor, ...]]:
        """Tokens ``(V, n, D)`` of V items, or ``(K, D)`` if those of some of the `placements` are joined.

        frames, calls: see `vlmtrain.visual.Visual`. options: further arguments of the connector, with one row per item.
        A connector with levels for the language model returns a pair.
        """
        packed = isinstance(_first(features), PackedFeatures)
        joined = any(placement.tiles or placement.frames for placement in placements)
        if packed or (frames is None and calls == 1 and not joined):
            found = self.connector(features, **({"calls": calls} if packed else {}), **options)
            tokens, levels = (found, ()) if isinstance(found, Tensor) else found
        else:
            shown = placements or [_STAND_IN]
            pieces = self._pieces(features, shown, frames, calls, options)
            tokens, *levels = (self._joined(shown, pieces, part) for part in range(len(pieces[0][0].parts)))
        if self.newline is not None:
            tokens = tokens + 0.0 * self.newline  # keeps the newline in the graph, as on ranks whose batch has tiles
        return (tokens, tuple(levels)) if levels else tokens

    def _pieces(
        self,
        features: Features | tuple[Features, ...],
        placements: Sequence[Placement],
        frames: Joining | None,
        calls: int,
        options: dict[str, Tensor | None],
    ) -> list[list[_Piece]]:
        """For each placement, what the connector makes of its items.

        The connector is called for images and then, if it reads them differently, for frames.
        """
        ends = list(accumulate(len(placement.items) for placement in placements))
        spans = [range(end - len(placement.items), end) for placement, end in zip(placements, ends)]
        found: list[list[_Piece]] = [[] for _ in placements]
        unused = 0.0
        for kind in (None,) if frames is None else (None, frames):
            own = [n for n, each in enumerate(placements) if frames is None or (each.frames is None) == (kind is None)]
            numbers = [item for number in own for item in spans[number]]
            taken = features if len(numbers) == ends[-1] else _taken(features, numbers or [0])
            rows = {name: _rows_of(value, numbers or [0]) for name, value in options.items()}
            pieces = self._called(taken, [placements[number] for number in own] or [_STAND_IN], kind, calls, rows)
            if not own:  # a call that other ranks make too
                unused = unused + sum((0.0 * part).sum() for part in pieces[0].parts)
            for number in own:
                count = 1 if isinstance(placements[number].tiles, Overlap) else len(spans[number])
                found[number], pieces = pieces[:count], pieces[count:]
        first = found[0][0]
        found[0][0] = first._replace(parts=tuple(part + unused for part in first.parts))
        return found

    def _called(
        self,
        features: Features | tuple[Features, ...],
        placements: Sequence[Placement],
        kind: Joining | None,
        calls: int,
        options: dict[str, Tensor | None],
    ) -> list[_Piece]:
        """What the connector makes of the items of images, or of frames that it reads as `kind` says."""
        if kind is None and (calls > 1 or any(isinstance(placement.tiles, Overlap) for placement in placements)):
            canvases, starts = _canvases(features, placements)
            options = {name: _rows_of(value, starts) for name, value in options.items()}
            counts = [self.connector.num_tokens(*grid) for grid in canvases.grids]
            parts = [part.split(counts) for part in _parts(self.connector(canvases, calls=calls, **options))]
            grids = [self.connector.output_grid(*grid) for grid in canvases.grids]
            return list(map(_Piece, zip(*parts), grids))
        grid, window = _first(features).patches.shape[1:3], {}
        if kind is not None and kind.pool == "window":
            window = {"window": kind.stride}
        elif kind is not None:
            features = _each_encoder(features, lambda one: _averaged(one, kind.stride))
            grid = grid[0] // kind.stride, grid[1] // kind.stride
        parts = _parts(self.connector(features, **window, **options))
        out_grid = self.connector.output_grid(*grid, **window)
        return [_Piece(own, out_grid) for own in zip(*parts)]

    def _joined(self, placements: Sequence[Placement], pieces: Sequence[Sequence[_Piece]], part: int) -> Tensor:
        """The tokens ``(K, D)`` of all placements, or with part > 0 those of a level, whose newlines are zero."""
        newline = self.newline
        if newline is not None:
            newline = (torch.zeros_like(newline) if part else newline).to(pieces[0][0].parts[part].dtype)
        joined = []
        for placement, own in zip(placements, pieces):
            items, grid = torch.stack([piece.parts[part] for piece in own]), own[0].grid
            if placement.frames is not None:
                joined.append(_joined_frames(items, newline, placement.frames, grid))
            elif placement.tiles is None or grid is None:
                joined.append(items.flatten(0, 1))
            elif isinstance(placement.tiles, Overlap):
                joined.append(_ended(items[0].unflatten(0, grid), newline).flatten(0, 1))
            else:
                joined.append(_joined_tiles(items, newline, placement.tiles, grid))
        return torch.cat(joined)


class _Piece(NamedTuple):
    """What the connector makes of an item, or of the canvas of overlapping crops: tokens and levels, each ``(n, D)``.

    grid: that of the tokens; None if they form none.
    """

    parts: tuple[Tensor, ...]
    grid: tuple[int, int] | None


_STAND_IN = Placement(0, (0,), 0, 0, None)


def joining(connector: nn.Module, newline: bool | None) -> nn.Module:
    """The connector, made able to join tokens. newline: whether with newlines; None if nothing is joined."""
    if newline is None or (isinstance(connector, JoiningConnector) and (connector.newline is not None or not newline)):
        return connector
    inner = connector.connector if isinstance(connector, JoiningConnector) else connector
    return JoiningConnector(inner, newline).to(next(inner.parameters()).dtype)


def _parts(found: Tensor | tuple[Tensor, tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """The tokens that a connector returns, and its levels."""
    return (found,) if isinstance(found, Tensor) else (found[0], *found[1])


def _first(features: Features | tuple[Features, ...]) -> Features:
    """The features of the first encoder."""
    return features[0] if are_several(features) else features


def _rows_of(value: Tensor | None, numbers: Sequence[int]) -> Tensor | None:
    return None if value is None else value[torch.tensor(numbers, device=value.device)]


def _each_encoder(features, change: Callable[[VisionFeatures], VisionFeatures]):
    return tuple(map(change, features)) if are_several(features) else change(features)


def _taken(features: Features | tuple[Features, ...], numbers: Sequence[int]) -> Features | tuple[Features, ...]:
    """The features of some items."""

    def of_one(one: VisionFeatures) -> VisionFeatures:
        patches, prefix = (_rows_of(each, numbers) for each in (one.patches, one.prefix))
        return VisionFeatures(patches, prefix, tuple(_rows_of(level, numbers) for level in one.levels))

    return _each_encoder(features, of_one)


def _averaged(features: VisionFeatures, stride: int) -> VisionFeatures:
    """Means of squares of patches; an incomplete edge is dropped (LLaVA-NeXT-Video, published code)."""

    def averaged(patches: Tensor) -> Tensor:
        return F.avg_pool2d(patches.permute(0, 3, 1, 2), stride).permute(0, 2, 3, 1)

    return features._replace(patches=averaged(features.patches), levels=tuple(map(averaged, features.levels)))


def _canvases(features: VisionFeatures, placements: Sequence[Placement]) -> tuple[PackedFeatures, list[int]]:
    """The features of images whose overlapping crops are joined, and the number of the first item of each.

    They have no prefix, of which each crop has its own.
    """
    layers, images, starts, start = (features.patches, *features.levels), [], [], 0
    for placement in placements:
        end = start + len(placement.items)
        whole = isinstance(placement.tiles, Overlap)
        for first, last in [(start, end)] if whole else ((number, number + 1) for number in range(start, end)):
            images.append([_canvas(layer[first:last], placement.tiles) if whole else layer[first] for layer in layers])
            starts.append(first)
        start = end
    grids = tuple(tuple(image[0].shape[:2]) for image in images)
    patches, *levels = (torch.cat([each.flatten(0, 1) for each in layer]) for layer in zip(*images))
    return PackedFeatures(patches, grids, None, tuple(levels)), starts


def _canvas(crops: Tensor, overlap: Overlap) -> Tensor:
    """Crops ``(n, h, w, C)`` as one grid ``(H, W, C)``: where two meet, each drops the margin on that side."""

    def kept(number: int, count: int, side: int) -> slice:
        return slice(overlap.margin if number else 0, side - (overlap.margin if number < count - 1 else 0))

    lines = []
    for row in range(overlap.rows):
        line = crops[row * overlap.columns : (row + 1) * overlap.columns, kept(row, overlap.rows, crops.shape[1])]
        lines.append(
            torch.cat([crop[:, kept(n, overlap.columns, crops.shape[2])] for n, crop in enumerate(line)], dim=1)
        )
    return torch.cat(lines)


def _ended(rows: Tensor, newline: Tensor) -> Tensor:
    """Rows of tokens ``(R, w, D)``, each with a newline at its end."""
    return torch.cat([rows, newline.expand(len(rows), 1, -1)], dim=1)


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
        items = _ended(items, newline)
    tokens = items.flatten(0, 1)
    return torch.cat([tokens, newline[None]]) if joining.newline == "video" else tokens


def _joined_tiles(items: Tensor, newline: Tensor, tiles: Tiles, grid: tuple[int, int]) -> Tensor:
    """Tokens ``(K, D)`` of an image, from those of its views, ``(V, n, D)`` (LLaVA-NeXT, published code)."""
    whole, parts = items[0], items[1:]
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
    return torch.cat([whole, _ended(shown, newline).flatten(0, 1)])
