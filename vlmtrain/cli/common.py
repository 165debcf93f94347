"""What several commands share: kinds of arguments, checks and output."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

MAX_PROBLEMS = 20
"""Problems that are printed of each source."""


def take_overrides(parser: argparse.ArgumentParser, summary: str) -> None:
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=summary)


def take_modules(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--module",
        action="append",
        default=[],
        metavar="NAME",
        help="a Python module of your own to import first, which registers connectors; may be repeated",
    )


def check_writable(file: Path | None) -> None:
    """Raise ValueError for a file that could not be written in the end, before the work is done."""
    if file is not None and (file.is_dir() or not os.access(file.parent, os.W_OK)):
        raise ValueError(f"{file} cannot be written: is {file.parent} a folder that you may write to?")
