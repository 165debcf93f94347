"""Process utilities: end a process together with its parent, so that no process of a dead run survives, and query the
rank and the peak memory of the current process.

python -m vlmtrain.distributed.processes MODULE [ARGUMENT ...]      # runs a module that ends with its parent
"""

from __future__ import annotations

import ctypes
import os
import resource
import runpy
import signal
import sys
import weakref
from multiprocessing import Process
from pathlib import Path

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def die_with(parent: int) -> None:
    """Have the kernel kill this process when `parent`, the process that started it, dies. No effect outside Linux.

    For the kernel, the parent is the thread that started this process, not the other threads of the parent process.
    """
    if not sys.platform.startswith("linux"):
        return
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent:  # the parent died before the call
        os.kill(os.getpid(), signal.SIGKILL)


def die_with_launcher() -> None:
    """Under torchrun, end this process when the launcher ends, as ranks would otherwise outlive it."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        die_with(os.getppid())


def ignore_stop_signals() -> None:
    """Leave signals to the trainer, which needs its helper processes until it has saved a checkpoint."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def kill_with(owner: object, process: Process) -> None:
    """Kill a process that this one has started when `owner` is no longer used."""
    weakref.finalize(owner, _kill, process, os.getpid()).atexit = False


def _kill(process: Process, parent: int) -> None:
    if os.getpid() == parent:  # `owner` may also be in forked processes
        process.kill()


def launched_rank() -> int:
    """Rank of this process as set by torchrun, available before a process group exists; 0 for a single process."""
    return int(os.environ.get("RANK", 0))


def is_first_on_machine() -> bool:
    """Whether this is the first of the processes that torchrun has started on this machine, or a single process."""
    return int(os.environ.get("LOCAL_RANK", 0)) == 0


def peak_resident_bytes() -> int:
    """Peak resident memory of this process on the host, in bytes.

    On Linux the value comes from VmHWM, because ``ru_maxrss`` of getrusage starts at the memory that the parent held
    when it started this process.
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
