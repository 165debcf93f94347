"""When some of a run's processes die, none outlives its launcher, and none blocks the next run."""

from __future__ import annotations

import os
import sys

import pytest

from ..conftest import metrics, run, train
from ..process_tools import alive, assert_gone, kill, ranks_of, started, steps_of, tree, wait_for
from .test_resume import line

linux_only = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the kernel's promise is Linux's")
SAME = ("step", "loss", "grad_norm", "learning_rate", "samples", "tokens")


@linux_only
def test_ranks_and_workers_die_with_a_killed_launcher_and_a_killed_rank_is_replaced(llava_files, tmp_path):
    command = line(llava_files, tmp_path / "broken", "engine=zero1", "workers=1", "precision=fp32")
    with started(*command, ranks=2, log=tmp_path / "log") as launcher:
        wait_for(lambda: steps_of(tmp_path / "broken", "instruct") >= 7, 120, "the run made no step")
        everyone = tree(launcher)
        assert len(everyone) >= 1 + 2 * 2  # the launcher, and two ranks with one worker each
        launcher.kill()
        assert_gone(everyone, 5)
    assert steps_of(tmp_path / "broken", "instruct") < 24
    # let the lock of the dead run name a live process
    (tmp_path / "broken" / ".lock").write_text(f"process {os.getpid()} on here\n")
    with started(*command, ranks=2, restarts=1, log=tmp_path / "log") as launcher:
        wait_for(lambda: steps_of(tmp_path / "broken", "instruct") >= 12, 120, "the run did not resume")
        first = ranks_of(launcher)
        first[1].kill()
        wait_for(lambda: len(found := ranks_of(launcher)) == 2 and not {*found} & {*first}, 60, "no new ranks")
        assert launcher.wait(timeout=120) == 0
    said = (tmp_path / "log").read_text()
    assert said.count("resuming after step") == 2
    assert "forcefully exiting" not in said, "the remaining rank did not exit by itself"
    train(*line(llava_files, tmp_path / "whole", "engine=zero1", "workers=1", "precision=fp32"), ranks=2)
    found, wanted = (metrics(tmp_path / run, "instruct") for run in ("broken", "whole"))
    assert [[r[key] for key in SAME] for r in found] == [[r[key] for key in SAME] for r in wanted]


def test_a_second_run_on_a_folder_is_refused_and_harms_nothing(llava_files, tmp_path):
    command = line(llava_files, tmp_path / "run", "stages.instruct.max_steps=400")
    with started(*command, log=tmp_path / "log") as process:
        wait_for(lambda: steps_of(tmp_path / "run", "align") >= 1, 120, "the run made no step")
        second = train(*command, check=False)
        assert second.returncode == 2 and "Traceback" not in second.stderr
        assert f"is in use by another run (process {process.pid} on" in second.stderr
        before = steps_of(tmp_path / "run", "instruct")
        wait_for(lambda: steps_of(tmp_path / "run", "instruct") > before, 60, "the first run stopped")
        assert alive(process)
        kill(tree(process))


def test_a_process_reports_its_own_peak_memory():
    own = "import vlmtrain.distributed.processes as own; held = bytearray(2 * 10**8); print(own.peak_resident_bytes())"
    parent = f"import subprocess, sys; held = bytearray(10**9); subprocess.run([sys.executable, '-c', {own!r}])"
    found = int(run(sys.executable, "-c", parent).stdout)
    assert 2 * 10**8 < found < 8 * 10**8
