"""A run that was killed or stopped goes on as if nothing had happened."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ..conftest import ROOT, data_overrides, metrics, train

STEPS = 24


def line(files, run_dir, *more: str) -> list[str]:
    return [
        "recipe=llava_1_5",
        "mini=true",
        *data_overrides(files),
        "validation.final_samples=2",
        "validation.samples=2",
        f"run_dir={run_dir}",
        "stages.align.max_steps=3",
        "stages.align.batch_size=4",
        f"stages.instruct.max_steps={STEPS}",
        "stages.instruct.batch_size=4",
        "stages.instruct.micro_batch_size=1",
        "stages.instruct.save_every=5",
        *more,
    ]


def interrupt(command: list[str], run_dir: Path, ranks: int, behind_step: int, number: int) -> int:
    """Start a run, send it a signal once it is behind a step of instruct, and return its exit code."""
    launcher = [sys.executable, "-m"]
    if ranks > 1:
        launcher += ["torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks), "-m"]
    process = subprocess.Popen(
        [*launcher, "vlmtrain.train", *command], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    file = run_dir / "instruct" / "metrics.jsonl"
    deadline = time.monotonic() + 240
    while not file.exists() or file.read_text().count("\n") < behind_step:
        assert process.poll() is None, f"the run ended by itself with {process.returncode}"
        assert time.monotonic() < deadline, "the run never came so far"
        time.sleep(0.005)
    if number == signal.SIGTERM:  # as a scheduler does: to the trainer and to its data workers
        subprocess.run(["pkill", "-TERM", "-f", f"run_dir={run_dir}"])
    else:
        process.send_signal(number)
    code = process.wait(timeout=120)
    for _ in range(100):  # workers of a killed launcher end on their own
        if subprocess.run(["pgrep", "-f", f"run_dir={run_dir}"], capture_output=True).returncode:
            break
        subprocess.run(["pkill", "-KILL", "-f", f"run_dir={run_dir}"])
        time.sleep(0.1)
    return code


@pytest.mark.parametrize(
    "engine, precision, ranks, number",
    [
        ("zero0", "fp32", 1, signal.SIGKILL),
        ("zero2", "bf16", 2, signal.SIGKILL),
        ("zero3", "fp32", 2, signal.SIGKILL),
        ("zero1", "fp32", 1, signal.SIGTERM),
    ],
)
def test_losses_behind_an_interruption_are_bit_identical(engine, precision, ranks, number, llava_files, tmp_path):
    more = [f"engine={engine}", f"precision={precision}"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train(*line(llava_files, whole, *more), ranks=ranks)
    code = interrupt(line(llava_files, broken, *more), broken, ranks, 8, number)
    interrupted_at = len(metrics(broken, "instruct"))
    assert interrupted_at < STEPS and not (broken / "instruct" / "summary.json").exists()
    if number == signal.SIGTERM:
        assert code == 0
        saved = [path.name for path in (broken / "instruct" / "checkpoints").iterdir()]
        assert f"step-{interrupted_at:06d}" in saved
    train(*line(llava_files, broken, *more), ranks=ranks)
    for key in ("step", "loss", "grad_norm", "learning_rate"):
        assert [r[key] for r in metrics(broken, "instruct")] == [r[key] for r in metrics(whole, "instruct")]
    for part in ("vision", "connector", "llm"):
        hashes = [
            json.loads((run / "instruct" / "summary.json").read_text())["parts"][part]["sha256_after"]
            for run in (whole, broken)
        ]
        assert hashes[0] == hashes[1]
    assert not (broken / "instruct" / "checkpoints").exists()


def test_finished_stages_are_skipped_and_changed_keys_refused(llava_files, tmp_path):
    first = line(llava_files, tmp_path, "stages.instruct.max_steps=2")
    train(*first)
    before = (tmp_path / "instruct" / "metrics.jsonl").stat().st_mtime_ns
    assert "stage instruct is finished" in train(*first).stdout
    assert (tmp_path / "instruct" / "metrics.jsonl").stat().st_mtime_ns == before
    refused = train(*first, "stages.align.train.connector=5e-4", check=False)
    assert refused.returncode == 2
    assert "stages.align.train.connector" in refused.stderr and "Traceback" not in refused.stderr
    assert "stage instruct is finished" in train(*first, "workers=0", "wandb_project=other").stdout


def test_checkpoints_are_pruned(llava_files, tmp_path):
    command = line(llava_files, tmp_path, "stages.instruct.save_every=2", "stages.instruct.keep_last=2")
    interrupt(command, tmp_path, 1, 15, signal.SIGTERM)
    saved = sorted(path.name for path in (tmp_path / "instruct" / "checkpoints").iterdir())
    assert len(saved) == 2 and not any(name.endswith(".partial") for name in saved)
