"""Progress of an evaluation, or of reading data: a bar on a terminal, lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

from tqdm import tqdm


class ValidationProgress:
    """Shows how much is done and how long the rest will take, once something lasts longer than `patience` seconds.

    On a terminal it is a bar; elsewhere `write` gets a line every `seconds`. unit: of what is done.
    """

    def __init__(
        self,
        write: Callable[[str], None],
        patience: float = 10.0,
        seconds: float = 15.0,
        unit: str = "conversation",
    ):
        self.write, self.patience, self.seconds, self.unit = write, patience, seconds, unit
        self.what = ""

    def __call__(self, what: str, done: int, total: int) -> None:
        """Show that `done` of `total` units are done. The first call for each `what` starts its clock."""
        now = time.monotonic()
        if what != self.what:
            self.what, self.first, self.started, self.next_line = what, done, now, now + self.patience
            is_terminal = sys.stderr.isatty()
            self.bar = tqdm(
                total=total,
                initial=done,
                desc=what,
                unit=self.unit,
                delay=self.patience,
                disable=not is_terminal,
                leave=False,
            )
        self.bar.update(done - self.bar.n)
        if self.bar.disable and now >= self.next_line and done > self.first:
            left = (total - done) * (now - self.started) / (done - self.first)
            self.write(f"{what}: {done:,} of {total:,} {self.unit}s, {tqdm.format_interval(left)} left")
            self.next_line = now + self.seconds
        if done >= total:
            self.bar.close()
            self.what = ""
