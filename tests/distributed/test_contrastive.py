"""Contrastive training on two ranks equals one rank: candidates are gathered with their gradients."""

from __future__ import annotations

import pytest

from ..conftest import metrics, train

LINE = ["recipe=clip", "mini=true", "stages.contrast.batch_size=16", "stages.contrast.max_steps=2", "workers=0"]


def test_two_ranks_equal_one(tmp_path):
    train(*LINE, f"run_dir={tmp_path / 'one'}")
    train(*LINE, f"run_dir={tmp_path / 'two'}", ranks=2)
    one, two = (metrics(tmp_path / name, "contrast") for name in ("one", "two"))
    assert len(one) == len(two) == 2
    for alone, found in zip(one, two):
        # a wrong gradient would change the gradient norms or the losses after the update
        for key in ("loss", "grad_norm"):
            assert found[key] == pytest.approx(alone[key], rel=1e-5)
