"""BLIP-2's first stage gives the same losses and gradients on two ranks as on one, even if a rank has no samples."""

from __future__ import annotations

import pytest

from ..conftest import metrics, train

# 17 samples in steps of 8: every third step has a single sample, and the second rank has none.
LINE = [
    "recipe=blip2",
    "mini=true",
    "stage=represent",
    "data.align.size=17",
    "stages.represent.batch_size=8",
    "stages.represent.max_steps=6",
    "workers=0",
]
ENGINES = {
    "zero0": ["engine=zero0"],
    "zero2": ["engine=zero2"],
    # so that all parameters are partitioned, as at published sizes
    "zero3": ["engine=zero3", "engine.parameter_persistence_threshold=0"],
}


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> list[dict]:
    run_dir = tmp_path_factory.mktemp("alone")
    train(*LINE, f"run_dir={run_dir}")
    return metrics(run_dir, "represent")


@pytest.mark.parametrize("engine", ENGINES)
def test_two_ranks_equal_one(engine, alone, tmp_path):
    train(*LINE, *ENGINES[engine], f"run_dir={tmp_path}", ranks=2)
    found = metrics(tmp_path, "represent")
    assert [record["samples"] for record in found] == [8, 8, 1] * 2
    for step, (one, two) in enumerate(zip(alone, found, strict=True)):
        # a wrong gradient would change the gradient norms or the losses after the update
        for key in ("loss", "grad_norm"):
            assert two[key] == pytest.approx(one[key], rel=1e-5), f"{key} of step {step + 1}"
