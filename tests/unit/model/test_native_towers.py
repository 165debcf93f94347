"""Vision encoders of native resolution: equal to the towers of transformers, one image at a time."""

from __future__ import annotations

import json
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    HunYuanVLConfig,
    HunYuanVLForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Siglip2Config,
    Siglip2Model,
)

from vlmtrain.connectors import PackedFeatures, VisionFeatures, build_connector
from vlmtrain.model.vision import ENCODERS, VisionEncoder, build_vision, describe_vision, load_vision, vision_from
from vlmtrain.model.vision.image_attention import NAME, Segments, attend_in_images

PATCH, WIDTH, OUT, DEPTH = 4, 16, 24, 4
LOOK = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]}
QWEN = {"depth": DEPTH, "num_heads": 2, "patch_size": PATCH}
TEXT = {"hidden_size": OUT, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
TEXT |= {"num_key_value_heads": 2, "vocab_size": 40, "bos_token_id": None, "eos_token_id": None, "head_dim": 12}
TEXT |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 2]}}
SIGLIP_TEXT = {"hidden_size": WIDTH, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
SIGLIP_TEXT |= {"vocab_size": 40, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
VISION = {
    "qwen2_vl": QWEN | {"embed_dim": WIDTH, "hidden_size": OUT, "mlp_ratio": 2},
    # windows of 8x8 patches; block 2 sees the picture
    "qwen2_5_vl": QWEN
    | {"hidden_size": WIDTH, "intermediate_size": 20, "out_hidden_size": OUT, "window_size": 32}
    | {"fullatt_block_indexes": [2]},
    "qwen3_vl": QWEN
    | {"hidden_size": WIDTH, "intermediate_size": 20, "out_hidden_size": OUT, "num_position_embeddings": 49}
    | {"deepstack_visual_indexes": [0, 1, 2]},
    "hunyuan_vl": {"hidden_size": WIDTH, "intermediate_size": 20, "num_hidden_layers": DEPTH, "patch_size": PATCH}
    | {"num_attention_heads": 2, "max_image_size": 7 * PATCH, "min_image_size": 4 * PATCH, "rms_norm_eps": 1e-5},
    "siglip2_naflex": {"hidden_size": WIDTH, "intermediate_size": 20, "num_hidden_layers": DEPTH}
    | {"num_attention_heads": 2, "patch_size": PATCH, "num_patches": 25},
}
WHOLE = {
    "qwen2_vl": (Qwen2VLConfig, Qwen2VLForConditionalGeneration),
    "qwen2_5_vl": (Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration),
    "qwen3_vl": (Qwen3VLConfig, Qwen3VLForConditionalGeneration),
    "hunyuan_vl": (HunYuanVLConfig, HunYuanVLForConditionalGeneration),
    "siglip2_naflex": (Siglip2Config, Siglip2Model),
}
FAMILIES = list(WHOLE)
MERGERS = {"qwen2_vl": "qwen2_vl_merger", "qwen2_5_vl": "qwen2_5_vl_merger", "qwen3_vl": "qwen3_vl_merger"}
MERGERS["hunyuan_vl"] = "hunyuan_merger"
# In patches. Windows of 8x8 are ragged, and some images are equally long. There is no grid one patch wide for SigLIP 2,
# because torch's antialiased interpolation on the CPU is wrong for those: every row becomes the first one.
GRIDS = {"qwen": [(10, 6), (4, 12), (8, 8), (12, 4)], "siglip2_naflex": [(3, 7), (5, 5), (1, 9), (7, 3)]}


PREFIXES = {"qwen2_vl": "visual.", "qwen2_5_vl": "visual.", "qwen3_vl": "model.visual.", "hunyuan_vl": "vit."}
PREFIXES["siglip2_naflex"] = "vision_model."


def under_our_names(key: str) -> str:
    """The name of a tensor of HunyuanOCR in the tower, from that in a published file."""
    for theirs, ours in (("dense_h_to_4h", "fc1"), ("dense_4h_to_h", "fc2")):
        key = key.replace(theirs, ours)
    return key.replace("input_layernorm", "layer_norm1").replace("post_attention_layernorm", "layer_norm2")


def scaled(module: nn.Module, seed: int = 0) -> nn.Module:
    """Weights of a module that are large enough for differences to show."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            one_each = parameter.dim() < 2
            parameter.copy_(0.3 * noise + parameter.mean() if one_each else noise / parameter[0].numel() ** 0.5)
    return module


def tower_of(whole: nn.Module) -> nn.Module:
    if isinstance(whole, HunYuanVLForConditionalGeneration):
        return whole.model.vision_tower
    return whole.vision_model if isinstance(whole, Siglip2Model) else whole.model.visual


@cache
def published(family: str) -> nn.Module:
    """A small model with random weights, of which transformers' tower is the reference."""
    config, model = WHOLE[family]
    text = SIGLIP_TEXT if family == "siglip2_naflex" else TEXT
    whole = scaled(model(config(text_config=text, vision_config=VISION[family])))
    return whole.eval()


@pytest.fixture(scope="module", params=FAMILIES)
def family(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Folders of the whole models, as transformers saves them."""
    made = {}
    for name in FAMILIES:
        made[name] = tmp_path_factory.mktemp(name)
        published(name).save_pretrained(made[name])
        (made[name] / "preprocessor_config.json").write_text(json.dumps(LOOK))
    return made


@pytest.fixture
def encoder(family, folders) -> VisionEncoder:
    return build_vision("hf", path=str(folders[family]), layer=-1, levels=[1, 2, 3]).eval()


def grids_of(family: str) -> list[tuple[int, int]]:
    return GRIDS["siglip2_naflex" if family == "siglip2_naflex" else "qwen"]


def images(family: str, seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(3, h * PATCH, w * PATCH, generator=generator) for h, w in grids_of(family)]


def blocked(height: int, width: int) -> list[int]:
    """Raster indices in the published order: squares of 2x2, one after another."""
    corners = [(row, column) for row in range(0, height, 2) for column in range(0, width, 2)]
    return [(row + i) * width + column + j for row, column in corners for i in (0, 1) for j in (0, 1)]


def windowed(height: int, width: int) -> list[int]:
    """Raster indices in the order of windows of 8x8, of squares of 2x2 within each."""

    def key(index: int) -> tuple[int, ...]:
        row, column = divmod(index, width)
        return row // 8, column // 8, row // 2, column // 2, row, column

    return sorted(range(height * width), key=key)


def reference(family: str, image: Tensor) -> tuple[list[Tensor], Tensor | None, list[Tensor]]:
    """Hidden states after each block in raster order, merged features and DeepStack features of transformers' tower."""
    tower, (height, width) = tower_of(published(family)), (image.shape[1] // PATCH, image.shape[2] // PATCH)
    if not family.startswith("qwen"):
        patches = [
            image[:, y * PATCH : (y + 1) * PATCH, x * PATCH : (x + 1) * PATCH]
            for y in range(height)
            for x in range(width)
        ]
        if family == "hunyuan_vl":
            rows = torch.stack([patch.flatten() for patch in patches])
            out = tower(rows, grid_thw=torch.tensor([[1, height, width]]), output_hidden_states=True)
            states = [state[0] for state in (*out.hidden_states[1:DEPTH], out.last_hidden_state)]
            return states, out.pooler_output[0], []
        rows = torch.stack([patch.permute(1, 2, 0).flatten() for patch in patches])
        mask, shape = torch.ones(1, len(rows), dtype=torch.long), torch.tensor([[height, width]])
        out = tower(rows[None], mask, shape, output_hidden_states=True)
        return [state[0] for state in out.hidden_states[1:]], None, []
    cut = [
        image[:, y * PATCH : (y + 1) * PATCH, x * PATCH : (x + 1) * PATCH]
        for y, x in (divmod(index, width) for index in blocked(height, width))
    ]
    rows = torch.stack([torch.stack([patch, patch], 1).flatten() for patch in cut])
    out = tower(rows, grid_thw=torch.tensor([[1, height, width]]), output_hidden_states=True)
    order = (windowed if family == "qwen2_5_vl" else blocked)(height, width)
    states = [state[torch.tensor(order).argsort()] for state in out.hidden_states[1:]]
    return states, out.pooler_output, getattr(out, "deepstack_features", [])


def assert_near(found: Tensor, expected: Tensor, what: str = "") -> None:
    difference = (found - expected).abs().max() / expected.abs().max()
    assert difference <= 1e-5, f"{what}: relative difference {difference:.1e}"


def test_states_are_those_of_transformers(family, encoder):
    shown = images(family)
    assert encoder.provider == family and encoder.num_blocks == DEPTH and encoder.width == WIDTH
    with torch.no_grad():
        found = encoder.encode(tuple(shown), calls=7)
        assert isinstance(found, PackedFeatures) and found.prefix is None
        assert found.grids == tuple(grids_of(family))
        sizes = [height * width for height, width in found.grids]
        columns = [column.split(sizes) for column in (*found.levels, found.patches)]
        for number, image in enumerate(shown):
            states, _, _ = reference(family, image)
            assert len(states) == DEPTH and (states[2] - states[3]).abs().max() > 0.1
            for depth, expected in enumerate(states):
                assert_near(columns[depth][number], expected, f"block {depth}, image {number}")


@pytest.mark.parametrize("family", MERGERS, scope="module")
def test_mergers_of_the_project_follow(family, encoder):
    shown, levels = images(family), 3 if family == "qwen3_vl" else 0
    options = {"levels": levels} if levels else {}
    merger = build_connector(MERGERS[family], in_dim=WIDTH, out_dim=OUT, **options)
    tower = tower_of(published(family))
    parts = tower if levels else tower.patch_merger if family == "hunyuan_vl" else tower.merger
    parts = parts.state_dict()
    if family == "hunyuan_vl":
        merger.load_published({f"model.vision_tower.patch_merger.{name}": each for name, each in parts.items()})
    else:
        merger.load_state_dict({name: parts[name] for name in merger.state_dict()})
    encoder.set_layers(-1, [1, 2, 3] if levels else None)
    with torch.no_grad():
        made = merger(encoder.encode(tuple(shown)))
        expected = [reference(family, image) for image in shown]
    tokens, added = made if levels else (made, ())
    assert_near(tokens, torch.cat([pooled for _, pooled, _ in expected]))
    for number in range(levels):
        assert_near(added[number], torch.cat([deep[number] for _, _, deep in expected]))


def test_an_image_alone_is_as_in_a_batch(family, encoder):
    shown = images(family)
    with torch.no_grad():
        together = encoder.encode(tuple(shown))
        at = 0
        for image, (height, width) in zip(shown, together.grids):
            alone, uniform = encoder.encode((image,)), encoder.encode(torch.stack([image, 0 * image, image]))
            assert isinstance(uniform, VisionFeatures) and uniform.patches.shape == (3, height, width, WIDTH)
            own = [column[at : at + height * width] for column in (together.patches, *together.levels)]
            for one, packed, equal in zip((alone.patches, *alone.levels), own, (uniform.patches, *uniform.levels)):
                torch.testing.assert_close(one, packed, rtol=0, atol=1e-5)
                torch.testing.assert_close(equal[0].flatten(0, 1), packed, rtol=0, atol=1e-5)
                torch.testing.assert_close(equal[2].flatten(0, 1), packed, rtol=0, atol=1e-5)
            at += height * width


def test_gradients_are_those_of_transformers(family, encoder):
    own = [image.requires_grad_() for image in images(family)]
    theirs = [image.requires_grad_() for image in images(family)]
    tower = tower_of(published(family))
    tower.zero_grad()
    found = encoder.encode(tuple(own))
    weights = torch.randn(found.patches.shape, generator=torch.Generator().manual_seed(3))
    (found.patches * weights).sum().backward()
    sizes = [height * width for height, width in found.grids]
    for image, part in zip(theirs, weights.split(sizes)):
        (reference(family, image)[0][-1] * part).sum().backward()
    for ours, expected in zip(own, theirs):
        assert_near(ours.grad, expected.grad, "pixels")
    gradients = {name: parameter.grad for name, parameter in tower.named_parameters()}
    largest = max(gradient.abs().max() for gradient in gradients.values() if gradient is not None)
    names = [name for name, _ in encoder.named_parameters()]
    assert names
    for name, parameter in encoder.named_parameters():
        # The bias of keys has no effect, so that its gradient is rounding only.
        if name.endswith("k_proj.bias"):
            assert parameter.grad.abs().max() < 1e-5 * largest
        else:
            assert_near(parameter.grad, gradients[name], name)
    tower.zero_grad()


def test_every_module_is_called_once(family, encoder):
    """As ZeRO-3 requires, which gathers the tensors of a module around its forward, and nowhere else."""
    expected, calls = encoder.encode(tuple(images(family))), Counter()

    def gather(module: nn.Module, _) -> None:
        calls[module] += 1
        for parameter in module.parameters(recurse=False):
            parameter.data = whole[parameter]

    def release(module: nn.Module, *_) -> None:
        for parameter in module.parameters(recurse=False):
            parameter.data = parameter.data.new_empty(0)

    whole = {parameter: parameter.data for parameter in encoder.parameters()}
    for module in encoder.modules():
        release(module)
        module.register_forward_pre_hook(gather)
        module.register_forward_hook(release)
    with torch.no_grad():
        found = encoder.encode(tuple(images(family)))
    assert found.patches.equal(expected.patches)
    called = {each for each in encoder.modules() if not isinstance(each, nn.ModuleList | nn.ModuleDict)}
    assert calls.keys() == called and set(calls.values()) == {1}


def test_the_device_is_not_waited_for(family, encoder):
    """On the meta device, a value that is read from a tensor is an error."""
    shown = [image.to("meta") for image in images(family)]
    found = encoder.to("meta").encode(tuple(shown))
    assert found.patches.device.type == "meta" and found.patches.shape[1] == WIDTH


def test_weights_keep_their_published_names_and_shapes(family, folders, encoder):
    tensors = load_file(folders[family] / "model.safetensors")
    name = PREFIXES[family]
    if family == "hunyuan_vl":
        tensors = {under_our_names(key): tensor for key, tensor in tensors.items()}
    state = encoder.state_dict()
    for key, tensor in state.items():
        assert tensor.equal(tensors[name + key])
    dropped = {key.removeprefix(name) for key in tensors if key.startswith(name)} - state.keys()
    unused = {"merger", "deepstack_merger_list", "post_layernorm", "head", "perceive"}
    assert {key.split(".")[0] for key in dropped} <= unused
    if family.startswith("qwen"):
        assert state["patch_embed.proj.weight"].shape == (WIDTH, 3, 2, PATCH, PATCH)
    elif family == "hunyuan_vl":
        assert state["embeddings.patch_embedding.weight"].shape == (WIDTH, 3, PATCH, PATCH)
    else:
        assert state["embeddings.patch_embedding.weight"].shape == (WIDTH, 3 * PATCH * PATCH)


def test_saving_and_loading(family, encoder, tmp_path):
    encoder.set_layers(-2, [1])
    encoder.save(tmp_path / "saved", encoder.state_dict())
    again = load_vision(tmp_path / "saved").eval()
    assert type(again) is type(encoder) and again.provider == family
    assert again.describe() == encoder.describe() and again.architecture == encoder.architecture
    shown = tuple(images(family))
    with torch.no_grad():
        one, other = encoder.encode(shown), again.encode(shown)
    assert one.patches.equal(other.patches) and one.levels[0].equal(other.levels[0])
    with torch.device("meta"):
        empty = vision_from(json.loads(json.dumps(describe_vision(encoder))))
    assert empty.state_dict().keys() == encoder.state_dict().keys() and empty.provider == family


def test_building_without_weights_and_by_provider(family, folders):
    path = str(folders[family])
    with torch.device("meta"):
        skeleton = build_vision("hf", path=path, weights=False, dtype=torch.bfloat16)
    assert next(skeleton.parameters()).is_meta and next(skeleton.parameters()).dtype == torch.bfloat16
    assert skeleton.provider == family and skeleton.image_mean == (0.5, 0.4, 0.3)
    by_name = build_vision(family, path=path, image_mean=[0.1] * 3, image_std=[0.9] * 3)
    assert by_name.image_mean == (0.1,) * 3 and by_name.image_size == skeleton.image_size
    nominal = 448 if family.startswith("qwen") else (4 if family == "hunyuan_vl" else 5) * PATCH
    assert by_name.image_size == (nominal, nominal) and by_name.layer == -1
    other = next(name for name in FAMILIES if name != family)
    with pytest.raises(ValueError, match=r"use vision=hf"):
        build_vision(other, path=path)
    assert ENCODERS[family] is type(skeleton)


@pytest.mark.parametrize("kind", ["missing", "shape", "unexpected"])
def test_a_checkpoint_that_does_not_fit_is_refused(family, folders, tmp_path, kind):
    for file in folders[family].glob("*.json"):
        (tmp_path / file.name).write_text(file.read_text())
    tensors = load_file(folders[family] / "model.safetensors")
    ends = ("visual.blocks.1.attn.proj.bias", "layers.1.mlp.fc1.bias", "vit.layers.1.self_attn.o_proj.bias")
    name = next(key for key in tensors if key.endswith(ends))
    tensor = tensors.pop(name)
    if kind == "shape":
        tensors[name] = torch.cat([tensor, tensor])
    if kind == "unexpected":
        tensors[name] = tensor
        name = name.replace(".1.", ".9.")
        tensors[name] = tensor.clone()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"{kind}: {name.replace('.', '[.]')}"):
        build_vision("hf", path=str(tmp_path))


def test_a_checkpoint_of_several_files(family, folders, tmp_path):
    published(family).save_pretrained(tmp_path, max_shard_size="20KB")
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(LOOK))
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    built = build_vision("hf", path=str(tmp_path))
    expected = build_vision("hf", path=str(folders[family])).state_dict()
    assert all(tensor.equal(expected[name]) for name, tensor in built.state_dict().items())
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    starts = tuple(f"{PREFIXES[family]}{blocks}.0." for blocks in ("blocks", "encoder.layers", "layers"))
    shard = next(file for name, file in index.items() if name.startswith(starts))
    (tmp_path / shard).unlink()
    with pytest.raises(ValueError, match=f"{shard} is missing"):
        build_vision("hf", path=str(tmp_path))


def test_a_checkpoint_of_the_tower_alone(folders, tmp_path):
    family = "siglip2_naflex"
    tower_of(published(family)).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "siglip2_vision_model"
    built = build_vision("hf", path=str(tmp_path), **LOOK)
    expected = build_vision("hf", path=str(folders[family])).state_dict()
    assert built.provider == family and built.state_dict().keys() == expected.keys()
    assert all(tensor.equal(expected[name]) for name, tensor in built.state_dict().items())


def test_a_checkpoint_without_safetensors_is_refused(family, folders, tmp_path):
    for file in folders[family].glob("*.json"):
        (tmp_path / file.name).write_text(file.read_text())
    with pytest.raises(ValueError, match=r"it has no model\.safetensors"):
        build_vision("hf", path=str(tmp_path))


def test_layers_and_levels(family, encoder):
    """The blocks after the deepest one that is needed are not called."""
    image, called = images(family)[0], []
    blocks = {"siglip2_naflex": lambda: encoder.encoder["layers"], "hunyuan_vl": lambda: encoder.layers}
    blocks = blocks.get(family, lambda: encoder.blocks)()
    for number, block in enumerate(blocks):
        block.register_forward_hook(lambda *_, number=number: called.append(number))
    states, _, _ = reference(family, image)
    for layer, levels, depth in ((2, [1], 2), (-3, [3, 1], 3), (1, [], 1)):
        called.clear()
        encoder.set_layers(layer, levels)
        with torch.no_grad():
            found = encoder.encode((image,))
        assert called == list(range(depth))
        assert_near(found.patches, states[layer - 1 if layer > 0 else layer])
        for level, expected in zip(found.levels, levels, strict=True):
            assert_near(level, states[expected - 1])
    with pytest.raises(ValueError, match="out of range"):
        encoder.set_layers(DEPTH + 1, None)


def test_sizes_that_do_not_fit_are_refused(family, encoder, folders):
    step = encoder.step[0]
    assert step == (2 if family.startswith("qwen") else 1) * PATCH
    encoder.check_any_size()
    for shape in ((3, 3 * step, 2 * step + step // 2), (3, 3 * step + 1, step), (3, 0, step)):
        for pixels in ((torch.zeros(shape),), torch.zeros(2, *shape)):
            with pytest.raises(ValueError, match=f"cannot encode an image of {shape[1]}x{shape[2]} pixels"):
                encoder.encode(pixels)
    side, times = (5 * PATCH, " times 2") if family.startswith("qwen") else (5 * PATCH + 1, "")
    message = rf"vision\.image_size={side}x{side} is not a multiple of the encoder's patch size {PATCH}{times}: use"
    with pytest.raises(ValueError, match=message):
        build_vision("hf", path=str(folders[family]), image_size=side)
    with pytest.raises(ValueError, match="is not a multiple"):
        encoder.resize(3 * step + 1)
    encoder.resize((step, 3 * step))
    assert encoder.geometry["image_size"] == [step, 3 * step] and encoder.grid == (step // PATCH, 3 * step // PATCH)


@pytest.mark.parametrize("lengths", [(5,), (4, 4, 4), (3, 3, 2, 2), (2, 3, 2, 1, 3)])
def test_attention_within_segments(lengths):
    """Equal to attention with a mask over the complete row."""
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 1, 2, sum(lengths), 6)
    number = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    expected = nn.functional.scaled_dot_product_attention(query, key, value, number[:, None] == number, scale=0.7)
    segments = Segments.of(lengths, torch.device("cpu"))
    found, _ = attend_in_images(None, query, key, value, None, 0.7, segments=segments)
    torch.testing.assert_close(found, expected.transpose(1, 2), rtol=0, atol=1e-6)
    assert len(segments.groups) == len(set(lengths)) and NAME != "vlmtrain_segments"
    assert (segments.order is None) == (lengths != (2, 3, 2, 1, 3))


def test_training_with_recomputed_activations(family, encoder):
    gradients = []
    for recompute in (False, True):
        encoder.zero_grad()
        for module in encoder.modules():
            if hasattr(module, "gradient_checkpointing"):
                module.gradient_checkpointing = recompute
                module._gradient_checkpointing_func = lambda function, *arguments: torch.utils.checkpoint.checkpoint(
                    function, *arguments, use_reentrant=False
                )
        encoder.train().encode(tuple(images(family))).patches.square().mean().backward()
        gradients.append({name: parameter.grad for name, parameter in encoder.named_parameters()})
    assert all(gradient.equal(gradients[1][name]) for name, gradient in gradients[0].items())
