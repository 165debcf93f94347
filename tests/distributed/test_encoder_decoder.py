"""Encoder-decoder language models: the update does not depend on the split, with ranks that have no images."""

from __future__ import annotations

import json

import pytest

from ..conftest import data_overrides, metrics, train

ZERO_3 = ["engine=zero3", "engine.parameter_persistence_threshold=0"]


@pytest.mark.slow
def test_the_update_does_not_depend_on_the_split(llava_files, tmp_path):
    """With micro-batches of one sample, a rank often has text only while the other has images."""
    line = ["recipe=llava_1_5", "mini=true", "stage=instruct", "stages.instruct.fresh=[connector]", "workers=0"]
    line += ["llm.config.model_type=t5", "+llm.config.dropout_rate=0.0", *data_overrides(llava_files)]
    line += [f"stages.instruct.{key}" for key in ("max_steps=4", "batch_size=8", "template=bare", "train.vision=1e-4")]
    line += ["validation.samples=4", "validation.final_samples=4", "validation.max_new_tokens=2"]
    train(*line, "engine=zero0", f"run_dir={tmp_path / 'one'}")
    split = ["stages.instruct.micro_batch_size=1", "stages.instruct.gradient_checkpointing=true"]
    train(*line, *ZERO_3, *split, f"run_dir={tmp_path / 'two'}", ranks=2)
    one, two = (metrics(tmp_path / name, "instruct") for name in ("one", "two"))
    for before, after in zip(one, two, strict=True):
        assert (before["target_tokens"], before["image_tokens"]) == (after["target_tokens"], after["image_tokens"])
        for key in ("loss", "grad_norm"):
            assert before[key] == pytest.approx(after[key], rel=2e-3)
    scores = [
        json.loads((tmp_path / name / "instruct" / "summary.json").read_text())["validation"] for name in ("one", "two")
    ]
    assert scores[0]["loss"] == pytest.approx(scores[1]["loss"], rel=2e-3)
