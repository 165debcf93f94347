"""The tokens of a video's frames: how each frame is pooled, and how the frames are joined."""

from __future__ import annotations

from typing import NamedTuple

POOLS = ("none", "bilinear", "average", "features", "window")
NEWLINES = ("none", "video", "frame", "row")


class Joining(NamedTuple):
    """How the frames of a video become tokens, see ``stages.<name>.video``.

    pool: ``bilinear`` or ``average``, over the grid of the connector's tokens; ``features``, averages over the
    encoder's grid; ``window``, the connector's own windows have the side `stride`; or ``none``. newline: a learned
    token after each ``video``, ``frame`` or ``row``, or ``none``.
    """

    pool: str = "none"
    stride: int = 1
    newline: str = "none"

    @property
    def changes_input(self) -> bool:
        """Whether the connector must be called for frames alone, because it reads them differently from images."""
        return self.pool in ("features", "window")

    def pooled(self, grid: tuple[int, int]) -> tuple[int, int]:
        """The grid of a frame's tokens, from that of the connector's output."""
        if self.pool == "bilinear":
            return -(-grid[0] // self.stride), -(-grid[1] // self.stride)
        if self.pool == "average":
            return grid[0] // self.stride, grid[1] // self.stride
        return grid

    def count(self, frames: int, tokens: int, grid: tuple[int, int] | None) -> int:
        """Number of tokens of a video; `tokens` and `grid` are those of one frame before they are pooled."""
        rows = 0
        if grid is not None:
            rows, columns = self.pooled(grid)
            tokens = rows * columns
        newlines = {"none": 0, "video": 1, "frame": frames, "row": frames * rows}[self.newline]
        return frames * tokens + newlines


PLAIN = Joining()
"""The tokens of all frames, one frame after another."""
