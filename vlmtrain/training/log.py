"""The log of a run, written to the terminal and to train.log."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

logger = logging.getLogger("vlmtrain")


def set_up_logging(file: Path | None) -> None:
    """Log to the terminal, and to `file` if given. Without a file, log only errors."""
    logger.handlers.clear()
    logger.propagate = False
    logger.setLevel(logging.INFO if file else logging.ERROR)
    terminal = logging.StreamHandler(sys.stdout)
    terminal.setFormatter(logging.Formatter("%(message)s"))
    logger.addHandler(terminal)
    if file:
        to_file = logging.FileHandler(file)
        to_file.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%Y-%m-%d %H:%M:%S"))
        logger.addHandler(to_file)
