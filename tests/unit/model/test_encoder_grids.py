"""The features of one of several encoders, resized to a grid of their own."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaModel

from vlmtrain.model.parts import make_connector
from vlmtrain.model.vision import build_vision, vision_from
from vlmtrain.model.vision.base import VisionEncoder


def tower(side: int, **keys) -> dict:
    sizes = {"image_size": side, "patch_size": 8, "width": 16, "layers": 1, "head_width": 8}
    text = {"width": 8, "heads": 1, "layers": 1}
    return {
        "provider": "open_clip",
        "model_config": {"embed_dim": 8, "vision_cfg": sizes, "text_cfg": text},
        "layer": -1,
        **keys,
    }


def build(join: str, **keys) -> VisionEncoder:
    torch.manual_seed(0)
    encoders = {"coarse": tower(24), "fine": tower(40, **keys)}
    return build_vision("several", encoders=encoders, join=join, align_corners=True).eval()


def shown() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2, 3, side, side, generator=generator) for side in (24, 40)]


def test_only_its_own_patches_are_resized():
    vision = build("separate", grid=[6, 3])
    assert vision.grids == [(3, 3), (6, 3)] == vision_from({"provider": "several", **vision.describe()}).grids
    with torch.no_grad():
        coarse, fine = vision(*shown())
        alone = [encoder(images) for encoder, images in zip(vision.encoders.values(), shown())]
    assert coarse.patches.equal(alone[0].patches)
    by_hand = F.interpolate(alone[1].patches.permute(0, 3, 1, 2), (6, 3), mode="bilinear", align_corners=True)
    torch.testing.assert_close(fine.patches, by_hand.permute(0, 2, 3, 1))
    assert fine.prefix.equal(alone[1].prefix)


def test_a_connector_for_each_encoder_is_built_for_it():
    vision = build("tokens", grid=3)
    llm = LlamaModel(LlamaConfig(hidden_size=8, num_hidden_layers=0, num_attention_heads=1))
    connector = make_connector("avgpool", vision, llm, {"window": 3})
    with torch.no_grad():
        assert connector(vision(*shown())).shape == (2, 2, 8) and connector.num_tokens(3, 3) == 2


def test_it_cannot_be_combined_with_other_grids():
    with pytest.raises(ValueError, match=r"one grid, but the grids are 3x3 \(coarse\), 6x3 \(fine\)"):
        build("channels", grid=[6, 3])
    with pytest.raises(ValueError, match=r"which vision\.encoders\.fine\.grid does not support"):
        build("separate", grid=[3, 3]).check_any_size()
