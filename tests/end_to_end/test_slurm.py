"""The launch scripts: signals reach the ranks, and stopped runs resume. SLURM's commands are replaced by stubs."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from ..conftest import ROOT
from ..process_tools import assert_gone, kill, steps_of, tree, wait_for
from .test_resume import line

SCRIPTS = sorted((ROOT / "launch").iterdir())
STAND_INS = {
    "srun": 'echo "$SRUN_CPUS_PER_TASK cores" >> "$CALLS"; exec "$@"',
    "torchrun": f'exec {sys.executable} -m torch.distributed.run "$@"',
    "scontrol": 'if [ "$1" = show ]; then echo 127.0.0.1; else echo "$@" >> "$CALLS"; fi',
}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_launch_scripts_are_valid_bash(script):
    assert subprocess.run(["bash", "-n", script]).returncode == 0
    if shutil.which("shellcheck"):
        assert subprocess.run(["shellcheck", script]).returncode == 0


@pytest.fixture
def environment(tmp_path) -> dict[str, str]:
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, body in STAND_INS.items():
        (commands / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (commands / name).chmod(0o755)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    slurm = {"JOB_ID": 7, "JOB_NODELIST": "node", "NNODES": 1, "GPUS_ON_NODE": 1, "RESTART_COUNT": 0}
    slurm["CPUS_PER_TASK"] = 3
    return {
        **os.environ,
        **{f"SLURM_{key}": str(value) for key, value in slurm.items()},
        "PATH": f"{commands}:{os.environ['PATH']}",
        "CALLS": str(tmp_path / "calls"),
        "PORT": str(port),
    }


def submit(name: str, command: list[str], environment: dict[str, str], log: Path) -> psutil.Popen:
    with open(log, "ab") as output:
        script = ["bash", str(ROOT / "launch" / name), *command]
        return psutil.Popen(script, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT)


def test_a_job_near_its_time_limit_saves_and_requeues_itself(llava_files, tmp_path, environment):
    run_dir, log = tmp_path / "run", tmp_path / "log"
    command = line(llava_files, run_dir, "stages.instruct.max_steps=60", "stages.instruct.save_every=50")
    job = submit("slurm.sbatch", command, environment, log)
    try:
        wait_for(lambda: steps_of(run_dir, "instruct") >= 3, 120, "no step was made")
        job.send_signal(signal.SIGUSR1)  # as `--signal=B:USR1@300` does: only to the script
        assert job.wait(timeout=60) != 0
        steps = steps_of(run_dir, "instruct")
        assert (run_dir / "instruct" / "checkpoints" / f"step-{steps:06d}").is_dir()
        assert (tmp_path / "calls").read_text() == "3 cores\nrequeue 7\n"
        job = submit("slurm.sbatch", command, {**environment, "SLURM_RESTART_COUNT": "1"}, log)
        assert job.wait(timeout=120) == 0
    finally:
        kill(tree(job))
    assert f"resuming after step {steps}\n" in log.read_text()
    assert json.loads((run_dir / "instruct" / "summary.json").read_text())["steps"] == 60
    assert (tmp_path / "calls").read_text() == "3 cores\nrequeue 7\n3 cores\n"


@pytest.mark.parametrize("script, number", [("node.sh", signal.SIGUSR1), ("nodes.sh", signal.SIGTERM)])
def test_a_signal_to_a_launch_script_saves_on_all_ranks(script, number, llava_files, tmp_path, environment):
    run_dir, log = tmp_path / "run", tmp_path / "log"
    nodes = {"NPROC": "2", "HEAD": "127.0.0.1", "NODES": "1", "NODE": "0"}
    command = line(llava_files, run_dir, "stages.instruct.max_steps=400", "workers=0")
    job = submit(script, command, {**environment, **nodes}, log)
    try:
        wait_for(lambda: steps_of(run_dir, "instruct") >= 3, 120, "no step was made")
        everyone = tree(job)
        job.send_signal(number)
        assert job.wait(timeout=60) != 0  # so that a scheduler can tell it from a run that has ended
        assert_gone(everyone)
    finally:
        kill(tree(job))
    steps = steps_of(run_dir, "instruct")
    assert f"instruct: stopped after step {steps} of 400" in log.read_text()
    record = json.loads((run_dir / "instruct" / "checkpoints" / f"step-{steps:06d}" / "vlmtrain.json").read_text())
    assert len(record["record"]["files"]) == 2
