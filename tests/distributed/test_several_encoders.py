"""Several encoders in training: one frozen and cached, one trained, with ranks that have no image."""

from __future__ import annotations

import shutil
import signal

import pytest

from ..conftest import metrics, train
from ..end_to_end.test_resume import interrupt
from .test_split_invariance import ZERO_3, line

ENCODERS = "{first: {provider: tiny, image_size: 24}, second: {provider: tiny, layer: -2}}"
TRAINED = '[{match: "vision.second.blocks[1:]", lr: 1e-3}]'


def overrides(files, run_dir, *more: str) -> list[str]:
    given = line(files, run_dir, "vision=several", f"vision.encoders={ENCODERS}", "vision.grid=second")
    given = [override for override in given if "train.vision" not in override]
    return [*given, f"stages.instruct.groups={TRAINED}", "stages.instruct.max_steps=6", *more]


@pytest.fixture(scope="module")
def reference(llava_files, tmp_path_factory) -> list[dict]:
    run_dir = tmp_path_factory.mktemp("several")
    train(*overrides(llava_files, run_dir))
    return metrics(run_dir, "instruct")


def test_a_frozen_encoder_is_cached_beside_one_that_trains(reference, llava_files, tmp_path):
    cache = f"features.cache={tmp_path / 'cache'}"
    for run in ("empty", "filled"):
        train(*overrides(llava_files, tmp_path / run, cache))
        found = metrics(tmp_path / run, "instruct")
        assert [step["loss"] for step in found] == [step["loss"] for step in reference]
    folders = [folder for folder in (tmp_path / "cache").iterdir() if folder.is_dir() and folder.name != "keys"]
    assert len(folders) == 2  # of both encoders in align, where both are frozen, and of the first one in instruct


def test_ranks_without_images_train_the_same(reference, llava_files, tmp_path):
    split = [*ZERO_3, "stages.instruct.micro_batch_size=1", "workers=2"]
    train(*overrides(llava_files, tmp_path, *split), ranks=2)
    found = metrics(tmp_path, "instruct")
    assert found[0]["grad_norm"] == pytest.approx(reference[0]["grad_norm"], rel=1e-5)
    assert [step["loss"] for step in found[:4]] == pytest.approx([step["loss"] for step in reference[:4]], rel=1e-5)


def test_a_killed_run_resumes_bit_for_bit(llava_files, tmp_path):
    more = [
        *ZERO_3,
        "stages.instruct.micro_batch_size=1",
        "stages.instruct.save_every=2",
        "stages.instruct.max_steps=8",
    ]
    train(*overrides(llava_files, tmp_path / "whole", *more), ranks=2)
    command = overrides(llava_files, tmp_path / "killed", *more, f"features.cache={tmp_path / 'cache'}")
    assert interrupt(command, tmp_path / "killed", 2, after_step=5, number=signal.SIGKILL)
    shutil.rmtree(tmp_path / "cache")
    train(*command, ranks=2)
    whole, found = (metrics(tmp_path / name, "instruct") for name in ("whole", "killed"))
    assert [(s["loss"], s["grad_norm"]) for s in found] == [(s["loss"], s["grad_norm"]) for s in whole]


def test_other_encoders_than_those_of_the_run_or_the_model_are_refused(llava_files, tmp_path):
    train(*overrides(llava_files, tmp_path / "run"))
    swapped = "{second: {provider: tiny, layer: -2}, first: {provider: tiny, image_size: 24}}"
    again = overrides(llava_files, tmp_path / "run", f"vision.encoders={swapped}")
    refused = train(*(each for each in again if each != f"vision.encoders={ENCODERS}"), check=False)
    assert refused.returncode == 2 and "vision.encoders=['second', 'first'] would change the run" in refused.stderr
    line = overrides(llava_files, tmp_path / "next", f"init_from={tmp_path / 'run' / 'instruct' / 'model'}")
    others = [each for each in line if not each.startswith(("vision=", "vision.", "stages.instruct.groups"))]
    for more, asked in (
        ([*(each for each in line if each.startswith("vision")), "vision.grid=first"], "join=channels and grid=first"),
        (["vision=tiny"], "one encoder"),
    ):
        refused = train(*others, *more, "stage=instruct", check=False)
        assert refused.returncode == 2 and f"{asked}, but the model in init_from=" in refused.stderr
