"""Plans steps in a process of its own, so that the data workers do not all plan every step.

planner: step 0, 1, 2, ... -> worker 0: steps 0, N, ...    worker 1: steps 1, N + 1, ...    ...
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from itertools import count
from multiprocessing import Pipe, Process
from multiprocessing.connection import Connection
from typing import Generic, TypeVar

from ..distributed.processes import die_with, ignore_stop_signals, kill_with

T = TypeVar("T")


class StepPlanner(Generic[T]):
    """Iterates over ``plan()`` in a process, for `workers` readers.

    It is ahead of the readers by what fits into a pipe. An error is raised by the reader of its step.
    """

    def __init__(self, plan: Callable[[], Iterator[T]], workers: int):
        self._readers, self._writers = zip(*(Pipe(duplex=False) for _ in range(workers)))
        arguments = (plan, self._readers, self._writers, os.getpid())
        self._process = Process(target=_plan, args=arguments, daemon=True)
        self._process.start()
        for writer in self._writers:
            writer.close()
        kill_with(self, self._process)

    def __getstate__(self) -> dict:
        return {"_readers": self._readers}

    def steps(self, worker: int) -> Iterator[T]:
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
    plan: Callable[[], Iterator], readers: tuple[Connection, ...], writers: tuple[Connection, ...], parent: int
) -> None:
    die_with(parent)
    ignore_stop_signals()
    for reader in readers:
        reader.close()
    steps = plan()
    for number in count():
        try:
            step = next(steps)
        except StopIteration:
            return
        except Exception as error:
            step = error
        writers[number % len(writers)].send(step)
        if isinstance(step, Exception):
            return
