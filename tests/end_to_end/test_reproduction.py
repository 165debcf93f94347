"""A run can be reproduced from its record; differences are named, with the first step that differs."""

from __future__ import annotations

import json
import shutil
import sys

import pytest
from omegaconf import OmegaConf

from vlmtrain.runs.reproduction import compare

from ..conftest import metrics, run, train
from .test_resume import line

REPRODUCE = (sys.executable, "-m", "vlmtrain.cli", "reproduce")


@pytest.fixture(scope="module")
def first(llava_files, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "first"
    more = ["stages.instruct.max_steps=5", "stages.align.max_steps=2", "stages.instruct.validate_every=2"]
    more += ["stages.instruct.keep_best=true", "stages.instruct.save_every_minutes=0.1", "engine=zero1"]
    more += ["stages.instruct.schedule.name=constant"]  # the last step of a cosine schedule changes nothing
    train(*line(llava_files, folder, *more))
    return folder


def test_the_record_states_what_produced_the_run(first, llava_files):
    config = OmegaConf.to_container(OmegaConf.load(first / "config.yaml"))
    assert config["machine"]["processes"] == 1 and config["machine"]["threads"] >= 1
    assert {"python", "torch", "deepspeed", "vlmtrain"} <= set(config["versions"]) and "git" in config
    assert config["files"][str(llava_files["instruct"])]["bytes"] == llava_files["instruct"].stat().st_size
    assert config["files"][str(llava_files["images"])]["files"] > 4
    assert "earlier" not in config


def test_the_best_model_so_far_stays(first):
    scores = [json.loads(text) for text in (first / "instruct" / "validation.jsonl").read_text().splitlines()]
    assert [score["step"] for score in scores] == [2, 4]
    best = json.loads((first / "instruct" / "summary.json").read_text())["best"]
    assert best["loss"] <= min(score["loss"] for score in scores) and best["step"] in (2, 4, 5)
    ours, theirs = (json.loads((first / "instruct" / name / "vlmtrain.json").read_text()) for name in ("best", "model"))
    assert ours["parts"]["vision"] == theirs["parts"]["vision"]
    assert (ours == theirs) == (best["step"] == 5)


def test_a_reproduced_run_is_equal_and_the_first_difference_is_found(first, llava_files, tmp_path):
    done = run(*REPRODUCE, str(first), "--out", str(tmp_path / "again"), "--json")
    found = json.loads(done.stdout)
    assert found["differences"] == []
    for name, steps in (("align", 2), ("instruct", 5)):
        assert found["stages"][name] == {"steps": steps, "parting": None, "same_model": True}
    # as if the first run's third step had been different
    records = metrics(first, "instruct")
    records[2]["loss"] *= 1.001
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (first / "instruct" / "metrics.jsonl").write_text(lines)
    config = OmegaConf.load(first / "config.yaml")
    config.versions.torch = "1.0"
    OmegaConf.save(config, first / "config.yaml")
    refused = run(*REPRODUCE, str(first), "--out", str(tmp_path / "again"), check=False)
    assert refused.returncode == 2 and f"{tmp_path / 'again'} already contains a finished rerun" in refused.stderr
    # as if the rerun had been killed in its second stage, in the middle of a line
    (tmp_path / "again" / "instruct" / "summary.json").unlink()
    with open(first / "instruct" / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "lo')
    parted = run(*REPRODUCE, str(first), "--out", str(tmp_path / "again"), check=False)
    assert parted.returncode == 1
    assert "instruct: diverges at step 3 of 5: loss was" in parted.stdout
    assert "align: all 2 steps are bit-identical, and so are the weights" in parted.stdout
    assert "differs: versions.torch: 1.0 -> " in parted.stdout
    refused = run(*REPRODUCE, str(tmp_path / "nothing"), check=False)
    assert refused.returncode == 2 and "config.yaml is missing" in refused.stderr


def test_stages_that_ran_one_by_one_are_all_run_again(tmp_path):
    module = "from vlmtrain.connectors import register\nfrom vlmtrain.connectors.mlp import Linear\n\n\n"
    (tmp_path / "own.py").write_text(f'{module}@register("own")\nclass Own(Linear):\n    pass\n')
    more = [f"run_dir={tmp_path / 'run'}", "validation.samples=2", "validation.final_samples=2", "workers=0"]
    more += ["stages.clip.max_steps=2", "stages.text.max_steps=2", "modules=own", "connector=own"]
    for stage in ("clip", "text"):
        train("recipe=quickstart", f"stage={stage}", *more, cwd=tmp_path)
    found = json.loads(run(*REPRODUCE, str(tmp_path / "run"), "--json", cwd=tmp_path).stdout)
    for stage in ("clip", "text"):
        assert found["stages"][stage] == {"steps": 2, "parting": None, "same_model": True}


def test_a_rerun_with_fewer_steps_is_not_equal(first, tmp_path):
    short = shutil.copytree(first / "align", tmp_path / "align")
    lines = (short / "metrics.jsonl").read_text().splitlines(keepends=True)
    (short / "metrics.jsonl").write_text("".join(lines[:-1]))
    parting = compare(first / "align", short).parting
    assert (parting.step, parting.key) == (len(lines), "steps")
