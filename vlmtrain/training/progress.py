"""Progress of a stage: a progress bar on a terminal, log lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any

from tqdm import tqdm

from .log import logger


class Progress:
    """A progress bar on a terminal; elsewhere a log line every `seconds`."""

    def __init__(self, stage: str, total: int, first: int, seconds: float = 15.0):
        self.stage, self.total, self.seconds = stage, total, seconds
        self.is_terminal = sys.stderr.isatty()
        self.bar = tqdm(total=total, initial=first, desc=stage, unit="step", disable=not self.is_terminal, leave=True)
        self._next_line = time.monotonic()

    def update(self, step: int, values: Mapping[str, Any]) -> None:
        """Show the metrics of a finished step."""
        text = f"loss {values['loss']:.4f}  {tqdm.format_sizeof(values['tokens_per_second'])} tokens/s"
        if "mfu" in values:
            text += f"  MFU {values['mfu']:.0%}"
        self.bar.set_postfix_str(text, refresh=False)
        self.bar.update()
        if not self.is_terminal and (time.monotonic() >= self._next_line or step == self.total):
            left = tqdm.format_interval((self.total - step) * values["step_seconds"])
            logger.info(f"{self.stage}  step {step}/{self.total}  {text}  {left} left")
            self._next_line = time.monotonic() + self.seconds

    def close(self) -> None:
        self.bar.close()
