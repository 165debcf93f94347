"""Runs whose dialogues share images: the update does not depend on the split, and runs resume bit for bit."""

from __future__ import annotations

import json
import signal

import pytest

from ..conftest import gpt, human, metrics, train
from ..end_to_end.test_resume import interrupt
from .test_split_invariance import ZERO_3, compare, line

SHARED = (
    *("stages.instruct.layout=packed", "stages.instruct.max_length=128", "stages.instruct.share_images=true"),
    *("llm.positions=mrope", "stages.instruct.encoder_batch_size=2"),
)


@pytest.fixture(scope="module")
def files(llava_files, tmp_path_factory) -> dict:
    """The records of `llava_files` and further ones with several dialogues."""
    records = json.loads(llava_files["instruct"].read_text())
    for i in range(6):
        told = [[human("<image>\nWhat color is this?"), gpt(answer)] for answer in ("red", "a circle")[: 1 + i % 2]]
        records.append({"id": f"several {i}", "image": "red.png", "dialogues": told})
    file = tmp_path_factory.mktemp("dialogues") / "instruct.json"
    file.write_text(json.dumps(records))
    return {**llava_files, "instruct": file}


def command(files, run_dir, *more: str) -> list[str]:
    return line(files, run_dir, *SHARED, "stages.instruct.max_steps=6", *more)


@pytest.fixture(scope="module")
def reference(files, tmp_path_factory) -> list[dict]:
    run_dir = tmp_path_factory.mktemp("shared")
    train(*command(files, run_dir))
    steps = metrics(run_dir, "instruct")
    assert sum(step["image_tokens"] for step in steps) < 16 * sum(step["samples"] for step in steps)
    return steps


def test_the_update_does_not_depend_on_the_split(reference, files, tmp_path):
    split = [*ZERO_3, "stages.instruct.micro_batch_size=1", "workers=2"]
    train(*command(files, tmp_path, *split), ranks=2)
    compare(metrics(tmp_path, "instruct"), reference)


def test_a_killed_run_with_a_feature_cache_resumes_bit_for_bit(files, tmp_path):
    frozen = "stages.instruct.train.vision=null"
    train(*command(files, tmp_path / "whole", frozen))
    cache = f"features.cache={tmp_path / 'cache'}"
    killed = command(files, tmp_path / "killed", frozen, "stages.instruct.save_every=1", cache)
    assert interrupt(killed, tmp_path / "killed", 1, after_step=3, number=signal.SIGKILL)
    train(*killed)
    whole, found = (metrics(tmp_path / name, "instruct") for name in ("whole", "killed"))
    assert [(s["loss"], s["grad_norm"]) for s in found] == [(s["loss"], s["grad_norm"]) for s in whole]
