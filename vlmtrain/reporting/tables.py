"""Tables as text, HTML and Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape


def text_table(rows: Sequence[Sequence[str]], indent: int = 0, numbers: bool = True) -> str:
    """Rows of cells; the first column is aligned to the left, the others to the right if `numbers`."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    sides = ["<", *(">" if numbers else "<" for _ in widths[1:])]
    lines = ("  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(row, sides, widths)) for row in rows)
    return "\n".join(" " * indent + line.rstrip() for line in lines)


def html_table(rows: Sequence[Sequence[str]]) -> str:
    """A table whose first row is the header and whose first column contains text."""
    head, *body = rows
    cells = "".join(f"<th{' class=number' * (i > 0)}>{escape(cell)}</th>" for i, cell in enumerate(head))
    lines = "".join(
        "<tr>" + "".join(f"<td{' class=number' * (i > 0)}>{escape(cell)}</td>" for i, cell in enumerate(row)) + "</tr>"
        for row in body
    )
    return f"<table><tr>{cells}</tr>{lines}</table>"


def markdown_text(text: str) -> str:
    """Text for a paragraph or a cell: without HTML, line breaks and bars that separate cells."""
    return " ".join(escape(text, quote=False).replace("|", "\\|").split())


def markdown_table(rows: Sequence[Sequence[str]], numbers: bool = False) -> str:
    """A table whose first row is the header; columns after the first are aligned to the right if they are `numbers`."""
    head, *body = (f"| {' | '.join(map(markdown_text, row))} |" for row in rows)
    rule = f"|---|{'--:|' * (len(rows[0]) - 1)}" if numbers else f"| {' | '.join('---' for _ in rows[0])} |"
    return "\n".join([head, rule, *body, ""])
