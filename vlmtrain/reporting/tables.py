"""Tables as text."""

from __future__ import annotations

from collections.abc import Sequence


def text_table(rows: Sequence[Sequence[str]], indent: int = 0, numbers: bool = True) -> str:
    """Rows of cells; the first column is aligned to the left, the others to the right if `numbers`."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    sides = ["<", *(">" if numbers else "<" for _ in widths[1:])]
    lines = ("  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(row, sides, widths)) for row in rows)
    return "\n".join(" " * indent + line.rstrip() for line in lines)
