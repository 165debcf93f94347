"""Plans the steps of packed rows in a process of its own, so that the data workers do not all plan every step.

planner: lengths -> rows of all ranks -> worker 0: steps 0, N, ...    worker 1: steps 1, N + 1, ...    ...
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from multiprocessing import Pipe, Process
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING

from ..distributed.processes import die_with, ignore_stop_signals, kill_with

if TYPE_CHECKING:
    from .loader import Batching, PlannedStep


class StepPlanner:
    """Runs ``batching.steps(first, cursor, 0, 1)`` up to step `last` in a process, for `workers` readers.

    A reader is ahead of the planner only by what fits into a pipe. An error of the planner is raised by the reader of
    its step.
    """

    def __init__(self, batching: Batching, first: int, last: int, cursor: dict | None, workers: int):
        self._readers, self._writers = zip(*(Pipe(duplex=False) for _ in range(workers)))
        arguments = (batching, first, last, cursor, self._readers, self._writers, os.getpid())
        self._process = Process(target=_plan, args=arguments, daemon=True)
        self._process.start()
        for writer in self._writers:
            writer.close()
        kill_with(self, self._process)

    def __getstate__(self) -> dict:
        return {"_readers": self._readers}

    def steps(self, worker: int) -> Iterator[PlannedStep]:
        """The steps of a worker."""
        while True:
            try:
                step = self._readers[worker].recv()
            except EOFError:
                raise RuntimeError("the process that plans the steps has died") from None
            if isinstance(step, Exception):
                raise step
            yield step


def _plan(
    batching: Batching,
    first: int,
    last: int,
    cursor: dict | None,
    readers: tuple[Connection, ...],
    writers: tuple[Connection, ...],
    parent: int,
) -> None:
    die_with(parent)
    ignore_stop_signals()
    for reader in readers:
        reader.close()
    steps = batching.steps(first, cursor, 0, 1)
    for number in range(last - first):
        try:
            step = next(steps)
            rows = [[planned._replace(read=None) for planned in row] for row in step.rows]
            message = step._replace(rows=rows)
        except Exception as error:
            message = error
        writers[number % len(writers)].send(message)
        if isinstance(message, Exception):
            return
