"""Videos beside images and text: the update does not depend on the split, and cached frames give the same run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from ..conftest import gpt, human, metrics, train

ZERO_3 = ["engine=zero3", "engine.parameter_persistence_threshold=0"]
COLORS = ((220, 40, 40), (40, 90, 230), (40, 170, 70))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Records with a video of 3 to 6 frames, an image, both, or neither."""
    folder = tmp_path_factory.mktemp("videos")
    for number, (color, size) in enumerate(zip(COLORS, ((48, 48), (100, 48), (48, 100)))):
        (folder / str(number)).mkdir()
        Image.new("RGB", size, color).save(folder / f"{number}.png")
        for frame in range(3 + number):
            image = Image.new("RGB", (48, 48), color)
            image.paste((0, 0, 0), (8 * frame, 8, 8 * frame + 8, 24))
            image.save(folder / str(number) / f"{frame}.png")
    records = []
    for i in range(24):
        kinds = [kind for kind, shown in (("video", i % 4 in (0, 2)), ("image", i % 4 in (1, 2))) if shown]
        asked = "".join(f"<{kind}>\n" for kind in kinds) + "What color is this?"
        record = {"id": str(i), "conversations": [human(asked), gpt("red" if i % 3 else "blue")]}
        records.append(record | {kind: str(i % 3) + (".png" if kind == "image" else "") for kind in kinds})
    (folder / "data.json").write_text(json.dumps(records))
    return folder


def staged(**options: object) -> list[str]:
    """Settings of both stages."""
    return [f"stages.{stage}.{key}={value}" for stage in ("align", "instruct") for key, value in options.items()]


def shown(**options: object) -> list[str]:
    """Settings of videos, for both stages."""
    return staged(**{f"video.{key}": value for key, value in options.items()})


def line(data: Path, run_dir: Path, *more: str) -> list[str]:
    return [
        *("recipe=llava_1_5", "mini=true", "data=llava_json", f"data.images={data}", f"data.videos={data}"),
        *(f"data.{split}={data / 'data.json'}" for split in ("align", "instruct", "validation")),
        *("stages.align.max_steps=1", "stages.align.batch_size=4", "stages.align.template=chat", f"run_dir={run_dir}"),
        *("stages.instruct.batch_size=8", "stages.instruct.max_steps=3", *shown(frames=4), "workers=0"),
        *("validation.samples=4", "validation.final_samples=4", "validation.max_new_tokens=2", "precision=fp32", *more),
    ]


WAYS = {
    "window": ["connector=attentional_pool", "connector.num_heads=2", *shown(pool="window", stride=3)],
    "newlines": shown(pool="bilinear", stride=2, newline="row"),
    # canvases of three sizes, for a connector that is called once per size
    "crops": [
        "llm.new_tokens=['<im_start>','<im_end>','<low_res_im_start>']",
        "fusion.attention=images",
        *staged(image_fit="tiles", image_tile_style="molmo2", image_tiles="[[1,1],[1,2],[2,1]]", image_tiles_margin=1),
    ],
}


@pytest.mark.parametrize("way", ["window", "newlines", pytest.param("crops", marks=pytest.mark.slow)])
def test_the_update_does_not_depend_on_the_split(way, data, tmp_path):
    """With micro-batches of one sample, ranks differ in what they show: nothing, images, videos or both.

    Two frames are encoded at once, so they also differ in the number of chunks.
    """
    trained = [*WAYS[way], "stages.instruct.train.vision=1e-4"]
    train(*line(data, tmp_path / "one", *trained, "engine=zero0"))
    split = ["stages.instruct.micro_batch_size=1", "stages.instruct.encoder_batch_size=2", "workers=2"]
    train(*line(data, tmp_path / "two", *trained, *ZERO_3, *split), ranks=2)
    one, two = (metrics(tmp_path / name, "instruct") for name in ("one", "two"))
    for before, after in zip(one, two, strict=True):
        assert (before["samples"], before["image_tokens"]) == (after["samples"], after["image_tokens"])
        for key in ("loss", "grad_norm"):
            assert before[key] == pytest.approx(after[key], rel=2e-3)


def test_cached_frames_give_the_same_run(data, tmp_path):
    train(*line(data, tmp_path / "plain", *WAYS["newlines"]))
    cache = f"features.cache={tmp_path / 'cache'}"
    for name in ("cold", "warm"):
        train(*line(data, tmp_path / name, *WAYS["newlines"], cache))
        summary = json.loads((tmp_path / name / "instruct" / "summary.json").read_text())
        assert summary["feature_cache"]["misses"] == 0 < summary["feature_cache"]["hits"] or name == "cold"
    plain, cold, warm = (metrics(tmp_path / name, "instruct") for name in ("plain", "cold", "warm"))
    assert [step["loss"] for step in plain] == [step["loss"] for step in cold] == [step["loss"] for step in warm]
