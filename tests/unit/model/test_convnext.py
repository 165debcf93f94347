"""ConvNeXt towers: hidden states are the outputs of the stages, compared with timm's stages called by hand."""

from __future__ import annotations

import re

import open_clip
import pytest
import timm
import torch
from torch import Tensor, nn

from tests.conftest import metrics, train
from tests.stages import make_stage
from vlmtrain.interop.fitting import DoesNotFit
from vlmtrain.interop.towers import as_hf_tower
from vlmtrain.model.blocks import block_list
from vlmtrain.model.parts import module_state
from vlmtrain.model.vision import OpenClipVision, build_vision, load_vision
from vlmtrain.training.cost.measuring import Meter
from vlmtrain.training.trainable import trained_groups

WIDTHS, STRIDES = (24, 32, 48, 64), (4, 8, 16, 32)
CONFIG = {
    "embed_dim": 12,
    "vision_cfg": {
        "timm_model_name": "test_convnext",
        "timm_model_pretrained": False,
        "timm_pool": "",
        "timm_proj": "linear",
        "image_size": 64,
    },
    "text_cfg": {"context_length": 8, "vocab_size": 32, "width": 16, "heads": 2, "layers": 1},
}


def tower(layer: int = -1, **options) -> OpenClipVision:
    """A tower whose parameters are all random."""
    torch.manual_seed(0)
    encoder = build_vision("open_clip", model_config=CONFIG, layer=layer, **options)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return encoder.eval()


def pictures(height: int = 64, width: int = 64) -> Tensor:
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(1))


def stages_by_hand(encoder: OpenClipVision, images: Tensor, number: int) -> Tensor:
    """Output ``(B, C, H, W)`` of a stage of timm's model with the same weights."""
    model = timm.create_model("test_convnext", num_classes=0).eval()
    model.load_state_dict({k.removeprefix("trunk."): v for k, v in encoder.visual.state_dict().items() if "trunk" in k})
    x = model.stem(images)
    for stage in model.stages[:number]:
        x = stage(x)
    return x


@pytest.mark.parametrize("layer, number", [(-1, 4), (-2, 3), (1, 1)])
def test_a_layer_is_the_output_of_a_stage_and_gradients_flow(layer, number):
    encoder, images = tower(layer), pictures(64, 96)
    assert encoder.num_blocks == 4 and encoder.width == WIDTHS[number - 1]
    assert encoder.patch_size == (STRIDES[number - 1],) * 2
    features = encoder(images)
    expected = stages_by_hand(encoder, images, number)
    assert features.prefix is None and expected.shape[2:] == encoder.grid_of((64, 96))
    torch.testing.assert_close(features.patches, expected.permute(0, 2, 3, 1), rtol=1e-5, atol=1e-5)
    features.patches.square().sum().backward()
    moved = {name.split(".")[3] for name, p in encoder.named_parameters() if p.grad is not None and "stages" in name}
    assert moved == {str(stage) for stage in range(number)} and encoder.visual.trunk.stem[0].weight.grad.any()


def test_published_towers_have_the_grids_of_their_stages():
    with torch.device("meta"):
        base, large = (
            build_vision("open_clip", name=name, layer=layer, weights=False)
            for name, layer in (("convnext_base_w", -1), ("convnext_xxlarge", -2))
        )
    assert block_list(base) == ("visual.trunk.stages", 4)  # its third stage has 27 blocks
    assert (base.image_size, base.grid, base.width) == ((256, 256), (8, 8), 1024)
    assert (large.image_size, large.grid, large.width) == ((256, 256), (16, 16), 1536)


def test_levels_with_other_grids_are_refused():
    said = r"levels \[1, 4\] do not have the grid and width of vision\.layer=-1: .* 24 channels at a stride of 4; "
    with pytest.raises(ValueError, match=said):
        tower(levels=[1, 4])
    with pytest.raises(ValueError, match=r"levels \[1, 2, 3, 4\] do not have the grid .* a connector that reads no"):
        tower().give_levels(4)
    encoder = tower(levels=[4, -1])
    features = encoder(pictures())
    assert [level.equal(features.patches) for level in features.levels] == [True, True]


def test_it_encodes_images_of_any_size():
    encoder = tower(-2)
    encoder.check_any_size()
    shown = (pictures(48, 32)[0], pictures(64, 96)[0], pictures(48, 32)[1])
    found = encoder.encode(shown)
    assert found.grids == ((3, 2), (4, 6), (3, 2))
    alone = torch.cat([encoder(image[None]).patches.flatten(0, 2) for image in shown])
    torch.testing.assert_close(found.patches, alone, rtol=1e-5, atol=1e-5)
    encoder.resize((96, 32))
    assert encoder.grid == (6, 2) and encoder(pictures(96, 32)).patches.shape == (2, 6, 2, 48)
    with pytest.raises(ValueError, match="40x40 is not a multiple of the encoder's patch size 16"):
        encoder.resize(40)


