"""Training on videos that several encoders see."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ..conftest import gpt, human, metrics, train
from ..media import draw_frames

ENCODERS = "{first: {provider: tiny, image_size: 24}, second: {provider: tiny, layer: -2}}"
FRAMES = (3, 5, 2)  # of three videos, at a frame per second, of which at most four are shown
TOKENS = {"first": 4, "second": 16}  # of a frame: 24 and 48 pixels in patches of 12


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    for number, count in enumerate(FRAMES):
        draw_frames(folder / str(number), count)
    asked = [human("<video>\nWhat color is this?"), gpt("red")]
    (folder / "data.json").write_text(
        json.dumps([{"id": str(number), "video": str(number), "conversations": asked} for number in range(len(FRAMES))])
    )
    return folder


def line(data: Path, run_dir: Path, *more: str) -> list[str]:
    stages = "align", "instruct"
    return [
        *("recipe=llava_1_5", "mini=true", "vision=several", f"vision.encoders={ENCODERS}", "data=llava_json"),
        *(f"data.{split}={data / 'data.json'}" for split in stages),
        *("data.validation=null", f"data.images={data}", f"data.videos={data}", "data.frames_fps=1"),
        *("stages.align.template=chat", f"run_dir={run_dir}", "workers=0", "precision=fp32"),
        *(f"stages.{stage}.{key}" for stage in stages for key in ("max_steps=2", "batch_size=3", "video.frames=4")),
        *more,
    ]


JOINS = {
    "channels": (["vision.grid=second"], TOKENS["second"]),
    "tokens": (["vision.join=tokens"], sum(TOKENS.values())),
}


@pytest.mark.parametrize("join", JOINS)
def test_two_steps_on_videos(join, data, tmp_path):
    """With cached features of a frozen encoder, and in chunks, a run is the same."""
    options, tokens = JOINS[join]
    trained = '[{match: "vision.second.blocks[1:]", lr: 1e-3}]'
    options = [*options, f"stages.instruct.groups={trained}", "stages.instruct.train.vision=null"]
    train(*line(data, tmp_path / "plain", *options))
    plain = metrics(tmp_path / "plain", "instruct")
    assert [step["image_tokens"] for step in plain] == [sum(min(4, count) for count in FRAMES) * tokens] * 2
    cached = [f"features.cache={tmp_path / 'cache'}", "stages.instruct.encoder_batch_size=2"]
    for name in ("cold", "warm"):
        train(*line(data, tmp_path / name, *options, *cached))
        found = metrics(tmp_path / name, "instruct")
        for key in ("loss", "grad_norm"):
            assert [step[key] for step in found] == pytest.approx([step[key] for step in plain], rel=1e-4)
    assert json.loads((tmp_path / "warm" / "instruct" / "summary.json").read_text())["feature_cache"]["misses"] == 0


@pytest.mark.parametrize(
    "pool, said",
    [
        ("features", "pool=features: vision.join=tokens: expected a 2x2 grid of the first encoder, got 1x1"),
        ("bilinear", "pool=bilinear needs a connector whose tokens form a grid"),
        ("window", "pool=window needs a connector with windows"),
    ],
)
def test_pooling_that_a_connector_for_each_encoder_does_not_support(data, tmp_path, pool, said):
    options = [*JOINS["tokens"][0], f"stages.instruct.video.pool={pool}", "stages.instruct.video.stride=2"]
    refused = train(*line(data, tmp_path, *options), check=False)
    assert refused.returncode == 2 and f"stages.instruct.video.{said}" in refused.stderr
