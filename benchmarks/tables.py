"""Tables that are measured and written between the markers of a page."""

from __future__ import annotations

import argparse
import logging
import re
from collections.abc import Callable
from pathlib import Path

import torch


def print_or_write(table: Callable[[], str], marker: str, description: str) -> None:
    """Print a table; with ``--write FILE`` also write it between ``<!-- marker:begin -->`` and ``:end`` in FILE."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--write", type=Path, metavar="FILE", help="replace the block between the markers of FILE")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    begin, end = (f"<!-- {marker}:{place} -->" for place in ("begin", "end"))
    text = arguments.write.read_text() if arguments.write else ""
    if arguments.write and not (begin in text and end in text):
        raise SystemExit(f"{arguments.write} has no block between {begin} and {end}")
    result = table()
    print(result)
    if arguments.write:
        block = f"{begin}\n{result}\n{end}"
        arguments.write.write_text(re.sub(f"{begin}.*?{end}", lambda _: block, text, flags=re.DOTALL))


def error_cell(error: float) -> str:
    return "0" if error == 0 else f"{error:.0e}"
