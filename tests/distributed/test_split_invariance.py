"""The same global batch gives the same update for any number of ranks, accumulation steps and any ZeRO stage.

The data mixes text-only records with records of one and of two images. With two ranks and a micro-batch size of one,
a rank with only text often runs at the same time as a rank with images.
"""

from __future__ import annotations

import pytest

from ..conftest import data_overrides, metrics, train

STEPS = 20
# so that all parameters are partitioned, as at published sizes
ZERO_3 = ["engine=zero3", "engine.parameter_persistence_threshold=0"]
SPLITS = {
    "two ranks": (2, []),
    "padded": (1, ["stages.instruct.padding=true"]),
    "accumulation 2": (1, ["stages.instruct.micro_batch_size=4"]),
    "accumulation 4": (1, ["stages.instruct.micro_batch_size=2"]),
    "zero1": (2, ["engine=zero1", "stages.instruct.micro_batch_size=1"]),
    "zero2": (2, ["engine=zero2", "stages.instruct.micro_batch_size=1"]),
    "zero3": (2, [*ZERO_3, "stages.instruct.micro_batch_size=1"]),
}


def line(files, run_dir, *more: str) -> list[str]:
    return [
        "recipe=llava_1_5",
        "mini=true",
        *data_overrides(files),
        "data.validation=null",
        f"run_dir={run_dir}",
        "workers=0",
        "stages.align.max_steps=2",
        "stages.align.batch_size=8",
        f"stages.instruct.max_steps={STEPS}",
        "stages.instruct.batch_size=8",
        "stages.instruct.train.vision=1e-4",
        *more,
    ]


@pytest.fixture(scope="module")
def reference(llava_files, tmp_path_factory) -> list[dict]:
    run_dir = tmp_path_factory.mktemp("reference")
    train(*line(llava_files, run_dir))
    return metrics(run_dir, "instruct")


WAYS = {
    "packed": ["stages.instruct.layout=packed", "stages.instruct.max_length=96"],
    "tiles": ["stages.instruct.image_fit=tiles"],
    "packed tiles": ["stages.instruct.layout=packed", "stages.instruct.image_fit=tiles"],
}


@pytest.mark.parametrize("way", WAYS)
def test_packed_rows_and_tiles_do_not_depend_on_the_split(way, llava_files, tmp_path):
    train(*line(llava_files, tmp_path / "one", *WAYS[way]))
    split = [*ZERO_3, "stages.instruct.micro_batch_size=1", "workers=2"]
    train(*line(llava_files, tmp_path / "two", *WAYS[way], *split), ranks=2)
    compare(metrics(tmp_path / "two", "instruct"), metrics(tmp_path / "one", "instruct"))


@pytest.mark.parametrize("split", SPLITS)
def test_losses_do_not_depend_on_the_split(split, reference, llava_files, tmp_path):
    ranks, more = SPLITS[split]
    train(*line(llava_files, tmp_path, *more), ranks=ranks)
    compare(metrics(tmp_path, "instruct"), reference)


def compare(found: list[dict], reference: list[dict]) -> None:
    # a wrong gradient would change the first gradient norm or the losses after the update
    assert found[0]["grad_norm"] == pytest.approx(reference[0]["grad_norm"], rel=1e-5)
    for step in range(5):
        assert found[step]["loss"] == pytest.approx(reference[step]["loss"], rel=1e-5), f"step {step + 1}"
    assert found[-1]["loss"] == pytest.approx(reference[-1]["loss"], rel=1e-4)
    for key in ("samples", "tokens", "image_tokens", "target_tokens"):
        assert [r[key] for r in found] == [r[key] for r in reference]
