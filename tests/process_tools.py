"""Runs as processes that tests can watch and kill."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

from .conftest import ROOT


@contextlib.contextmanager
def started(*line: str, ranks: int = 1, restarts: int = 0, log: Path, **options) -> Iterator[psutil.Popen]:
    """A training run in the background, which logs to `log`; all its processes and files are removed at the end."""
    launcher = [sys.executable, "-m"]
    if ranks > 1:
        launcher += ["torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
        launcher += ["--max_restarts", str(restarts), "--monitor_interval", "0.1", "-m"]
    with open(log, "ab") as output:
        process = psutil.Popen(
            [*launcher, "vlmtrain.train", *line], cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, **options
        )
    known = tree(process)
    try:
        yield process
    finally:
        kill({*known, *tree(process)})


def tree(process: psutil.Process) -> set[psutil.Process]:
    """A process and all that it has started, as of now."""
    try:
        return {process, *process.children(recursive=True)}
    except psutil.NoSuchProcess:
        return set()


def ranks_of(launcher: psutil.Process) -> list[psutil.Process]:
    """The ranks that a launcher has started, in their order."""
    found = []
    for process in launcher.children():
        with contextlib.suppress(psutil.Error, KeyError):  # it may not be one yet
            found.append((int(process.environ()["RANK"]), process))
    return [process for _, process in sorted(found, key=lambda entry: entry[0])]


def kill(processes: set[psutil.Process], patience: float = 10.0) -> None:
    """SIGKILL, to all of them, and wait until they are gone."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    assert_gone(processes, patience)


def assert_gone(processes: set[psutil.Process], patience: float = 10.0) -> None:
    wait_for(lambda: not any(alive(process) for process in processes), patience, f"{processes} did not end")


def alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_for(condition: Callable[[], bool], patience: float, otherwise: str) -> None:
    deadline = time.monotonic() + patience
    while not condition():
        assert time.monotonic() < deadline, otherwise
        time.sleep(0.005)


def steps_of(run_dir: Path, stage: str) -> int:
    """Steps of a stage in the run's metrics so far."""
    file = run_dir / stage / "metrics.jsonl"
    return file.read_text().count("\n") if file.exists() else 0