def test_saved_and_loaded_it_is_the_same_and_pools_as_open_clip(tmp_path):
    encoder, images = tower(-2, image_size=(96, 64)), pictures(96, 64)
    encoder.save(tmp_path, module_state(encoder))
    again = load_vision(tmp_path).eval()
    assert (again.grid, again.width, again.patch_size) == (encoder.grid, 48, (16, 16)) and encoder.grid == (6, 4)
    with torch.no_grad():
        assert again(images).patches.equal(encoder(images).patches)
        model = open_clip.CLIP(CONFIG["embed_dim"], CONFIG["vision_cfg"], CONFIG["text_cfg"]).eval()
        model.visual.load_state_dict(encoder.visual.state_dict())
        torch.testing.assert_close(encoder.pooled(images), model.encode_image(images))


def test_patterns_select_stages():
    encoder = tower()
    assert block_list(encoder) == ("visual.trunk.stages", 4)
    names = [name for name, _ in encoder.named_parameters()]
    late = {name for name in names if name.startswith(("visual.trunk.stages.2.", "visual.trunk.stages.3."))}
    stage = make_stage(groups=[{"match": "vision.blocks[2:]", "lr": 1e-4}], train={"connector": 1e-3})
    groups = trained_groups(stage, {"vision": encoder, "connector": nn.Linear(64, 8)})
    assert {name for group in groups if group.part == "vision" for name in group.names} == late
    decayed = make_stage(groups=[{"match": "vision", "lr": 1e-4, "layer_decay": 0.5}], train={"connector": 1e-3})
    groups = trained_groups(decayed, {"vision": encoder, "connector": nn.Linear(64, 8)})
    scales = {name: group.scale for group in groups for name in group.names}
    assert scales["visual.trunk.stem.0.weight"] == 0.5**5 and scales["visual.head.proj.weight"] == 1
    assert scales["visual.trunk.stages.3.blocks.0.conv_dw.weight"] == 0.5


def test_flops_by_hand():
    """Each weight of a convolution or a linear layer is used once for each output position."""
    flops = []
    encoder = tower()
    for module in encoder.visual.trunk.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            channels = module.weight.shape[0]
            module.register_forward_hook(
                lambda layer, _, out, c=channels: flops.append(2 * out.numel() // c * layer.weight.numel())
            )
    with torch.no_grad():
        encoder(pictures()[:1])
    by_hand, meter = sum(flops), Meter()
    meta = tower().to("meta").requires_grad_(False)
    with meter.part("vision", meta, block_list(meta)[0]):
        meta(torch.empty(1, 3, 64, 64, device="meta"))
    found = meter.costs["vision"]
    assert found.flops == pytest.approx(by_hand, rel=1e-6)
    stem = 2 * 16 * 16 * encoder.visual.trunk.stem[0].weight.numel()
    assert set(found.block_flops) == {0, 1, 2, 3} and sum(found.block_flops.values()) == found.flops - stem


def test_no_class_of_transformers_holds_it():
    with pytest.raises(DoesNotFit, match="timm's ConvNeXt has no counterpart in transformers"):
        as_hf_tower(tower())


def test_a_recipe_trains_it(tmp_path):
    config = re.sub(r"'(\w+)':", r"\1:", f"vision.model_config={CONFIG}").replace("False", "false")
    line = ["recipe=llava_1_5", "mini=true", "vision=open_clip", "vision.name=null", "vision.pretrained=null"]
    line += [config, "vision.layer=-1", "vision.levels=null"]
    line += [f"stages.{stage}.{key}" for stage in ("align", "instruct") for key in ("max_steps=2", "batch_size=4")]
    line += ["stages.instruct.groups=[{match: 'vision.blocks[3:]', lr: 1e-3}]", "workers=0"]
    line += ["validation.final_samples=2", "validation.samples=2", "validation.max_new_tokens=2"]
    train(*line, f"run_dir={tmp_path}")
    assert [record["image_tokens"] > 0 for record in metrics(tmp_path, "instruct")] == [True, True]
    before, after = (load_vision(tmp_path / stage / "model" / "vision") for stage in ("align", "instruct"))
    moved = {name for name, value in after.state_dict().items() if not value.equal(before.state_dict()[name])}
    assert moved and all(name.startswith("visual.trunk.stages.3.") for name in moved)
