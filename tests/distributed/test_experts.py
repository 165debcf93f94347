"""Experts by modality: the update does not depend on the split, with ranks that have only text."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from ..conftest import gpt, human, metrics, train


def line(data, run_dir, *more: str) -> list[str]:
    return [
        *("recipe=mot", "mini=true", "data=llava_json", f"data.images={data}", f"run_dir={run_dir}", "workers=0"),
        *(f"data.{split}={data / 'data.json'}" for split in ("align", "validation")),
        *("stages.joint.template=chat", "stages.joint.batch_size=8", "stages.joint.max_steps=4"),
        *("validation.samples=4", "validation.final_samples=4", "validation.max_new_tokens=2", *more),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["zero2", "zero3"])
def test_the_update_does_not_depend_on_the_split(engine, tmp_path):
    """With micro-batches of one sample, a rank often has text only while the other has an image in its text."""
    records = []
    for number in range(24):
        talk = [human("What color is this?"), gpt("red")]
        if number % 3:
            talk = [human("What color is <image> this?"), gpt("green" if number % 2 else "blue")]
        image = {"image": f"{number % 2}.png"} if number % 3 else {}
        records.append({"id": str(number), "conversations": talk, **image})
    for number, color in enumerate(((220, 40, 40), (40, 90, 230))):
        Image.new("RGB", (48, 48), color).save(tmp_path / f"{number}.png")
    (tmp_path / "data.json").write_text(json.dumps(records))
    train(*line(tmp_path, tmp_path / "one", "engine=zero0"))
    split = ["stages.joint.micro_batch_size=1", "stages.joint.gradient_checkpointing=true", f"engine={engine}"]
    split += ["engine.parameter_persistence_threshold=0"] if engine == "zero3" else []
    train(*line(tmp_path, tmp_path / "two", *split), ranks=2)
    one, two = (metrics(tmp_path / name, "joint") for name in ("one", "two"))
    assert sum(record["image_tokens"] for record in one) > 0
    for before, after in zip(one, two, strict=True):
        assert (before["samples"], before["image_tokens"]) == (after["samples"], after["image_tokens"])
        for key in ("loss", "grad_norm"):
            assert before[key] == pytest.approx(after[key], rel=2e-3)
    scores = [
        json.loads((tmp_path / name / "joint" / "summary.json").read_text())["validation"] for name in ("one", "two")
    ]
    assert scores[0]["loss"] == pytest.approx(scores[1]["loss"], rel=2e-3)
