"""Vision encoders: the hidden layer that they return, its grid, and the image size."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import open_clip
import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from vlmtrain.model.parts import module_state
from vlmtrain.model.vision import ENCODERS, HFVision, VisionEncoder, build_vision, load_vision

BLOCKS, WIDTH, PATCH, SIDE = 3, 16, 8, 32
LAYERS = (-1, -2, 1)
MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.3, 0.4]
COMMON = {
    "hidden_size": WIDTH,
    "intermediate_size": 32,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 2,
    "image_size": SIDE,
    "patch_size": PATCH,
}
DINO = {key: value for key, value in COMMON.items() if key != "intermediate_size"} | {"mlp_ratio": 2}
HF_MODELS = {
    "clip": lambda: CLIPVisionModel(CLIPVisionConfig(**COMMON)),
    "siglip": lambda: SiglipVisionModel(SiglipVisionConfig(**COMMON)),
    "dinov2": lambda: Dinov2Model(Dinov2Config(**DINO)),
    "dinov2_registers": lambda: Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**DINO, num_register_tokens=4)),
}
PREFIX = {"clip": 1, "siglip": 0, "dinov2": 1, "dinov2_registers": 5}
OPEN_CLIP = {
    "embed_dim": 12,
    "vision_cfg": {"image_size": SIDE, "layers": BLOCKS, "width": WIDTH, "head_width": 8, "patch_size": PATCH},
    "text_cfg": {"context_length": 8, "vocab_size": 32, "width": 16, "heads": 2, "layers": 1},
}
TIMM = {
    "embed_dim": 12,
    "vision_cfg": {"timm_model_name": "test_vit", "timm_pool": "", "timm_proj": "linear", "image_size": 160},
    "text_cfg": OPEN_CLIP["text_cfg"],
}


def pictures(height: int = SIDE, width: int = SIDE) -> Tensor:
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(1))


def stir(model: nn.Module) -> nn.Module:
    """Randomize all parameters: newly initialized position tables and norms would hide errors."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


@pytest.fixture(params=HF_MODELS)
def hf(request, tmp_path) -> tuple[str, nn.Module, Path]:
    """Name, model, and the folder in which it was saved."""
    torch.manual_seed(0)
    model = stir(HF_MODELS[request.param]())
    model.save_pretrained(tmp_path / "hf")
    (tmp_path / "hf" / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": MEAN, "image_std": STD, "size": {"height": SIDE, "width": SIDE}})
    )
    return request.param, model, tmp_path / "hf"


def run(encoder: VisionEncoder, images: Tensor):
    with torch.no_grad():
        return encoder.eval()(images)


def block_outputs(model: nn.Module, call) -> list[Tensor]:
    """The output of each transformer block, recorded by hooks on the blocks."""
    (blocks,) = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == BLOCKS]
    seen = []
    hooks = [
        block.register_forward_hook(lambda _, __, out: seen.append(out[0] if isinstance(out, tuple) else out))
        for block in blocks
    ]
    with torch.no_grad():
        call()
    for hook in hooks:
        hook.remove()
    assert len(seen) == BLOCKS
    return seen


def exact(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=0)


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


# Hugging Face


