"""Exported BLIP-2 and InstructBLIP have the same tokens, logits and answers in transformers alone."""

from __future__ import annotations

import re

import pytest
import torch

from tests.integration.model_parity import BLIP2, BLIP_CASES, blip2, build, check, export_all
from tests.integration.tiny_parts import HF_VISION, LOOK, SIDE, stir
from vlmtrain.interop.export import export
from vlmtrain.model.vision import HFVision, build_vision


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> dict[str, dict]:
    return export_all(BLIP_CASES, tmp_path_factory.mktemp("exports"))


@pytest.mark.parametrize("name", BLIP_CASES)
def test_transformers_alone_gives_the_same_results(name, exported):
    parity = exported[name]["parity"]
    assert (parity.model_class, parity.module) == (BLIP_CASES[name].becomes, "transformers")
    check(parity, 1e-5)


@pytest.mark.parametrize(
    "case, words",
    [
        (blip2(vision="laion"), "with a norm before its blocks (CLIP) is not supported by BLIP-2's classes"),
        (
            blip2(vision="timm siglip"),
            "without a class token or with gated layers is not supported by BLIP-2's classes",
        ),
        (blip2({"vision_norm": False}), "connector.vision_norm=false: BLIP-2's classes normalize"),
        (blip2({"vision_norm_eps": 0.5}), "eps of the norms: 0.5 and 1e-06"),
        (blip2(fit="pad"), "image_fit=pad: BLIP-2's processors stretch"),
        (blip2(template="bare", reads=True), "the Q-Former reads the complete prompt, not the instruction"),
        (
            BLIP2._replace(connector="avgpool", options={"window": 2}),
            "connector=avgpool: BLIP-2's classes support only qformer",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_blip2_cannot_hold_is_refused_with_what_works(case, words, tmp_path):
    build(case, tmp_path / "model")
    with pytest.raises(ValueError, match=re.escape(words)) as error:
        export(tmp_path / "model", tmp_path / "out", "blip2")
    assert "--format vlmtrain supports all models" in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()
    if case.connector == "qformer":
        done = export(tmp_path / "model", tmp_path / "out")
        assert done.model_class == "VLMTrainForConditionalGeneration" and words in done.remarks[0]


@pytest.mark.parametrize("name", ["blip2", "instructblip"])
def test_the_towers_load_alone(name, tmp_path):
    model = stir(HF_VISION[name]())
    model.save_pretrained(tmp_path)
    vision = build_vision("hf", path=str(tmp_path), layer=-1, **LOOK)
    assert isinstance(vision, HFVision)
    images = torch.randn(2, 3, SIDE, SIDE)
    with torch.no_grad():
        features = vision(images)
        tokens = torch.cat([features.prefix, features.patches.flatten(1, 2)], 1)
        assert model.post_layernorm(tokens).equal(model(images).last_hidden_state)
