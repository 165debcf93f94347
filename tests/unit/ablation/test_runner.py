"""Jobs of an ablation: what they share, and what happens when one fails."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from argparse import Namespace

import numpy as np
import pytest
import torch

from vlmtrain.ablation import read_line, run_ablation
from vlmtrain.ablation.budget import decide
from vlmtrain.ablation.runner import Runner, device_slots
from vlmtrain.cli import ablate

from .jobs import QUICKSTART, finished_job


def test_stages_are_shared_by_the_choices_that_agree_on_them(tmp_path):
    line = ["recipe=quickstart", "connectors=[linear,{qformer:{num_queries:8}}]", f"run_dir={tmp_path}"]
    for axis, shared in (("stages.align.train.connector=[1e-3,2e-3]", 1), ("stages.clip.max_steps=[3,4]", 2)):
        ablation = read_line([*line, f"axis.{axis}"])
        runner = Runner(ablation, show_progress=False)
        assert len({runner.shared(choice, 0) for choice in ablation.choices}) == shared


def test_keys_that_do_not_affect_results_do_not_move_shared_stages():
    line = ["recipe=quickstart", "connectors=[linear]"]
    free = ["workers=0", "collective_timeout=99", "wandb=offline", "stages.clip.micro_batch_size=8"]
    first, other, longer = (
        Runner(ablation, False).shared(ablation.choices[0], 0)
        for ablation in map(read_line, (line, [*line, *free, "stages.clip.save_every=5"], [*line, "precision=bf16"]))
    )
    assert first == other != longer


@pytest.mark.parametrize("more, cached", [(["features.max_gb=5"], True), (["features.cache=off"], False)])
def test_features_are_shared_unless_the_command_says_otherwise(more, cached, tmp_path, monkeypatch):
    begun = []
    monkeypatch.setattr(subprocess, "run", lambda command, **options: begun.append(command) or Namespace(returncode=1))
    ablation = read_line(["recipe=quickstart", "connectors=[mlp]", "stage=instruct", f"run_dir={tmp_path}", *more])
    assert run_ablation(ablation, False)
    assert (f"features.cache={tmp_path}/features" in begun[0]) is cached


@pytest.mark.parametrize(("jobs", "ranks", "threads"), [(1, 1, "8"), (2, 1, "4"), (2, 2, "2"), (16, 1, "1")])
def test_jobs_share_the_threads_of_the_machine(jobs, ranks, threads, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    ablation = read_line(["recipe=quickstart", "connectors=[linear]", f"jobs={jobs}", f"ranks={ranks}"])
    with Runner(ablation, False)._slot(tmp_path, "linear seed 0") as environment:
        assert environment["OMP_NUM_THREADS"] == threads
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    with Runner(ablation, False)._slot(tmp_path, "linear seed 0") as environment:
        assert environment["OMP_NUM_THREADS"] == "3", "the user's value is kept"


def test_jobs_get_their_own_devices_if_there_are_enough():
    assert device_slots(list("01234567"), jobs=2, ranks=4) == ["0,1,2,3", "4,5,6,7"]
    assert device_slots(list("01"), jobs=3, ranks=1) == [None] * 3 and device_slots([], 1, 1) == [None]


def test_a_failed_job_does_not_stop_the_others_and_finished_ones_are_reported(tmp_path, monkeypatch, capsys):
    """Jobs whose process exits at once with status 1: each is started, and the table has those that finished before."""
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    rng = np.random.default_rng(9)
    for name in ("linear", "avgpool"):
        finished_job(tmp_path / "jobs" / name / "seed-0" / "instruct", rng)
    line = ["recipe=quickstart", "connectors=[mlp,linear,pixel_shuffle,avgpool]", "stage=instruct"]
    with pytest.raises(ValueError, match=r"2 of 4 jobs failed: mlp seed 0: .*exit 1.*; pixel_shuffle seed 0: ") as said:
        ablate.run(Namespace(overrides=[*line, f"run_dir={tmp_path}"], json=False))
    assert str(tmp_path / "jobs/pixel_shuffle/seed-0/output.log") in str(said.value)
    printed, told = capsys.readouterr()
    assert told.splitlines() == ["1 of 4 jobs: mlp seed 0 failed", "3 of 4 jobs: pixel_shuffle seed 0 failed"]
    assert "Left out because a job failed: mlp; pixel_shuffle." in printed and "samples/s is measured in" in printed
    assert [entry["label"] for entry in json.loads((tmp_path / "results.json").read_text())].count("linear") == 1
    assert "avgpool" in (tmp_path / "ablation.html").read_text()


def test_a_failed_sweep_does_not_stop_the_other_choices(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    line = ["recipe=quickstart", "connectors=[mlp,linear]", "seeds=[0,1]", "stage=instruct", f"run_dir={tmp_path}"]
    for seed in range(2):
        finished_job(tmp_path / "jobs" / "linear" / f"seed-{seed}" / "instruct", np.random.default_rng(seed))
    (tmp_path / "decisions.json").write_text(json.dumps({"linear": {"line": [], "sweep": {}}}))
    with pytest.raises(ValueError, match=r"^2 of 4 jobs failed: mlp: no run of the sweep finished; see [^;]*$"):
        ablate.run(Namespace(overrides=[*line, "sweep.stages.instruct.train.llm=[1e-3,2e-3]"], json=False))
    assert "Left out because a job failed: mlp." in capsys.readouterr().out


@pytest.mark.parametrize(
    "line, stage, key",
    [
        ([], "instruct", "stages.instruct.train.llm"),
        (["stage=align"], "align", "stages.align.train.connector"),
    ],
)
def test_a_sweep_takes_the_lowest_finite_loss_of_the_last_stage_that_runs(line, stage, key, tmp_path):
    """The first rate's run diverges without failing."""

    class Finished(Runner):
        def run(self, choice, seed, folder, line):
            loss = 0.5 if f"{key}=0.001" in line else math.nan
            summary = {"steps": 1, "parts": {}, "validation": {"loss": loss}}
            (folder / stage).mkdir(parents=True)
            (folder / stage / "summary.json").write_text(json.dumps(summary))

    ablation = read_line([*QUICKSTART, *line, f"sweep.{key}=[1e9,1e-3]", f"run_dir={tmp_path}"])
    decided = decide(ablation, ablation.choices[0], Finished(ablation, False))
    assert decided == {"line": [f"{key}=0.001"], "sweep": {f"{key}=0.001": 0.5}}


def test_an_ablation_resumes_with_other_values_of_keys_that_do_not_affect_results(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    line = ["recipe=quickstart", "connectors=[mlp]", "stage=instruct", f"run_dir={tmp_path}"]
    assert run_ablation(read_line(line), False)
    more = ["workers=0", "stages.instruct.micro_batch_size=1", "collective_timeout=99", "stages.instruct.save_every=5"]
    assert run_ablation(read_line([*line, *more]), False), "it started its job again"
    with pytest.raises(ValueError, match=r"was started with other overrides \(stages.instruct.max_length=99\)"):
        run_ablation(read_line([*line, "stages.instruct.max_length=99"]), False)
