"""Cached features: the run is bit-identical, and damaged entries are computed again."""

from __future__ import annotations

import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import CLIPVisionConfig, CLIPVisionModel

from vlmtrain.connectors import VisionFeatures
from vlmtrain.data.cached_features import pixel_key
from vlmtrain.model.vision import HFVision, build_vision, load_vision
from vlmtrain.training.feature_cache import FeatureCache
from vlmtrain.visual import Cached

from ..conftest import data_overrides, metrics, run, train

VISION = {
    "embed_dim": 12,
    "vision_cfg": {"image_size": 16, "layers": 3, "width": 24, "head_width": 12, "patch_size": 8},
    "text_cfg": {"context_length": 8, "vocab_size": 32, "width": 16, "heads": 2, "layers": 1},
}


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    return build_vision("open_clip", model_config=VISION, layer=-1, levels=[1, 2]).eval()


def key_of(image: torch.Tensor) -> str:
    return pixel_key(image, with_shape=False)


def cache(folder: Path, encoder, limit: int = 10**9) -> FeatureCache:
    return FeatureCache(folder, encoder, "weights", limit)


@torch.no_grad()
def features(cache: FeatureCache, images: torch.Tensor):
    return cache(images, Cached(tuple(map(key_of, images))))


@torch.no_grad()
def test_cached_features_equal_computed_ones(tmp_path, encoder):
    images = torch.randn(5, 3, 16, 16)
    first, again = cache(tmp_path, encoder), cache(tmp_path, encoder)
    computed, read = features(first, images), features(again, images[[3, 0, 4]])
    wanted = encoder(images)
    assert (first.hits, first.misses, again.hits, again.misses) == (0, 5, 3, 0)
    for found, own, plain in zip((read.patches, read.prefix, *read.levels),
                                 (computed.patches, computed.prefix, *computed.levels),
                                 (wanted.patches, wanted.prefix, *wanted.levels)):  # fmt: skip
        assert torch.equal(own, plain) and torch.equal(found, plain[[3, 0, 4]])


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-5], lambda data: data[:-3] + bytes([data[-3] ^ 4]) + data[-2:], lambda data: b""]
)
def test_a_damaged_entry_is_computed_again(tmp_path, encoder, damage):
    images = torch.randn(2, 3, 16, 16)
    wanted = features(cache(tmp_path, encoder), images)
    file = next(tmp_path.rglob(f"{key_of(images[1])}.safetensors"))
    file.write_bytes(damage(file.read_bytes()))
    again = cache(tmp_path, encoder)
    assert torch.equal(features(again, images).patches, wanted.patches)
    assert (again.hits, again.misses) == (1, 1)
    assert cache(tmp_path, encoder).files.read(key_of(images[1])) is not None


