"""Encoders of several scales (S2), compared with the published procedure, one crop at a time."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPVisionConfig, CLIPVisionModel

from tests.conftest import metrics, train
from tests.stages import make_stage
from vlmtrain.cli import main
from vlmtrain.distributed.world import World
from vlmtrain.interop.fitting import DoesNotFit
from vlmtrain.interop.towers import as_hf_tower
from vlmtrain.model.blocks import block_list
from vlmtrain.model.parts import module_state, state_hash
from vlmtrain.model.vision import (
    ENCODERS,
    MultiscaleVision,
    VisionEncoder,
    build_vision,
    describe_vision,
    load_vision,
    vision_from,
)
from vlmtrain.settings import compose
from vlmtrain.settings.free_keys import completed
from vlmtrain.training.cost.stage import measure_views
from vlmtrain.training.feature_cache import FeatureCache
from vlmtrain.training.run import train_run

ALONE = World(0, 1, torch.device("cpu"))
OPEN_CLIP = {
    "embed_dim": 12,
    "vision_cfg": {"image_size": [24, 40], "layers": 3, "width": 16, "head_width": 8, "patch_size": 8},
    "text_cfg": {"context_length": 8, "vocab_size": 32, "width": 16, "heads": 2, "layers": 1},
}
CLIP = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
LOOK = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}


class Registered(VisionEncoder):
    """An encoder as a module may register it."""

    patch_size, width, num_blocks, image_mean, image_std = (8, 8), 6, 1, (0.5,) * 3, (0.5,) * 3

    def __init__(self, image_size, layer, levels, bias):
        super().__init__()
        self.image_size = image_size
        self.blocks = nn.ModuleList([nn.Conv2d(3, 6, 8, stride=8, bias=bias)])
        self.set_layers(layer, levels)

    @classmethod
    def build(cls, *, image_size, layer, levels, weights=True, dtype=torch.float32, bias=True):
        return cls(tuple(image_size or (24, 40)), layer, levels, bias).to(dtype)

    def _resize(self, before):
        pass

    def forward(self, images):
        return self.as_features(lambda layer: self.blocks[0](images).flatten(2).mT, images)


@pytest.fixture(params=["open_clip", "hf", "registered"])
def options(request, tmp_path, monkeypatch) -> dict:
    """Arguments of an encoder of 3 x 5 patches."""
    if request.param == "open_clip":
        return {"provider": "open_clip", "model_config": OPEN_CLIP, "layer": -1, "levels": [1, 2]}
    if request.param == "registered":
        monkeypatch.setitem(ENCODERS, "registered", Registered)
        return {"provider": "registered", "image_size": None, "layer": 1, "levels": [1], "bias": False}
    torch.manual_seed(0)
    CLIPVisionModel(CLIPVisionConfig(**CLIP, image_size=40, patch_size=8)).save_pretrained(tmp_path / "hf")
    path = {"path": str(tmp_path / "hf"), "image_size": (24, 40)}
    return {"provider": "hf", **path, "layer": -1, "levels": [1, 2], **LOOK}


def build(options: dict, scales: list[int] | None) -> VisionEncoder:
    torch.manual_seed(0)
    return build_vision(**options, scales=scales).double().eval()


def pictures(height: int, width: int) -> Tensor:
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(1)).double().requires_grad_()


def by_hand(encoder: VisionEncoder, images: Tensor, scales: list[int]) -> list[Tensor]:
    """Features and levels of the published procedure: resize, cut, encode each crop, merge, average, concatenate."""
    (height, width), columns = encoder.image_size, []
    for scale in scales:
        large = F.interpolate(images, (scale * height, scale * width), mode="bicubic")
        rows = []
        for top in range(0, scale * height, height):
            crops = [large[:, :, top : top + height, left : left + width] for left in range(0, scale * width, width)]
            found = [encoder(crop) for crop in crops]
            grids = [(features.patches, *features.levels) for features in found]
            rows.append([torch.cat(grid, 2) for grid in zip(*grids)])
        wholes = [torch.cat(column, 1).permute(0, 3, 1, 2) for column in zip(*rows)]
        columns.append([F.interpolate(whole, encoder.grid, mode="area") for whole in wholes])
    return [torch.cat(grids, 1).permute(0, 2, 3, 1) for grids in zip(*columns)]


@pytest.mark.parametrize("scales", [[1, 2], [1, 2, 3], [1, 3]])
def test_features_and_gradients_are_those_of_the_published_procedure(options, scales):
    plain, encoder = build(options, None), build(options, scales)
    height, width = 24 * scales[-1], 40 * scales[-1]
    assert encoder.image_size == (height, width) and encoder.grid == plain.grid == (3, 5)
    assert encoder.width == plain.width * len(scales) and encoder.grid_of((height, width)) == (3, 5)
    images = pictures(height, width)
    found = encoder(images)
    assert found.prefix is None
    grids, expected = (found.patches, *found.levels), by_hand(plain, images, scales)
    weights = [torch.randn_like(grid) for grid in expected]
    for one, other in zip(grids, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
    gradients = [
        torch.autograd.grad(sum((weight * grid).sum() for weight, grid in zip(weights, made)), images)[0]
        for made in (grids, expected)
    ]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-6)


def test_one_scale_is_the_encoder_without_its_prefix(options):
    plain, encoder, images = build(options, None), build(options, [1]), pictures(24, 40)
    expected, found = plain(images), encoder(images)
    assert found.prefix is None and found.patches.equal(expected.patches)
    assert all(one.equal(other) for one, other in zip(found.levels, expected.levels, strict=True))


def test_half_precision_is_resized_in_full_precision(options):
    encoder = build(options, [1, 2]).bfloat16()
    found = encoder(pictures(48, 80).bfloat16()).patches
    assert found.dtype == torch.bfloat16
    images = pictures(48, 80).bfloat16()
    small = F.interpolate(images.float(), (24, 40), mode="bicubic").bfloat16()
    assert found[..., : encoder.encoder.width].equal(encoder.encoder(small).patches)


def test_saved_and_loaded_it_is_the_same(options, tmp_path):
    encoder = build(options, [1, 2]).float()
    encoder.resize((32, 24))  # of the first scale
    assert (encoder.image_size, encoder.grid, encoder.patch_size) == ((64, 48), (4, 3), (16, 16))
    encoder.save(tmp_path / "saved", module_state(encoder))
    again = load_vision(tmp_path / "saved").eval()
    assert isinstance(again, MultiscaleVision) and again.scales == (1, 2)
    images = pictures(64, 48).float()
    assert again(images).patches.equal(encoder(images).patches)
    with torch.device("meta"):
        empty = vision_from(json.loads(json.dumps(describe_vision(encoder))))
    for each in (again, empty):
        same = ("provider", "image_size", "grid", "width", "layer", "levels", "num_blocks", "image_mean", "image_std")
        assert all(getattr(each, name) == getattr(encoder, name) for name in same)
    file = next(f for name in ("vlmtrain.json", "config.json") if (f := tmp_path / "saved" / name).exists())
    file.write_text(json.dumps({**json.loads(file.read_text()), "scales": 3}))
    with pytest.raises(ValueError, match=r"stages\.a\.image_size=30x30 is not a multiple of the encoder.s patch size"):
        encoder.resize(30, "stages.a.image_size")
    with pytest.raises(ValueError, match=rf"{file}: vision\.scales=3: expected ascending integers that start at 1"):
        load_vision(tmp_path / "saved")


def test_scales_are_part_of_the_identity_in_the_feature_cache(options, tmp_path):
    encoders = [build(options, scales) for scales in (None, [1, 2], [1, 2, 4], [1, 2])]
    encoders[-1].save(tmp_path / "saved", module_state(encoders[-1]))
    encoders.append(load_vision(tmp_path / "saved", torch.float64))
    folders = [FeatureCache(tmp_path / "cache", each, "the same", 10**9).folder for each in encoders]
    assert len(set(folders)) == 3 and folders[1] == folders[3] == folders[4]
    hashes = [state_hash(module_state(each)) for each in encoders]
    assert hashes[1] == hashes[4]


def test_layers_and_blocks_are_those_of_the_encoder():
    plain, encoder = (build_vision("open_clip", model_config=OPEN_CLIP, scales=scales) for scales in (None, [1, 2]))
    encoder.give_levels(2)
    assert encoder.levels == encoder.encoder.levels == [1, 2]
    assert block_list(encoder) == ("encoder.visual.transformer.resblocks", 3)
    assert block_list(plain) == ("visual.transformer.resblocks", 3)


def test_all_crops_are_planned():
    costs = []
    with torch.device("meta"):
        for scales in (None, [1, 2]):
            encoder = build_vision("open_clip", model_config=OPEN_CLIP, scales=scales).requires_grad_(False)
            costs.append(measure_views({"vision": encoder}, [], make_stage(), 1, encoder.image_size)["vision"])
    assert costs[1].flops == 5 * costs[0].flops and costs[1].tokens == 15
    assert len(costs[1].block_flops) == len(costs[0].block_flops) == 2


@pytest.mark.parametrize("scales", ["[2,3]", "[1,1]", "[1,3,2]", "[]", "[1,2.0]", "[true]", "2", "x"])
def test_other_scales_are_refused(scales):
    expected = r"vision\.scales=.*: expected ascending integers that start at 1, such as \[1,2,3\], or null"
    with pytest.raises(ValueError, match=expected):
        compose(["recipe=llava_1_5", "mini=true", f"vision.scales={scales}"])
    with pytest.raises(ValueError, match=r"vision\.scales=\[2\]: expected ascending integers"):
        build_vision("open_clip", model_config=OPEN_CLIP, scales=[2])


@pytest.mark.parametrize(
    "line, words",
    [
        (
            ["recipe=llava_1_5", "stages.instruct.image_fit=native", "stages.instruct.image_pixels=[576,4096]"],
            "image_fit=native cannot be combined with vision.scales=[1, 2]",
        ),
        (["recipe=clip"], "objective=contrastive needs one embedding per image"),
    ],
)
def test_what_several_scales_cannot_do_is_refused(line, words, capsys):
    with pytest.raises(SystemExit):
        main(["plan", *line, "mini=true", "vision.scales=[1,2]"])
    assert words in capsys.readouterr().err


def test_no_class_of_transformers_holds_several_scales():
    with pytest.raises(DoesNotFit, match="MultiscaleVision has no counterpart in transformers"):
        as_hf_tower(build_vision("open_clip", model_config=OPEN_CLIP, image_size=24, scales=[1, 2]))


def test_a_run_of_an_earlier_version_has_one_scale():
    assert completed({"vision": {"provider": "open_clip"}, "llm": {}, "stages": {}})["vision"]["scales"] is None


def test_a_recipe_trains_it(tmp_path):
    line = ["recipe=llava_1_5", "mini=true", "workers=0"]
    line += [f"stages.{stage}.{key}" for stage in ("align", "instruct") for key in ("max_steps=2", "batch_size=4")]
    scaled = [*line, "vision.scales=[1,2]", "stages.instruct.train.vision=1e-4", f"features.cache={tmp_path / 'cache'}"]
    scaled += ["validation.final_samples=2", "validation.samples=2", "validation.max_new_tokens=2"]
    train(*scaled, f"run_dir={tmp_path / 'run'}")
    assert len(metrics(tmp_path / "run", "instruct")) == 2
    model = tmp_path / "run" / "instruct" / "model"
    assert load_vision(model / "vision").image_size == (96, 96)
    with pytest.raises(ValueError, match=r"vision\.scales=\[1, 3\], but the model in init_from=.* with \[1, 2\]"):
        more = ["vision.scales=[1,3]", "stage=instruct", f"init_from={model}", f"run_dir={tmp_path / 'other'}"]
        train_run(compose([*line, *more]), ALONE)
