"""Seconds that a step spends in each phase."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

PHASES = ("data", "vision", "forward", "backward", "optimizer")


class PhaseTimer:
    """Measures phases, on a GPU with events, so that the host does not wait for it.

    Phases may be nested: the time of an inner phase does not count for the outer one.
    """

    def __init__(self, device: torch.device):
        self._on_gpu = device.type == "cuda"
        self._marks: list[tuple[str | None, object]] = []  # the phase that starts, and when
        self._stack: list[str] = []

    def _now(self) -> object:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def start(self, phase: str) -> None:
        self._stack.append(phase)
        self._marks.append((phase, self._now()))

    def stop(self) -> None:
        """End the phase that was started last."""
        self._stack.pop()
        self._marks.append((self._stack[-1] if self._stack else None, self._now()))

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self.start(name)
        try:
            yield
        finally:
            self.stop()

    def reset(self) -> None:
        """Forget what was measured."""
        self._marks.clear()

    def seconds(self) -> dict[str, float]:
        """Seconds by phase since the last call. On a GPU, this waits for the last phase to end."""
        marks, self._marks, self._stack = self._marks, [], []
        if marks and self._on_gpu:
            marks[-1][1].synchronize()
        found: dict[str, float] = {}
        for (phase, start), (_, end) in zip(marks, marks[1:]):
            if phase is not None:
                passed = start.elapsed_time(end) / 1000 if self._on_gpu else end - start
                found[phase] = found.get(phase, 0.0) + passed
        return found
