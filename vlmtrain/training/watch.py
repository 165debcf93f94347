"""Watchdog for hangs: reports what each rank is doing if it makes no progress for too long."""

from __future__ import annotations

import os
import sys
import threading
import time
import traceback
from collections.abc import Sequence

from torch import nn

from ..distributed.world import OUTSIDE_STEPS

TO_SPEAK = 5.0  # seconds between a rank's report and its exit, so that the other ranks can report too


class Watch:
    """Ends the process if `doing` is not called for `limit` seconds. A single rank has no limit.

    It does not depend on the communication library; the timeouts of NCCL, for example, do not report the batch.
    """

    def __init__(self, limit: float, rank: int, world_size: int):
        self.limit, self.rank = limit, rank
        self._main, self._over = threading.current_thread(), threading.Event()
        self._has_others = world_size > 1

    def __enter__(self) -> Watch:
        self.doing("starting", outside=True)
        if self._has_others:
            threading.Thread(target=self._run, name="watch", daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()

    def doing(self, what: str, samples: Sequence[str] = (), outside: bool = False) -> None:
        """Record what this rank starts to do.

        samples: IDs of the samples involved. outside: whether this is outside of steps, which have a shorter limit.
        """
        self._now = (time.monotonic(), what, tuple(samples), self.limit * (OUTSIDE_STEPS if outside else 1))

    def _run(self) -> None:
        while not self._over.wait(0.5):
            since, _, _, limit = self._now
            if time.monotonic() - since > limit:
                sys.stderr.write(self.report())
                sys.stderr.flush()
                time.sleep(TO_SPEAK)
                os._exit(1)

    def report(self) -> str:
        """Report what this rank is doing, for how long, with which samples and in which module."""
        since, what, samples, _ = self._now
        frame = sys._current_frames().get(self._main.ident)
        modules: list[nn.Module] = []
        stack = traceback.extract_stack(frame) if frame else []
        while frame:
            owner = frame.f_locals.get("self")
            if isinstance(owner, nn.Module) and frame.f_code.co_name in ("forward", "_call_impl"):
                modules = modules if modules and modules[0] is owner else [owner, *modules]
            frame = frame.f_back
        lines = [f"[rank {self.rank}] hangs: no progress for {time.monotonic() - since:.0f} s (collective_timeout)"]
        lines.append(f"  doing: {what}")
        if samples:
            lines.append(f"  samples: {', '.join(samples)}")
        if modules:
            lines.append(f"  in: {' > '.join(type(module).__name__ for module in modules)}")
        lines += [f"  at: {call.filename}:{call.lineno} {call.name}" for call in stack[-6:]]
        return "\n".join([*lines, ""])