def test_no_flipped_bit_of_an_entry_is_an_error_or_other_features(tmp_path, encoder):
    images = torch.randn(1, 3, 16, 16)
    wanted = features(cache(tmp_path, encoder), images)
    file = next(tmp_path.rglob("*.safetensors"))
    intact, again = file.read_bytes(), cache(tmp_path, encoder)
    header = 8 + int.from_bytes(intact[:8], "little")
    for bit in (*range(8 * header), *range(8 * header, 8 * len(intact), 61)):
        flipped = bytearray(intact)
        flipped[bit // 8] ^= 1 << bit % 8
        file.write_bytes(flipped)
        row = again.files.read(key_of(images[0]))
        if row is not None:
            found = (row.patches, row.prefix, *row.levels)
            assert all(map(torch.equal, found, (own[0] for own in (wanted.patches, wanted.prefix, *wanted.levels))))


def test_an_entry_without_its_prefix_is_computed_again(tmp_path, encoder):
    images = torch.randn(1, 3, 16, 16)
    wanted = features(cache(tmp_path, encoder), images)
    file = next(tmp_path.rglob("*.safetensors"))
    intact = file.read_bytes()
    for name in (b'"patches"', b'"prefix"'):
        file.write_bytes(intact.replace(name, name[:-2] + b'_"'))
        again = cache(tmp_path, encoder)
        assert torch.equal(features(again, images).prefix, wanted.prefix) and again.misses == 1


def test_another_encoder_layer_or_size_has_its_own_entries(tmp_path, encoder):
    images = torch.randn(1, 3, 16, 16)
    features(cache(tmp_path, encoder), images)
    other = build_vision("open_clip", model_config=VISION, layer=-2, levels=[1, 2]).eval()
    for changed in (FeatureCache(tmp_path, encoder, "other weights", 10**9), cache(tmp_path, other)):
        features(changed, images)
        assert (changed.hits, changed.misses) == (0, 1)


def open_clip_tower(**changes):
    return build_vision("open_clip", model_config=VISION | changes)


def hf_tower(**changes):
    sizes = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 3, "image_size": 16, "patch_size": 8}
    config = CLIPVisionConfig(**{**sizes, "num_attention_heads": 2, **changes})
    geometry = {"image_size": 16, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    return HFVision(CLIPVisionModel(config), geometry, layer=-2)


@pytest.mark.parametrize(
    "build, change",
    [
        (open_clip_tower, {"quick_gelu": True}),
        (open_clip_tower, {"vision_cfg": VISION["vision_cfg"] | {"head_width": 6}}),
        (hf_tower, {"hidden_act": "gelu"}),
        (hf_tower, {"num_attention_heads": 4}),
        (hf_tower, {"layer_norm_eps": 1e-2}),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
@torch.no_grad()
def test_equal_weights_in_another_architecture_have_their_own_entries(build, change, tmp_path):
    plain, changed = build().eval(), build(**change).eval()
    changed.load_state_dict(plain.state_dict())
    images = torch.randn(2, 3, 16, 16)
    features(cache(tmp_path, plain), images)
    assert torch.equal(features(cache(tmp_path, changed), images).patches, changed(images).patches)
    assert not torch.equal(plain(images).patches, changed(images).patches)


@pytest.mark.parametrize("build", [open_clip_tower, hf_tower])
def test_a_saved_encoder_finds_the_entries_of_the_original(build, tmp_path):
    plain = build().eval()
    plain.save(tmp_path / "once", plain.state_dict())
    once = load_vision(tmp_path / "once").eval()
    once.save(tmp_path / "twice", once.state_dict())
    twice = load_vision(tmp_path / "twice").eval()
    assert len({cache(tmp_path, each).folder for each in (plain, once, twice)}) == 1


def test_a_full_cache_is_used_without_writing(tmp_path, encoder):
    images = torch.randn(6, 3, 16, 16)
    small = cache(tmp_path, encoder, limit=9000)
    assert torch.equal(features(small, images).patches, features(cache(tmp_path / "b", encoder), images).patches)
    files = list(tmp_path.glob("[!b]*/*/*.safetensors"))
    assert 0 < len(files) < 6 and sum(file.stat().st_size for file in files) <= 9000


def size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*.safetensors"))


def test_the_limit_holds_for_concurrent_writers(tmp_path, encoder):
    images = torch.randn(48, 3, 16, 16)
    features(cache(tmp_path / "one", encoder), images[:1])
    entry = size_of(tmp_path / "one")
    limit = 10 * entry
    several = [cache(tmp_path / "all", encoder, limit) for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda each, own: [features(each, image[None]) for image in own], several, images.chunk(4)))
    assert size_of(tmp_path / "all") == limit  # all of it is used
    del several
    features(cache(tmp_path / "all", encoder, limit), images)
    assert size_of(tmp_path / "all") == limit


def test_deleted_entries_can_be_written_again(tmp_path, encoder):
    images = torch.randn(3, 3, 16, 16)
    features(cache(tmp_path, encoder), images)
    before = size_of(tmp_path)
    for file in tmp_path.rglob("*.safetensors"):
        file.unlink()
    features(cache(tmp_path, encoder, before), images)
    assert size_of(tmp_path) == before


def test_the_same_images_written_by_two_processes_count_once(tmp_path, encoder):
    images = torch.randn(6, 3, 16, 16)
    features(cache(tmp_path / "one", encoder), images)
    limit = size_of(tmp_path / "one")
    two = [cache(tmp_path / "two", encoder, limit) for _ in range(2)]
    row = VisionFeatures(torch.zeros(2, 2, 24), torch.zeros(1, 24), (torch.zeros(2, 2, 24),) * 2)
    for image in images:
        for each in two:
            each._write(key_of(image), row)
    assert size_of(tmp_path / "two") == limit


def test_partial_files_of_a_killed_run_count_and_are_removed(tmp_path, encoder):
    images = torch.randn(4, 3, 16, 16)
    features(cache(tmp_path, encoder), images)
    size = size_of(tmp_path)
    file = next(tmp_path.rglob("*.safetensors"))
    old, young = file.with_suffix(".0123abcd.partial"), file.with_suffix(".4567abcd.partial")
    for partial in (old, young):
        partial.write_bytes(bytes(size))
    os.utime(old, (0, 0))
    features(cache(tmp_path, encoder, 2 * size), torch.randn(4, 3, 16, 16))
    assert not old.exists() and young.exists() and size_of(tmp_path) == size
    os.utime(young, (0, 0))
    features(cache(tmp_path, encoder, 2 * size), torch.randn(4, 3, 16, 16))
    assert not young.exists() and size_of(tmp_path) == 2 * size


def test_a_read_only_folder_is_read(tmp_path, encoder):
    images = torch.randn(2, 3, 16, 16)
    wanted = features(cache(tmp_path, encoder), images[:1])
    for file in (path for path in tmp_path.iterdir() if path.is_file()):
        file.unlink()
        file.mkdir()  # root may write to a read-only folder, but cannot write a file where there is a folder
    again = cache(tmp_path, encoder)
    assert torch.equal(features(again, images).patches[:1], wanted.patches)
    assert (again.hits, again.misses) == (1, 1)


@torch.no_grad()
def test_rounded_features_take_half_the_disk_and_are_the_same_each_time(tmp_path, encoder):
    images = torch.randn(4, 3, 16, 16)
    rounded = FeatureCache(tmp_path / "half", encoder, "weights", 10**9, torch.bfloat16)
    first, again = features(rounded, images), features(rounded, images)
    assert (rounded.hits, rounded.misses) == (4, 4)
    assert first.patches.dtype == torch.float32 and torch.equal(first.patches, again.patches)
    assert torch.equal(first.patches, encoder(images).patches.bfloat16().float())
    features(cache(tmp_path / "whole", encoder), images)
    half, whole = (
        sum(
            len(load_file(file)["patches"].view(torch.uint8).flatten()) for file in (tmp_path / name).rglob("*.safete*")
        )
        for name in ("half", "whole")
    )
    assert half * 2 == whole > 0


def line_of(files: dict[str, Path]) -> list[str]:
    line = ["recipe=llava_1_5", "mini=true", *data_overrides(files), "data.validation=null", "workers=1"]
    for stage in ("align", "instruct"):
        line += [f"stages.{stage}.max_steps=8", f"stages.{stage}.batch_size=8"]
    return line


def fill(*line: str, check: bool = True):
    return run(sys.executable, "-m", "vlmtrain.cli", "features", *line, check=check)


def test_a_precomputed_cache_has_every_image(llava_files, tmp_path):
    line = [*line_of(llava_files), "precision=bf16", f"features.cache={tmp_path / 'cache'}"]
    done = json.loads(fill(*line, "--json").stdout)
    assert done["align"] == {"known": 20, "computed": 4, "problems": []}  # four images, used by 24 records
    assert done["instruct"]["computed"] == 4 < done["instruct"]["known"]  # the same four, but padded
    train(*line, f"run_dir={tmp_path / 'run'}")
    for stage in ("align", "instruct"):
        used = json.loads((tmp_path / "run" / stage / "summary.json").read_text())["feature_cache"]
        assert used["misses"] == 0 < used["hits"]


def test_features_of_a_trained_encoder_cannot_be_precomputed(llava_files, tmp_path):
    line = [*line_of(llava_files), f"features.cache={tmp_path / 'cache'}", "stages.align.train.vision=1e-5"]
    done = fill(*line, check=False)
    assert done.returncode == 2
    assert "no features can be computed in advance: in each of the stages align, instruct" in done.stderr
    assert "features.cache=off" in fill("recipe=llava_1_5", "mini=true", check=False).stderr


@pytest.mark.parametrize("wrong", ["features.dtype=fp8", "stage=allign"])
def test_what_training_would_refuse_is_refused(wrong, llava_files, tmp_path):
    done = fill(*line_of(llava_files), f"features.cache={tmp_path / 'cache'}", wrong, check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr and wrong.split("=")[1] in done.stderr


def test_a_run_keeps_its_rounding(llava_files, tmp_path):
    line = [*line_of(llava_files), "stage=align", f"run_dir={tmp_path / 'run'}", f"features.cache={tmp_path / 'cache'}"]
    train(*line, "features.dtype=bf16")
    refused = train(*line, check=False)
    assert refused.returncode == 2 and "features.dtype" in refused.stderr
    wrong = train(*line, "features.dtype=fp8", check=False)
    assert "features.dtype=fp8: expected null or bf16" in wrong.stderr


def test_a_run_is_the_same_with_and_without_the_cache(llava_files, tmp_path):
    line = line_of(llava_files)
    train(*line, f"run_dir={tmp_path / 'plain'}")
    train(*line, f"run_dir={tmp_path / 'cached'}", f"features.cache={tmp_path / 'cache'}")
    for stage in ("align", "instruct"):
        plain, cached = (metrics(tmp_path / run, stage) for run in ("plain", "cached"))
        assert [r["loss"] for r in cached] == [r["loss"] for r in plain]
        assert [r["grad_norm"] for r in cached] == [r["grad_norm"] for r in plain]
        used = json.loads((tmp_path / "cached" / stage / "summary.json").read_text())["feature_cache"]
        assert used["hits"] > used["misses"] <= 4
