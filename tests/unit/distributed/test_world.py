"""The single-process world, signals and processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from vlmtrain.distributed.processes import launched_rank, peak_resident_bytes
from vlmtrain.distributed.world import StopSignal, World


def test_a_single_rank_needs_no_process_group():
    world = World(0, 1, torch.device("cpu"))
    assert world.is_main and world.sum([1.0, 2.0]) == world.max([1.0, 2.0]) == [1.0, 2.0]
    assert world.gather("x") == ["x"] and world.from_main("x") == "x"
    world.barrier()


def test_stop_signals_are_recorded_and_do_not_end_the_process():
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        for number in before:
            stop = StopSignal()
            assert not stop.received
            os.kill(os.getpid(), number)
            assert stop.received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_the_rank_is_that_of_the_launcher(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    assert launched_rank() == 0
    monkeypatch.setenv("RANK", "3")
    assert launched_rank() == 3


def test_peak_memory_grows_with_what_is_allocated():
    peak = peak_resident_bytes()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    below_peak = peak - pages * os.sysconf("SC_PAGE_SIZE")  # earlier tests may have needed more than is held now
    block = torch.ones(2**26 + below_peak // 4)  # 256 MiB above the peak
    assert peak_resident_bytes() >= peak + 2**27
    del block


def test_a_module_ends_with_the_process_that_started_it(tmp_path):
    (tmp_path / "sleeper.py").write_text("import os, time\nprint(os.getpid(), flush=True)\ntime.sleep(60)\n")
    module = "vlmtrain.distributed.processes"
    started = f"import subprocess, sys\nsubprocess.run([sys.executable, '-m', '{module}', 'sleeper'])"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    parent = subprocess.Popen([sys.executable, "-c", started], stdout=subprocess.PIPE, text=True, env=env)
    child = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    for _ in range(100):
        command = Path(f"/proc/{child}/cmdline")
        if not command.exists() or not command.read_text():  # gone, or a zombie
            return
        time.sleep(0.05)
    os.kill(child, signal.SIGKILL)
    raise AssertionError("it outlived the process that started it")
