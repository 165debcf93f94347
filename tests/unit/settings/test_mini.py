"""Recipes with several encoders: small ones with ``mini=true``, and keys of single encoders on the command line."""

from __future__ import annotations

import pytest

from vlmtrain.settings import compose


def encoders_of(*line: str, config_dir: str | None = None) -> dict[str, tuple]:
    """Provider, name or path, image size and layer of each encoder, in order."""
    vision = compose(line, config_dir).vision
    options = {name: each.options for name, each in vision.encoders.items()}
    return {name: (o.provider, o.name or o.path, o.image_size, o.layer) for name, o in options.items()}


@pytest.mark.parametrize("recipe, count", [("prismatic", 2), ("eagle", 2), ("cambrian", 3), ("brave", 3)])
def test_a_miniature_has_only_small_encoders_that_differ(recipe, count):
    small = encoders_of(f"recipe={recipe}", "mini=true")
    assert len(small) == count
    assert len(set(small.values())) == count
    assert all(name is None for _, name, _, _ in small.values())


def test_prismatic_keeps_its_order_in_both_sizes():
    published = {
        "dinov2": ("hf", "facebook/dinov2-with-registers-large", 378, -2),
        "siglip": ("open_clip", "ViT-SO400M-14-SigLIP-384", None, -2),
    }
    assert list(encoders_of("recipe=prismatic").items()) == list(published.items())
    assert list(encoders_of("recipe=prismatic", "mini=true")) == list(published)


def test_a_recipe_that_extends_one_with_several_encoders_keeps_them(tmp_path):
    (tmp_path / "recipe").mkdir()
    for name, base in (("mine", "prismatic"), ("plain", "llava_1_5")):
        (tmp_path / "recipe" / f"{name}.yaml").write_text(
            f"# @package _global_\ndefaults: [{base}, _self_]\nname: {name}\n"
        )
    assert len(encoders_of("recipe=mine", "mini=true", config_dir=str(tmp_path))) == 2
    assert compose(["recipe=plain", "mini=true"], str(tmp_path)).vision.provider == "open_clip"


def test_a_recipe_without_small_encoders_has_a_single_one(tmp_path):
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe" / "mine.yaml").write_text(
        "# @package _global_\nname: mine\ndefaults: [{override /vision: several}, {override /llm: tiny}, _self_]\n"
        "vision_options: {several: {encoders: {a: {provider: hf, path: large}, b: {provider: hf, path: larger}}}}\n"
    )
    assert len(encoders_of("recipe=mine", config_dir=str(tmp_path))) == 2
    assert compose(["recipe=mine", "mini=true"], str(tmp_path)).vision.provider == "open_clip"


def test_the_command_sets_keys_of_single_encoders_and_keeps_the_order():
    found = encoders_of("recipe=prismatic", "vision.encoders.siglip.layer=-1", "vision.encoders.dinov2.image_size=224")
    assert [(name, size, layer) for name, (_, _, size, layer) in found.items()] == [
        ("dinov2", 224, -2),
        ("siglip", None, -1),
    ]
    small = encoders_of("recipe=prismatic", "mini=true", "vision.encoders.siglip.layer=-2")
    assert (small["siglip"][3], small["dinov2"][3]) == (-2, -3)


def test_an_encoder_with_a_provider_has_only_the_keys_of_the_command():
    found = encoders_of("recipe=prismatic", "vision.encoders.siglip={provider: hf, path: mine}")
    assert list(found) == ["dinov2", "siglip"] and found["siglip"] == ("hf", "mine", None, -2)
    added = encoders_of("recipe=prismatic", "vision.encoders.clip={provider: open_clip, name: ViT-B-32}")
    assert list(added) == ["dinov2", "siglip", "clip"]


@pytest.mark.parametrize("mini", [[], ["mini=true"]])
def test_encoders_of_the_command_replace_all_others(mini):
    line = ["recipe=prismatic", *mini, "vision.encoders={b: {provider: tiny}, a: {provider: tiny, layer: -1}}"]
    assert list(encoders_of(*line)) == ["b", "a"]


def test_the_command_chooses_one_encoder_instead():
    run = compose(["recipe=prismatic", "mini=true", "vision=tiny"])
    assert run.vision.provider == "open_clip" and not hasattr(run.vision, "encoders")
