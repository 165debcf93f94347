"""Runs killed or stopped at an exact moment: each step and each validation is recorded once, and nothing is lost."""

from __future__ import annotations

import json
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch

from vlmtrain.data import Processor
from vlmtrain.model import VLMWrapper

from ..conftest import metrics, run, train
from .test_resume import line

WORKER = str(Path(__file__).with_name("moment_runs.py"))
STEPS = 6
SAME = ("step", "loss", "grad_norm", "learning_rate")


def struck(*moments: str, line: list[str]):
    return run(sys.executable, WORKER, *moments, "--", *line, check=False)


def command(files, run_dir: Path, *more: str) -> list[str]:
    stages = (f"stages.instruct.max_steps={STEPS}", "stages.instruct.validate_every=2", "stages.align.max_steps=1")
    return line(files, run_dir, *stages, "stages.instruct.save_every=3", "workers=0", *more)


@pytest.fixture(scope="module")
def whole(llava_files, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    train(*command(llava_files, folder))
    return folder


def saved(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "instruct" / "checkpoints").iterdir())


def assert_same(found: Path, wanted: Path) -> None:
    ours, theirs = (metrics(folder, "instruct") for folder in (found, wanted))
    assert [[record[key] for key in SAME] for record in ours] == [[record[key] for key in SAME] for record in theirs]
    for file in ("validation.jsonl", "answers.json", "model/vlmtrain.json"):
        assert (found / "instruct" / file).read_bytes() == (wanted / "instruct" / file).read_bytes(), file


def test_a_validation_is_recorded_once_after_a_stop_before_it_and_a_kill_after_it(llava_files, tmp_path, whole):
    assert struck("SIGTERM@metrics.jsonl:3", line=command(llava_files, tmp_path)).returncode == 0
    assert saved(tmp_path) == ["step-000003", "step-000004"]
    assert struck("SIGKILL@validation.jsonl:4", line=command(llava_files, tmp_path)).returncode == -signal.SIGKILL
    train(*command(llava_files, tmp_path))
    assert_same(tmp_path, whole)


def test_no_step_is_repeated_for_what_follows_the_last_step(llava_files, tmp_path, whole):
    free = command(llava_files, tmp_path, "stages.instruct.save_every=null")
    stopped = struck(f"SIGTERM@metrics.jsonl:{STEPS - 1}", line=free)
    assert stopped.returncode == 0 and f"stopped after step {STEPS} of {STEPS}" in stopped.stdout
    before = (tmp_path / "instruct" / "metrics.jsonl").read_bytes()
    stopped = struck("SIGTERM@scores:1", line=free)
    assert stopped.returncode == 0 and "stopped during validation; run the same command to resume" in stopped.stdout
    assert saved(tmp_path) == [f"step-{STEPS:06d}"] and not (tmp_path / "instruct" / "summary.json").exists()
    for moment in ("SIGKILL@scores:1", "SIGKILL@write_manifest:1"):
        assert struck(moment, line=free).returncode == -signal.SIGKILL
        assert saved(tmp_path) == [f"step-{STEPS:06d}"] and not (tmp_path / "instruct" / "summary.json").exists()
    done = train(*free)
    assert f"resuming after step {STEPS}\n" in done.stdout
    assert (tmp_path / "instruct" / "metrics.jsonl").read_bytes() == before
    assert_same(tmp_path, whole)
    assert not (tmp_path / "instruct" / "checkpoints").exists()


def test_early_stopping_is_decided_by_the_validations_also_of_an_interrupted_run(llava_files, tmp_path):
    options = ("validate_every=1", "early_stopping=2", "train.connector=1.0", "train.llm=1.0", "max_steps=9")
    more = [f"stages.instruct.{option}" for option in options]
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    train(*command(llava_files, whole, *more))
    losses = [record["loss"] for record in metrics(whole, "instruct", "validation.jsonl")]
    ends = next(i for i in range(2, 9) if min(losses[i - 1 : i + 1]) >= min(losses[: i - 1]))
    summary = json.loads((whole / "instruct" / "summary.json").read_text())
    assert summary["ended_early"] and summary["steps"] == len(losses) == ends + 1 < 9
    assert struck(f"SIGTERM@metrics.jsonl:{ends + 1}", line=command(llava_files, parted, *more)).returncode == 0
    train(*command(llava_files, parted, *more))
    assert_same(parted, whole)


def test_checkpoints_by_the_clock(llava_files, tmp_path):
    """More than six seconds after the previous one, at two seconds per step: every fifth step."""
    by_minutes = ("save_every=null", "save_every_minutes=0.1", "keep_last=9", "max_steps=24", "validate_every=null")
    more = [f"stages.instruct.{option}" for option in by_minutes]
    done = struck("clock", "SIGKILL@metrics.jsonl:17", line=command(llava_files, tmp_path, *more))
    assert done.returncode == -signal.SIGKILL
    assert saved(tmp_path) == ["step-000005", "step-000010", "step-000015"]


def test_a_frozen_part_that_changed_during_the_run_is_named(llava_files, tmp_path, whole):
    start = shutil.copytree(whole / "align" / "model", tmp_path / "start")
    free = [*command(llava_files, tmp_path / "run"), "stage=instruct", f"init_from={start}"]
    assert struck("SIGKILL@metrics.jsonl:4", line=free).returncode == -signal.SIGKILL
    model, processor = VLMWrapper.from_pretrained(start), Processor.from_pretrained(start)
    with torch.no_grad():
        next(model.vision.parameters()).add_(0.01)
    shutil.rmtree(start)
    model.save_pretrained(start)
    processor.save_pretrained(start)
    refused = train(*free, check=False)
    assert refused.returncode == 2 and "stage instruct started with different weights for vision" in refused.stderr