@pytest.mark.parametrize("layer", LAYERS)
def test_hf_returns_the_hidden_state_and_its_block(hf, layer):
    name, model, folder = hf
    encoder = build_vision("hf", path=str(folder), layer=layer)
    features = run(encoder, pictures())
    with torch.no_grad():
        hidden = model(pictures(), output_hidden_states=True).hidden_states
    assert len(hidden) == BLOCKS + 1
    prefix = PREFIX[name]
    exact(features.patches, hidden[layer][:, prefix:].reshape(2, SIDE // PATCH, SIDE // PATCH, WIDTH))
    if prefix:
        exact(features.prefix, hidden[layer][:, :prefix])
    else:
        assert features.prefix is None
    block = block_outputs(model, lambda: model(pictures()))[layer - 1 if layer > 0 else layer]
    close(features.patches.flatten(1, 2), block[:, prefix:])


def test_hf_returns_further_levels(hf):
    name, model, folder = hf
    features = run(build_vision("hf", path=str(folder), layer=-1, levels=[1, -2]), pictures())
    with torch.no_grad():
        hidden = model(pictures(), output_hidden_states=True).hidden_states
    assert len(features.levels) == 2
    for level, state in zip(features.levels, (hidden[1], hidden[2])):
        exact(level, state[:, PREFIX[name] :].reshape(2, 4, 4, WIDTH))


@pytest.mark.parametrize(
    "layer, levels, runs", [(-2, None, BLOCKS - 1), (1, None, 1), (1, [-2, 1], BLOCKS - 1), (-1, [1], BLOCKS)]
)
def test_hf_runs_only_the_blocks_of_a_frozen_encoder_that_are_needed(hf, layer, levels, runs):
    _, _, folder = hf
    encoder = build_vision("hf", path=str(folder), layer=layer, levels=levels).eval()
    whole = run(encoder, pictures())
    (blocks,) = [m for m in encoder.modules() if isinstance(m, nn.ModuleList) and len(m) == BLOCKS]
    seen = []
    for block in blocks:
        block.register_forward_hook(lambda *_: seen.append(1))
    encoder.requires_grad_(False)
    few = run(encoder, pictures())
    assert len(seen) == runs
    exact(few.patches, whole.patches)
    assert (few.prefix is None) == (whole.prefix is None)
    for one, other in zip(few.levels, whole.levels, strict=True):
        exact(one, other)


def test_hf_reads_geometry_from_the_folder(hf):
    _, _, folder = hf
    encoder = build_vision("hf", path=str(folder))
    assert encoder.layer == -2 and encoder.width == WIDTH
    assert encoder.image_size == (SIDE, SIDE) and encoder.grid == (4, 4)
    assert encoder.image_mean == tuple(MEAN) and encoder.image_std == tuple(STD)
    other = build_vision("hf", path=str(folder), image_mean=[0.1] * 3, image_std=[0.9] * 3)
    assert other.image_mean == (0.1,) * 3 and other.image_std == (0.9,) * 3


@pytest.mark.parametrize("size", [48, (48, 32), (16, 40)])
def test_hf_interpolates_positions_for_another_size(hf, size):
    name, model, folder = hf
    height, width = (size, size) if isinstance(size, int) else size
    encoder = build_vision("hf", path=str(folder), image_size=size, layer=-1)
    assert encoder.grid == (height // PATCH, width // PATCH)
    features = run(encoder, pictures(height, width))
    assert features.patches.shape == (2, *encoder.grid, WIDTH)
    assert (0 if features.prefix is None else features.prefix.shape[1]) == PREFIX[name]
    flag = {} if name.startswith("dinov2") else {"interpolate_pos_encoding": True}
    with torch.no_grad():
        hidden = model(pictures(height, width), output_hidden_states=True, **flag).hidden_states[-1]
    exact(features.patches.flatten(1, 2), hidden[:, PREFIX[name] :])


def raster(encoder: VisionEncoder, image: Tensor) -> tuple[int, int]:
    """Row and column of the feature that one bright patch changes most."""
    row, column = 1, 2
    bright = image.clone()
    bright[:, :, row * PATCH : (row + 1) * PATCH, column * PATCH : (column + 1) * PATCH] += 30
    change = (run(encoder, bright).patches - run(encoder, image).patches).norm(dim=-1)[0]
    return divmod(int(change.argmax()), change.shape[1])


def calm(model: nn.Module) -> nn.Module:
    """Scale down attention and MLPs, so that a feature depends mostly on its own patch."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in ("layers.", "layer.", "resblocks.", "trunk.blocks.")):
                parameter.mul_(0.05)
    return model


@pytest.mark.parametrize("size", [(32, 32), (48, 32), (16, 40)])
def test_hf_patches_are_in_raster_order(hf, size):
    _, model, folder = hf
    calm(model).save_pretrained(folder)
    encoder = build_vision("hf", path=str(folder), image_size=size, layer=1)
    assert raster(encoder, pictures(*size)[:1]) == (1, 2)


def test_hf_saved_and_loaded_is_the_same(hf, tmp_path):
    _, _, folder = hf
    encoder = build_vision("hf", path=str(folder), image_size=(48, 32), layer=1).eval()
    encoder.save(tmp_path / "saved", module_state(encoder))
    again = load_vision(tmp_path / "saved").eval()
    assert (again.image_size, again.layer, again.grid) == ((48, 32), 1, (6, 4))
    assert (again.image_mean, again.image_std, again.width) == (encoder.image_mean, encoder.image_std, WIDTH)
    state, other = encoder.state_dict(), again.state_dict()
    assert state.keys() == other.keys() and all(state[name].equal(other[name]) for name in state)
    exact(run(again, pictures(48, 32)).patches, run(encoder, pictures(48, 32)).patches)


def test_hf_uses_the_vision_tower_of_a_complete_clip(tmp_path):
    torch.manual_seed(0)
    text = {**COMMON, "vocab_size": 50, "max_position_embeddings": 8}
    model = stir(CLIPModel(CLIPConfig(vision_config=COMMON, text_config=text, projection_dim=8)))
    model.save_pretrained(tmp_path)
    encoder = build_vision("hf", path=str(tmp_path), layer=-2, image_mean=MEAN, image_std=STD)
    with torch.no_grad():
        hidden = model.vision_model(pictures(), output_hidden_states=True).hidden_states[-2]
    exact(run(encoder, pictures()).patches.flatten(1, 2), hidden[:, 1:])


@pytest.mark.parametrize("layer", [0, BLOCKS + 1, -BLOCKS - 1])
def test_a_missing_layer_is_an_error(hf, layer):
    _, _, folder = hf
    with pytest.raises(ValueError, match=rf"vision\.layer={layer} is out of range for an encoder of 3 blocks"):
        build_vision("hf", path=str(folder), layer=layer)
    with pytest.raises(ValueError, match=rf"vision\.layer={layer} is out of range"):
        build_vision("open_clip", model_config=OPEN_CLIP, layer=layer)


def test_hf_refuses_a_size_that_patches_do_not_divide(hf):
    _, _, folder = hf
    for size, shown in ((30, "30x30"), ((32, 36), "32x36"), (4, "4x4")):
        with pytest.raises(ValueError, match=rf"vision\.image_size={shown} is not a multiple of .* patch size 8"):
            build_vision("hf", path=str(folder), image_size=size)


def test_hf_without_normalization_says_what_to_set(hf):
    _, _, folder = hf
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(ValueError, match=r"set vision\.image_mean and vision\.image_std"):
        build_vision("hf", path=str(folder))
    assert build_vision("hf", path=str(folder), image_mean=MEAN, image_std=STD).image_size == (SIDE, SIDE)


def test_hf_refuses_a_folder_without_a_model(tmp_path):
    with pytest.raises(ValueError, match=r"vision\.path=.* is not a Hugging Face model folder"):
        build_vision("hf", path=str(tmp_path))


# open_clip


@pytest.fixture
def clip() -> VisionEncoder:
    torch.manual_seed(0)
    return stir(build_vision("open_clip", model_config=OPEN_CLIP, layer=-2))


def plain_open_clip(encoder: VisionEncoder, config: dict) -> nn.Module:
    """open_clip's own model with the same image tower."""
    model = open_clip.CLIP(config["embed_dim"], config["vision_cfg"], config["text_cfg"], output_dict=True)
    model.visual.load_state_dict({k.removeprefix("visual."): v for k, v in encoder.state_dict().items()})
    return model.eval()


@pytest.mark.parametrize("layer", LAYERS)
def test_open_clip_returns_the_output_of_a_block(layer):
    torch.manual_seed(0)
    encoder = stir(build_vision("open_clip", model_config=OPEN_CLIP, layer=layer))
    model = plain_open_clip(encoder, OPEN_CLIP)
    outputs = block_outputs(model.visual, lambda: model.encode_image(pictures()))
    block = outputs[layer - 1 if layer > 0 else layer]
    assert block.shape == (2, 1 + 16, WIDTH)
    features = run(encoder, pictures())
    close(features.prefix, block[:, :1])
    close(features.patches, block[:, 1:].reshape(2, 4, 4, WIDTH))


def test_open_clip_returns_further_levels(tmp_path):
    encoder = stir(build_vision("open_clip", model_config=OPEN_CLIP, layer=-1, levels=[1, -2]))
    model = plain_open_clip(encoder, OPEN_CLIP)
    outputs = block_outputs(model.visual, lambda: model.encode_image(pictures()))
    features = run(encoder, pictures())
    for tokens, block in zip((features.patches, *features.levels), (outputs[2], outputs[0], outputs[1]), strict=True):
        close(tokens, block[:, 1:].reshape(2, 4, 4, WIDTH))
    encoder.save(tmp_path, module_state(encoder))
    for one, other in zip(run(load_vision(tmp_path), pictures()).levels, features.levels, strict=True):
        exact(one, other)
    with torch.no_grad():
        close(encoder.pooled(pictures()), model.encode_image(pictures()))


def test_open_clip_pools_as_open_clip_does(clip):
    model = plain_open_clip(clip, OPEN_CLIP)
    with torch.no_grad():
        close(clip.pooled(pictures()), model.encode_image(pictures()))


def test_open_clip_supports_timm_towers():
    torch.manual_seed(0)
    encoder = stir(build_vision("open_clip", model_config=TIMM, layer=-1))
    model = plain_open_clip(encoder, TIMM)
    images = pictures(160, 160)
    seen = []
    model.visual.trunk.blocks[-1].register_forward_hook(lambda _, __, out: seen.append(out))
    with torch.no_grad():
        pooled = model.encode_image(images)
        features = run(encoder, images)
        close(features.patches.flatten(1, 2), seen[0][:, features.prefix.shape[1] :])
        close(features.prefix, seen[0][:, : features.prefix.shape[1]])
        close(encoder.pooled(images), pooled)
    assert features.patches.shape[1:3] == encoder.grid


@pytest.mark.parametrize("size", [48, (48, 32), (16, 40)])
def test_open_clip_builds_any_size(size):
    encoder = calm(stir(build_vision("open_clip", model_config=OPEN_CLIP, image_size=size, layer=1)))
    height, width = (size, size) if isinstance(size, int) else size
    assert encoder.grid == (height // PATCH, width // PATCH)
    features = run(encoder, pictures(height, width))
    assert features.patches.shape == (2, *encoder.grid, WIDTH) and features.prefix.shape == (2, 1, WIDTH)
    assert raster(encoder, pictures(height, width)[:1]) == (1, 2)


@pytest.fixture
def named_model(tmp_path) -> tuple[str, Path]:
    """The name of an open_clip model, and a file with weights for it."""
    (tmp_path / "tiny-test-vit.json").write_text(json.dumps(OPEN_CLIP))
    open_clip.add_model_config(tmp_path / "tiny-test-vit.json")
    torch.manual_seed(0)
    model = stir(open_clip.CLIP(12, OPEN_CLIP["vision_cfg"], OPEN_CLIP["text_cfg"]))
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    return "tiny-test-vit", tmp_path / "weights.pt"


def test_open_clip_interpolates_published_positions(named_model):
    name, file = named_model
    own = build_vision("open_clip", name=name, pretrained=str(file))
    exact(own.visual.positional_embedding, torch.load(file)["visual.positional_embedding"])
    larger = build_vision("open_clip", name=name, pretrained=str(file), image_size=(64, 64))
    assert larger.grid == (8, 8) and run(larger, pictures(64, 64)).patches.shape == (2, 8, 8, WIDTH)
    old, new = own.visual.positional_embedding, larger.visual.positional_embedding
    exact(new[0], old[0])  # the position of the class token is not in the grid
    expected = nn.functional.interpolate(
        old[1:].reshape(1, 4, 4, WIDTH).permute(0, 3, 1, 2), size=(8, 8), mode="bicubic", antialias=True
    )
    close(new[1:].reshape(8, 8, WIDTH), expected[0].permute(1, 2, 0))
    wide = build_vision("open_clip", name=name, pretrained=str(file), image_size=(32, 64))
    assert wide.grid == (4, 8) and run(wide, pictures(32, 64)).patches.shape == (2, 4, 8, WIDTH)


def test_weights_that_open_clip_cannot_load_are_named(named_model, tmp_path):
    name, _ = named_model
    (tmp_path / "words.pt").write_text("words")
    torch.save({"visual.proj": torch.zeros(1)}, tmp_path / "other.pt")
    for given in ("no_such_tag", tmp_path / "words.pt", tmp_path / "other.pt"):
        with pytest.raises(ValueError, match=f"vision.pretrained={given}: open_clip cannot load .* {name}") as error:
            build_vision("open_clip", name=name, pretrained=str(given))
        assert "expected a file, or one of its tags: there are none" in str(error.value) and "\n" not in str(
            error.value
        )


@pytest.mark.parametrize("by_name", [True, False])
def test_open_clip_saved_and_loaded_is_the_same(named_model, tmp_path, by_name):
    name, file = named_model
    size = (48, 32)
    options = {"name": name, "pretrained": str(file)} if by_name else {"model_config": OPEN_CLIP}
    encoder = build_vision("open_clip", image_size=size, layer=1, **options).eval()
    encoder.save(tmp_path / "saved", module_state(encoder))
    again = load_vision(tmp_path / "saved").eval()
    assert (again.image_size, again.layer, again.grid) == (size, 1, (6, 4))
    assert (again.image_mean, again.image_std) == (encoder.image_mean, encoder.image_std)
    state, other = encoder.state_dict(), again.state_dict()
    assert state.keys() == other.keys() and all(state[key].equal(other[key]) for key in state)
    exact(run(again, pictures(*size)).patches, run(encoder, pictures(*size)).patches)
    with torch.no_grad():
        exact(again.pooled(pictures(*size)), encoder.pooled(pictures(*size)))


def test_open_clip_keeps_its_activation(tmp_path):
    torch.manual_seed(0)
    gelu = build_vision("open_clip", model_config=OPEN_CLIP, layer=-1)
    quick = build_vision("open_clip", model_config={**OPEN_CLIP, "quick_gelu": True}, layer=-1)
    quick.load_state_dict(gelu.state_dict())
    assert not torch.allclose(run(quick, pictures()).patches, run(gelu, pictures()).patches)
    quick.save(tmp_path, module_state(quick))
    exact(run(load_vision(tmp_path), pictures()).patches, run(quick, pictures()).patches)


def test_building_does_not_change_the_given_configuration():
    given = copy.deepcopy(OPEN_CLIP)
    build_vision("open_clip", model_config=given, image_size=48)
    assert given == OPEN_CLIP


def test_open_clip_refuses_what_it_cannot_build():
    with pytest.raises(
        ValueError, match=r"vision\.name=ViT-L-14-663 is not an open_clip model\. Did you mean 'ViT-L-14"
    ):
        build_vision("open_clip", name="ViT-L-14-663")
    for options in ({}, {"name": "ViT-B-32", "model_config": OPEN_CLIP}):
        with pytest.raises(ValueError, match=r"exactly one of vision\.name and vision\.model_config"):
            build_vision("open_clip", **options)
    for change, words in (
        ({"foo": 1}, r"unknown key 'vision\.model_config\.foo'"),
        (
            {"vision_cfg": {"layrs": 1}},
            r"unknown key 'vision\.model_config\.vision_cfg\.layrs'",
        ),
        ({"text_cfg": {"wdth": 1}}, r"unknown key 'vision\.model_config\.text_cfg\.wdth'\. Did you mean 'width'"),
    ):
        with pytest.raises(ValueError, match=words):
            build_vision("open_clip", model_config={**OPEN_CLIP, **change})
    with pytest.raises(ValueError, match=r"vision\.model_config\.vision_cfg is missing"):
        build_vision("open_clip", model_config={"embed_dim": 8})
    for size in (30, (32, 36)):
        with pytest.raises(ValueError, match="is not a multiple of the encoder's patch size 8"):
            build_vision("open_clip", model_config=OPEN_CLIP, image_size=size)


@pytest.mark.parametrize("image_size", [(32, 32), (24, 40)])
def test_an_encoder_resized_equals_one_loaded_at_that_size(image_size, tmp_path):
    """Compared with open_clip's own interpolation at load, and again after saving."""
    import open_clip
    from open_clip.model import resize_pos_embed

    torch.manual_seed(0)
    config = {
        "embed_dim": 12,
        "vision_cfg": {"image_size": 16, "layers": 2, "width": 24, "head_width": 12, "patch_size": 4},
        "text_cfg": {"context_length": 8, "vocab_size": 32, "width": 16, "heads": 2, "layers": 1},
    }
    encoder = build_vision("open_clip", model_config=config, layer=-1).eval()
    state = {f"visual.{k.removeprefix('visual.')}": v.clone() for k, v in encoder.state_dict().items()}
    encoder.resize(image_size)
    larger = open_clip.CLIP(**{**config, "vision_cfg": {**config["vision_cfg"], "image_size": image_size}})
    resize_pos_embed(state, larger)
    pictures = torch.randn(2, 3, *image_size)
    larger.visual.load_state_dict({k.removeprefix("visual."): v for k, v in state.items()})
    wanted = larger.visual.eval().forward_intermediates(pictures, indices=[1], output_fmt="NLC")["image_intermediates"][
        0
    ]
    with torch.no_grad():
        found = encoder(pictures).patches
        torch.testing.assert_close(found.flatten(1, 2), wanted)
        encoder.save(tmp_path, encoder.state_dict())
        assert torch.equal(load_vision(tmp_path).eval()(pictures).patches, found)
    assert found.shape[1:3] == (image_size[0] // 4, image_size[1] // 4) == encoder.grid
    with pytest.raises(ValueError, match="multiple of the encoder's patch size"):
        encoder.resize(30)


def test_a_published_size_that_patches_do_not_fill_is_kept():
    """SigLIP's 384 pixels with patches of 14 make 27 x 27 patches, and the last six pixels are ignored."""
    config = {**OPEN_CLIP, "vision_cfg": {**OPEN_CLIP["vision_cfg"], "image_size": 3 * 8 + 6}}
    encoder = build_vision("open_clip", model_config=config)
    assert encoder.image_size == (30, 30) and encoder.grid == (3, 3)
    images = torch.randn(2, 3, 30, 30)
    edged = images.clone()
    edged[..., 24:, :], edged[..., 24:] = 0, 0
    found = run(encoder, images).patches
    assert found.shape[1:3] == (3, 3) and torch.equal(found, run(encoder, edged).patches)
    with torch.device("meta"):
        assert build_vision("open_clip", name="ViT-SO400M-14-SigLIP-384", weights=False).grid == (27, 27)


OTHER_KINDS = {
    "convnext": {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2},
    "swin": {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "image_size": SIDE},
    "vit_mae": COMMON,
    "pixtral": COMMON,
    "resnet": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]},
    "segformer": {},
    "sam": {},
    "bert": {"hidden_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": 2},
}


@pytest.mark.parametrize("kind", OTHER_KINDS)
def test_a_model_without_a_grid_in_every_block_is_refused_in_one_line(kind, tmp_path):
    AutoConfig.for_model(kind, **OTHER_KINDS[kind]).save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": MEAN, "image_std": STD}))
    with pytest.raises(ValueError, match="does not return one grid of patches from every block") as refused:
        build_vision("hf", path=str(tmp_path), weights=False)
    assert str(tmp_path) in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "name", ["swin_base_patch4_window7_224", "RN50", "hf-hub:nobody/nothing", "local-dir:/nowhere"]
)
def test_an_open_clip_name_without_a_grid_or_a_model_is_refused_in_one_line(name):
    with torch.device("meta"), pytest.raises(ValueError, match=r"has no patch grid|cannot read its config") as refused:
        build_vision("open_clip", name=name, weights=False)
    assert "\n" not in str(refused.value)


def test_a_registered_subclass_is_loaded_as_itself(tmp_path):
    """An encoder of a user's module that derives from a class of the package keeps its own behavior."""

    class Louder(HFVision):
        def forward(self, images):
            features = super().forward(images)
            return features._replace(patches=7 * features.patches)

    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    tower = CLIPVisionModel(CLIPVisionConfig(**shape, image_size=16, patch_size=8))
    ENCODERS["louder"] = Louder
    try:
        encoder = Louder(tower, {"image_size": 16, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}, -1).eval()
        encoder.provider = "louder"
        encoder.save(tmp_path, module_state(encoder))
        again, images = load_vision(tmp_path), torch.randn(1, 3, 16, 16)
        assert type(again) is Louder and again.provider == "louder"
        assert again.eval()(images).patches.equal(encoder(images).patches)
    finally:
        del ENCODERS["louder"]


def test_an_encoder_without_an_attribute_is_named():
    class Nameless(VisionEncoder):
        @classmethod
        def build(cls, **options):
            return cls()

    ENCODERS["nameless"] = Nameless
    try:
        with pytest.raises(ValueError, match=r"vision\.provider=nameless: Nameless has no attribute image_size"):
            build_vision("nameless")
    finally:
        del ENCODERS["nameless"]
