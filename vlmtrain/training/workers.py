"""The number of data processes of a rank."""

from __future__ import annotations

import os

from ..settings import AUTO

WAITING = 0.05
"""Largest share of the time that a rank may wait for data before it starts more processes."""
WINDOW = 10  # steps over which the share is measured
STARTING = 5  # steps that do not count after the processes have started


class Workers:
    """Counts data processes, in `count`.

    setting: their number, or ``auto``: one at first, and twice as many whenever a rank has waited for data, up to the
    number of cores that it has besides the one that trains.
    """

    def __init__(self, setting: int | str):
        self.count = self.most = 1 if setting == AUTO else setting
        if setting == AUTO:
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
            self.most = max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)) - 1)
        self._restart()

    def _restart(self) -> None:
        self._steps, self._waited, self._seconds = -STARTING, 0.0, 0.0

    def grow(self, waited: float, seconds: float) -> bool:
        """Note the seconds of a step, and of the wait for its data. Returns whether `count` has become larger."""
        self._steps += 1
        if self._steps <= 0 or self.count == self.most:
            return False
        self._waited, self._seconds = self._waited + waited, self._seconds + seconds
        if self._steps < WINDOW:
            return False
        is_late = self._waited > WAITING * self._seconds
        self._restart()
        if is_late:
            self.count = min(2 * self.count, self.most)
        return is_late
