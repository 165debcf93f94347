"""Arguments, checks and output that several commands share."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

MAX_PROBLEMS = 20
"""Number of problems printed per source."""


def take_overrides(parser: argparse.ArgumentParser, summary: str) -> None:
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=summary)


def take_config_dir(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config-dir", metavar="DIR", help="a folder with your own configuration groups and recipes")


def take_modules(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--module",
        action="append",
        default=[],
        metavar="NAME",
        help="a Python module to import first, which registers parts of your own; may be repeated",
    )


def check_writable(file: Path | None) -> None:
    """Raise ValueError, before any work is done, if `file` cannot be written."""
    if file is not None and (file.is_dir() or not os.access(file.parent, os.W_OK)):
        raise ValueError(f"{file} cannot be written: expected {file.parent} to be a folder with write permission")
