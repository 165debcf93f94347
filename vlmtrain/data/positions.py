"""Rotary positions of a sample, made from its text and the output grids of its placements."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..visual import Placement


def mrope(index: Tensor, placements: Sequence[Placement]) -> Tensor:
    """Positions in time, height and width, ``(3, T)`` (Qwen2-VL, Wang et al., 2024, section 2.1, and published code).

    Text advances all three by one. The tokens of an image share the position in time, and count rows and columns of
    its output grid from there; those of an item of a video also advance in time, by the `times` of its placement. The
    text after it continues at the largest position plus one. Tokens without an output grid advance like text. `index`
    ``(T,)`` is the placement at each position, -1 for text.
    """
    pieces, start = [], 0
    owners, counts = index.unique_consecutive(return_counts=True)
    for owner, count in zip(owners.tolist(), counts.tolist()):
        grid = placements[owner].out_grid if owner >= 0 else None
        if grid is None:
            pieces.append(torch.arange(start, start + count).expand(3, -1))
            start += count
        else:
            times = torch.tensor(placements[owner].times or (0,))
            axes = torch.meshgrid(times, torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
            rows = torch.stack(axes).flatten(1)
            assert rows.shape[1] == count, f"{count} positions of {len(times)} grids of {grid[0]}x{grid[1]}"
            pieces.append(start + rows)
            start += int(rows.max()) + 1
    return torch.cat(pieces, dim=1)


def xdrope(index: Tensor, placements: Sequence[Placement]) -> Tensor:
    """Positions in the sequence, width, height and image number, ``(4, T)`` (HunyuanOCR, 2025, published code).

    All four rows are the position in the sequence, except for the tokens in the grid of an image (`out_grid` or
    `framed_grid`). For these, the second row is the column, the third the row of the grid, and the fourth the number of
    the image in the sample, all counted from 0. `index`: see `mrope`.
    """
    rows = torch.arange(len(index)).repeat(4, 1)
    starts = {owner: start for start, owner in reversed(list(enumerate(index.tolist())))}
    for number, placement in enumerate(placements):
        grid, start = placement.out_grid, starts.get(number)
        if grid is None and placement.framed_grid is not None:
            grid, start = placement.framed_grid, None if start is None else start + 1
        if grid is not None and start is not None:
            height, width = grid
            position = torch.arange(height * width)
            numbers = torch.full_like(position, placement.medium)
            rows[1:, start : start + len(position)] = torch.stack([position % width, position // width, numbers])
    return rows


POSITIONS: dict[str, Callable[[Tensor, Sequence[Placement]], Tensor]] = {
    "mrope": mrope,
    "interleaved_mrope": mrope,
    "xdrope": xdrope,
}
WITH_TIME = tuple(name for name, rows in POSITIONS.items() if rows is mrope)
"""Those in which the frames of a video advance in time."""
