"""A time limit for code from files, such as chat templates, which may never end."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def time_limit(seconds: float, message: str) -> Iterator[None]:
    """Raise ValueError with `message` in a block that runs for longer; only the main thread has such a limit."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def expire(*_) -> None:
        raise ValueError(message)

    before = signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
