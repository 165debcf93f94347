"""Processes that end with the one that started them, however it ended, so that nothing of a dead run goes on; and what
a process knows of itself.

python -m vlmtrain.distributed.processes MODULE [ARGUMENT ...]      # runs a module so
"""

from __future__ import annotations

import ctypes
import os
import resource
import runpy
import signal
import sys
from pathlib import Path

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def die_with(parent: int) -> None:
    """Have the kernel kill this process once `parent`, which must have started it, is dead. Linux; elsewhere nothing.

    To the kernel the parent is the thread that started this process, not the others beside it.
    """
    if not sys.platform.startswith("linux"):
        return
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent:  # it died before we asked
        os.kill(os.getpid(), signal.SIGKILL)


def die_with_launcher() -> None:
    """Under torchrun, whose ranks would outlive it: end when it ends."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        die_with(os.getppid())


def launched_rank() -> int:
    """This process's rank as torchrun tells it, before any group exists; 0 in a single process."""
    return int(os.environ.get("RANK", 0))


def peak_resident_bytes() -> int:
    """The most host memory that this process has held.

    Not by getrusage where Linux says it better: there it begins with what the parent held when it started this one.
    """
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
    return 1024 * int(line.split()[1])


if __name__ == "__main__":
    die_with(os.getppid())
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
