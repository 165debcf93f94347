"""Gradient checkpointing does not change the loss."""

from __future__ import annotations

import pytest

from ..conftest import metrics, train

LINE = [
    "recipe=llava_1_5",
    "mini=true",
    "stage=instruct",
    "stages.instruct.fresh=[connector]",
    "stages.instruct.batch_size=4",
    "stages.instruct.max_steps=3",
    "data.validation=null",
    "workers=0",
]


def test_losses_are_equal_with_and_without_checkpointing(tmp_path):
    for name in ("false", "true"):
        done = train(*LINE, f"stages.instruct.gradient_checkpointing={name}", f"run_dir={tmp_path / name}")
        assert "FutureWarning" not in done.stderr
    kept, recomputed = (metrics(tmp_path / name, "instruct") for name in ("false", "true"))
    assert len(kept) == len(recomputed) == 3
    for one, other in zip(kept, recomputed):
        for key in ("loss", "grad_norm"):
            assert other[key] == pytest.approx(one[key], rel=1e-6)
