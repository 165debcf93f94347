"""Images of their own sizes: the update does not depend on the split, although ranks have different groups of grids."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from tests.integration.native_models import CLASSES, PATCH, build_native
from vlmtrain.interop.importing import import_model

from ..conftest import gpt, human, metrics, train

SIZES = [(60, 36), (36, 60), (48, 48), (84, 24)]
ZERO_3 = ["engine=zero3", "engine.parameter_persistence_threshold=0"]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Records about no image, one or two images, of four sizes."""
    folder = tmp_path_factory.mktemp("sizes")
    records = []
    for i in range(24):
        names = [f"{(i + k) % 4}.png" for k in range(i % 3)]
        asked = "<image>\n" * len(names) + "What color is this?"
        talk = {"id": str(i), "conversations": [human(asked), gpt("red" if i % 2 else "blue")]}
        records.append(talk | ({"image": names} if names else {}))
    for number, size in enumerate(SIZES):
        image = Image.new("RGB", size, (220, 40, 40))
        image.paste((40, 90, 230), (4, 4, 20, 12 + number))
        image.save(folder / f"{number}.png")
    (folder / "data.json").write_text(json.dumps(records))
    return folder


def line(data: Path, run_dir: Path, *more: str) -> list[str]:
    return [
        *("recipe=llava_1_5", "mini=true", "data=llava_json", f"data.images={data}", f"run_dir={run_dir}"),
        *(f"data.{split}={data / 'data.json'}" for split in ("align", "instruct", "validation")),
        *("stages.align.max_steps=1", "stages.align.batch_size=4", "stages.instruct.batch_size=8", "workers=0"),
        *("stages.instruct.max_steps=3", "stages.instruct.train.vision=1e-4", "validation.final_samples=6"),
        *("stages.instruct.image_fit=native", "stages.instruct.image_pixels=[576,4096]"),
        *("validation.samples=6", "validation.max_new_tokens=2", "precision=fp32", *more),
    ]


def scores(run_dir: Path) -> dict:
    return json.loads((run_dir / "instruct" / "summary.json").read_text())["validation"]


# ldp is called once per grid; qwen3_vl_merger once, with levels for the language model
@pytest.mark.parametrize("connector", [["connector=ldp"], ["connector=qwen3_vl_merger", "connector.levels=2"]])
def test_the_update_does_not_depend_on_the_split(connector, data, tmp_path):
    train(*line(data, tmp_path / "one", *connector, "engine=zero0"))
    split = ["stages.instruct.micro_batch_size=1", "workers=2"]
    train(*line(data, tmp_path / "two", *connector, *ZERO_3, *split), ranks=2)
    packed = ["stages.instruct.layout=packed", "stages.instruct.max_length=128", "engine=zero2"]
    train(*line(data, tmp_path / "packed", *connector, *packed), ranks=2)
    one, two = (metrics(tmp_path / name, "instruct") for name in ("one", "two"))
    for before, after in zip(one, two, strict=True):
        for key in ("samples", "image_tokens", "target_tokens"):
            assert before[key] == after[key]
        for key in ("loss", "grad_norm"):
            assert before[key] == pytest.approx(after[key], rel=2e-3)
    assert scores(tmp_path / "one")["loss"] == pytest.approx(scores(tmp_path / "two")["loss"], rel=2e-3)
    assert metrics(tmp_path / "packed", "instruct")[0]["image_tokens"] > 0


@pytest.mark.parametrize(
    "family", ["qwen3_vl", *(pytest.param(name, marks=pytest.mark.slow) for name in CLASSES if name != "qwen3_vl")]
)
def test_published_models_train_on_one_and_two_ranks(family, data, tmp_path):
    """Everything trains, the encoder too; a micro-batch of two ranks is often without images on one of them."""
    build_native(tmp_path / "hf", family)
    import_model(tmp_path / "hf", tmp_path / "model")
    limits = f"stages.instruct.image_pixels=[{16 * PATCH**2},{64 * PATCH**2}]"
    more = [f"init_from={tmp_path / 'model'}", "stage=instruct", "stages.instruct.template=chat", limits]
    more += ["stages.instruct.max_length=400", "stages.instruct.train.connector=1e-4", "stages.instruct.train.llm=1e-4"]
    train(*line(data, tmp_path / "one", *more, "engine=zero0"))
    split = ["stages.instruct.micro_batch_size=1", "workers=0"]
    train(*line(data, tmp_path / "two", *more, *ZERO_3, *split), ranks=2)
    one, two = (metrics(tmp_path / name, "instruct") for name in ("one", "two"))
    for before, after in zip(one, two, strict=True):
        assert (before["samples"], before["image_tokens"]) == (after["samples"], after["image_tokens"])
        assert before["loss"] == pytest.approx(after["loss"], rel=2e-3)
        assert before["grad_norm"] == pytest.approx(after["grad_norm"], rel=2e-3)


def test_cached_features_give_the_same_run(data, tmp_path):
    frozen = ["stages.instruct.train.vision=null", "connector=mlp"]
    train(*line(data, tmp_path / "plain", *frozen))
    cache = f"features.cache={tmp_path / 'cache'}"
    for name in ("cold", "warm"):
        train(*line(data, tmp_path / name, *frozen, cache))
        summary = json.loads((tmp_path / name / "instruct" / "summary.json").read_text())
        assert summary["feature_cache"]["misses"] == (4 if name == "cold" else 0) < summary["feature_cache"]["hits"]
    plain, cold, warm = (metrics(tmp_path / name, "instruct") for name in ("plain", "cold", "warm"))
    assert [step["loss"] for step in plain] == [step["loss"] for step in cold] == [step["loss"] for step in warm]
