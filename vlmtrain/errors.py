"""Helpers to check values and for error messages: suggestions, shortened values and printable text."""

from __future__ import annotations

import difflib
import reprlib
import sys
from collections.abc import Iterable


def nearest(word: str, known: Iterable[str]) -> str:
    """Return `` Did you mean 'x'?`` for a misspelled name, or an empty string if no known name is similar."""
    match = difflib.get_close_matches(word, list(known), 1)
    return f" Did you mean '{match[0]}'?" if match else ""


def is_finite_number(value: object) -> bool:
    """Whether a value is a number, not a boolean, that a float can hold."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def some(names: Iterable[str], limit: int = 4) -> str:
    """Format the first few names, sorted, and the number of remaining ones."""
    names = sorted(names)
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's message, or the name of its type if the message is empty.

    A line that ends with a colon is joined with the next one.
    """
    lines = [line.strip() for line in str(error).strip().splitlines()]
    if len(lines) > 1 and lines[0].endswith(":"):  # which announces the reason
        lines[0] += f" {lines[1]}"
    return printable(lines[0]) if lines else type(error).__name__


def printable(text: str, limit: int = 500) -> str:
    """Shorten text from a file for a message, and escape it if it contains non-printable characters."""
    if len(text) > limit:
        text = f"{text[: limit // 2]}…{text[-limit // 2 :]}"
    return text if text.isprintable() else repr(text)[1:-1]


_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = 60
_repr.maxlevel = 4


def shown(value: object) -> str:
    """Format a value for an error message, shortened if it is large or deeply nested."""
    return printable(_repr.repr(value), 300)
