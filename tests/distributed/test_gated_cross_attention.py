"""Gated cross-attention: the update does not depend on the split, with ranks that have no images."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from ..conftest import gpt, human, metrics, train

ZERO_3 = ["engine=zero3", "engine.parameter_persistence_threshold=0"]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Records with no image, one or two images."""
    folder = tmp_path_factory.mktemp("images")
    records = []
    for i in range(24):
        talk = [human("<image>\nWhat color is this?"), gpt("red" if i % 2 else "blue")] * max(1, i % 3)
        if i % 3 == 0:
            talk = [human("What color is this?"), gpt("green")]
        records.append({"id": str(i), "conversations": talk, "image": [f"{(i + k) % 2}.png" for k in range(i % 3)]})
    for number, color in enumerate(((220, 40, 40), (40, 90, 230))):
        Image.new("RGB", (48, 48), color).save(folder / f"{number}.png")
    (folder / "data.json").write_text(json.dumps(records))
    return folder


def line(data: Path, run_dir: Path, *more: str) -> list[str]:
    return [
        *("recipe=flamingo", "mini=true", "data=llava_json", f"data.images={data}", f"run_dir={run_dir}"),
        *(f"data.{split}={data / 'data.json'}" for split in ("multitask", "validation")),
        *("stages.pretrain.batch_size=8", "stages.pretrain.max_steps=4", "stages.pretrain.train.vision=1e-4"),
        *("validation.samples=4", "validation.final_samples=4", "validation.max_new_tokens=2", "workers=0"),
        *("stages.pretrain.groups=[{match: fusion, lr: 1e-2}]", *more),
    ]


@pytest.mark.slow
def test_the_update_does_not_depend_on_the_split(data, tmp_path):
    """With micro-batches of one sample, a rank often has text only while the other has images."""
    train(*line(data, tmp_path / "one", "engine=zero0"))
    split = ["stages.pretrain.micro_batch_size=1", "stages.pretrain.gradient_checkpointing=true"]
    train(*line(data, tmp_path / "two", *ZERO_3, *split), ranks=2)
    one, two = (metrics(tmp_path / name, "pretrain") for name in ("one", "two"))
    for before, after in zip(one, two, strict=True):
        assert (before["samples"], before["image_tokens"]) == (after["samples"], after["image_tokens"])
        for key in ("loss", "grad_norm"):
            assert before[key] == pytest.approx(after[key], rel=2e-3)
    scores = [
        json.loads((tmp_path / name / "pretrain" / "summary.json").read_text())["validation"] for name in ("one", "two")
    ]
    assert scores[0]["loss"] == pytest.approx(scores[1]["loss"], rel=2e-3)
