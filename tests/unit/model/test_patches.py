"""Raw patches in place of a vision encoder: their values, model folders, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from vlmtrain import build_model
from vlmtrain.model.vision import PatchVision, build_vision, load_vision
from vlmtrain.objectives import OBJECTIVES
from vlmtrain.settings import compose
from vlmtrain.settings.free_keys import completed
from vlmtrain.settings.run import read_run
from vlmtrain.training.assembly import build_skeleton, build_tokenizer
from vlmtrain.training.feature_filling import fill_cache
from vlmtrain.training.processing import build_processor
from vlmtrain.training.trainable import trained_groups

PATCH = 4


def images(*sizes: tuple[int, int]) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(3, *size, generator=generator) for size in sizes)


def test_the_features_are_the_pixels_of_each_patch():
    vision = PatchVision(PATCH)
    assert (vision.image_size, vision.grid, vision.width) == ((40, 40), (10, 10), 48)
    shown = torch.stack(images((8, 12), (8, 12)))
    features = vision(shown)
    assert features.patches.shape == (2, 2, 3, 48) and features.prefix is None and features.levels == ()
    unfolded = F.unfold(shown, PATCH, stride=PATCH)  # (B, C * p * p, N), the channels first
    expected = unfolded.unflatten(1, (3, -1)).permute(0, 3, 2, 1).flatten(2)
    assert features.patches.flatten(1, 2).equal(expected)
    # patch (1, 2), pixel (3, 0) within it
    assert features.patches[0, 1, 2, 3 * (3 * PATCH) : 3 * (3 * PATCH) + 3].equal(shown[0, :, 7, 8])


def test_images_of_their_own_sizes_are_read_in_one_call():
    vision, shown = PatchVision(PATCH), images((8, 12), (4, 4), (12, 4))
    features = vision.encode(shown, calls=5, chunks=2)
    assert features.grids == ((2, 3), (1, 1), (3, 1))
    alone = [vision(image[None]).patches.flatten(0, 2) for image in shown]
    assert features.patches.equal(torch.cat(alone))


def test_it_is_written_and_read_without_weights(tmp_path):
    vision = build_vision("patches", patch_size=PATCH, image_size=(8, 12))
    vision.save(tmp_path / "vision", vision.state_dict())
    again = load_vision(tmp_path / "vision", torch.bfloat16)
    assert (again.provider, again.patch_size, again.image_size) == ("patches", (PATCH, PATCH), (8, 12))
    assert not list(again.parameters()) and not again.state_dict()


def test_other_image_sizes():
    vision = PatchVision(PATCH)
    vision.resize((8, 20))
    assert vision.grid == (2, 5)
    with pytest.raises(ValueError, match=r"vision\.image_size=10x8 is not a multiple of the encoder's patch size 4"):
        PatchVision(PATCH, (10, 8))


def test_connectors_that_read_hidden_layers_are_refused():
    run = compose(["recipe=fuyu", "mini=true", "connector=token_packer"])
    with pytest.raises(ValueError, match="reads 4 hidden layers, but vision=patches has none"):
        build_skeleton(run, run.stages["align"], build_tokenizer(run))


def test_nothing_of_it_can_be_trained():
    run = compose(["recipe=fuyu", "mini=true", "stages.align.train.vision=1e-3"])
    parts = build_skeleton(run, run.stages["align"], build_tokenizer(run))
    with pytest.raises(ValueError, match=r"stages\.align\.train\.vision=0\.001: vision has no weights; expected null"):
        trained_groups(run.stages["align"], parts)


def test_its_features_are_not_computed_in_advance(tmp_path):
    run = compose(["recipe=fuyu", "mini=true", f"features.cache={tmp_path}"])
    with pytest.raises(ValueError, match=r"has no weights \(vision=patches\)"):
        fill_cache(run, show_progress=False)


@pytest.mark.parametrize("more", [["recipe=fuyu", "mini=true"], ["recipe=prismatic"]])
def test_recorded_settings_are_read_again(more):
    run = compose(more)
    assert read_run(completed(run.composed)).vision == run.vision


def test_among_several_encoders():
    encoders = "{fine: {provider: patches, patch_size: 6, image_size: 24}, coarse: {provider: patches, patch_size: 12}}"
    run = compose(["recipe=llava_1_5", "vision=several", f"vision.encoders={encoders}", "vision.grid=fine"])
    vision = build_vision(**run.vision.arguments)
    assert vision.grids == [(4, 4), (4, 4)] and vision.width == 3 * 6**2 + 3 * 12**2
    small, large = torch.stack(images((24, 24))), torch.stack(images((120, 120)))
    features = vision(small, large)
    assert features.patches[..., : 3 * 6**2].equal(PatchVision(6)(small).patches)


def test_a_fixed_size():
    model, processor = build_model({"patches": {"patch_size": 12}}, "mlp", "tiny", image_fit="pad")
    assert processor.geometry.size == (120, 120) and processor.geometry.tokens == 100
    assert model.connector.in_dim == 432


def test_the_miniature_counts_as_the_processor_does():
    run = compose(["recipe=fuyu", "mini=true"])
    stage, tokenizer = run.stages["instruct"], build_tokenizer(run)
    parts = build_skeleton(run, stage, tokenizer)
    geometry = build_processor(run, stage, parts, OBJECTIVES[stage.objective], tokenizer).geometry
    assert (geometry.most_tokens, geometry.most_control_tokens) == (64, 8)
    items, (placement,) = geometry.plan([(47, 90)])
    assert items[0].grids == ((4, 8),) and (placement.slots, placement.newlines) == (32, 4)
