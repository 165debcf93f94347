"""Wording of errors: what was meant, and what was found."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable


def nearest(word: str, known: Iterable[str]) -> str:
    """`` Did you mean 'x'?`` for a misspelt word, or an empty string."""
    match = difflib.get_close_matches(word, list(known), 1)
    return f" Did you mean '{match[0]}'?" if match else ""


def some(names: Iterable[str], limit: int = 4) -> str:
    """The first few of many names, sorted, and how many more there are."""
    names = sorted(names)
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def first_line(error: BaseException) -> str:
    """The first line of another library's message."""
    return printable(str(error).strip().splitlines()[0]) if str(error).strip() else type(error).__name__


def printable(text: str, limit: int = 500) -> str:
    """Text that some file holds, for a message: shortened, with what no terminal or log can show escaped."""
    if len(text) > limit:
        text = f"{text[: limit // 2]}…{text[-limit // 2 :]}"
    return text if text.isprintable() else repr(text)[1:-1]


_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = 60
_repr.maxlevel = 4


def shown(value: object) -> str:
    """A value for an error message: short, however large or deep it is."""
    return printable(_repr.repr(value), 300)
