"""BLIP-2 and InstructBLIP exported: transformers alone makes the same tokens, logits and answers of them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from timm.models import register_model
from timm.models.eva import _create_eva
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Blip2VisionConfig,
    Blip2VisionModel,
    InstructBlipVisionConfig,
    InstructBlipVisionModel,
    PreTrainedTokenizerBase,
)

from tests.integration.test_export import (
    LLMS,
    NEW,
    PATCH,
    SIDE,
    TOWERS,
    byte_tokenizer,
    difference,
    run_exports,
    stir,
    typed,
)
from vlmtrain.data.connector_text import TextReader
from vlmtrain.data.images import ImageOnDisk
from vlmtrain.data.processor import Geometry, Processor
from vlmtrain.data.records import IMAGE_MARK, Conversation, Turn
from vlmtrain.interop.export import export
from vlmtrain.model import VLMWrapper
from vlmtrain.model.parts import make_connector
from vlmtrain.model.vision import HFVision, VisionEncoder, build_vision

LOOK = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]}
BLIP = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": SIDE, "patch_size": PATCH}
BLIP |= {"intermediate_size": 32}
QFORMER = {"num_queries": 3, "hidden_size": 16, "depth": 3, "num_heads": 2, "intermediate_size": 24, "dropout": 0.1}
QFORMER |= {"vision_norm": True, "vision_norm_eps": 1e-6}
HF_TOWERS = {
    "blip2": lambda: Blip2VisionModel(Blip2VisionConfig(**BLIP)),
    "instructblip": lambda: InstructBlipVisionModel(InstructBlipVisionConfig(**BLIP, qkv_bias=False)),
}


@register_model
def tiny_eva(pretrained: bool = False, **options) -> nn.Module:
    """EVA-CLIP's image tower as timm builds it, small."""
    shape = {"patch_size": PATCH, "embed_dim": 16, "depth": 3, "num_heads": 2, "mlp_ratio": 2}
    return _create_eva("tiny_eva", pretrained, **{**shape, "init_values": None, **options})


@register_model
def tiny_scaled_eva(pretrained: bool = False, **options) -> nn.Module:
    return tiny_eva(pretrained, **{"init_values": 0.3, **options})


def timm_tower(name: str) -> dict:
    tower = {"timm_model_name": name, "timm_pool": "token", "timm_proj": "none", "image_size": SIDE}
    return {"embed_dim": 16, "vision_cfg": tower, "text_cfg": TOWERS["laion"]["text_cfg"]}


OPEN_CLIP = {
    **TOWERS,
    "eva": timm_tower("tiny_eva"),
    "scaled eva": timm_tower("tiny_scaled_eva"),
}


class Case(NamedTuple):
    vision: str = "eva"
    llm: str = "opt"
    options: dict = {}  # noqa: RUF012
    template: str = "blip"
    fit: str = "squash"
    image_size: int | None = None
    layer: int = -2
    reads: bool = False
    connector: str = "qformer"


CASES = {
    "eva, opt": Case(),
    "eva, scales": Case(vision="scaled eva", llm="llama", layer=-1),
    "its own tower": Case(vision="blip2", layer=2),
    "its own tower, another size": Case(vision="instructblip", image_size=48, layer=-1),
    "no pre-norm, tied": Case(vision="no pre-norm", llm="llama, tied", options={"vision_norm_eps": 1e-5}),
    "every layer crosses": Case(options={"cross_every": 1}),
    "one layer crosses": Case(options={"cross_every": 5}),
    "prompts of a template": Case(template="bare", llm="qwen2, rows to spare"),
    "captions": Case(template="plain"),
    "reads": Case(llm="llama", reads=True),
    "reads, its own tower": Case(vision="instructblip", llm="opt", reads=True, layer=-1),
}
PICTURES = {"wide.png": (64, 32), "square.png": (32, 32), "large.png": (130, 90)}
TALKS = (
    ((Turn("user", f"{IMAGE_MARK}\nWhat is this?"),), "wide.png"),
    ((Turn("user", f"{IMAGE_MARK}\nWhich of them is red, 1 or 2?"),), "square.png"),
    (
        (Turn("user", f"{IMAGE_MARK}\nWhat is it?"), Turn("assistant", "a red circle"), Turn("user", "Sure?")),
        "large.png",
    ),
)


def build_encoder(case: Case, folder: Path) -> VisionEncoder:
    if case.vision in OPEN_CLIP:
        config = OPEN_CLIP[case.vision]
        return stir(build_vision("open_clip", model_config=config, image_size=case.image_size, layer=case.layer))
    stir(HF_TOWERS[case.vision]()).save_pretrained(folder)
    return build_vision("hf", path=str(folder), image_size=case.image_size, layer=case.layer, **LOOK)


def build(case: Case, folder: Path) -> None:
    """Write a model folder."""
    torch.manual_seed(0)
    vision = build_encoder(case, folder / "encoder")
    tokenizer = byte_tokenizer("first")
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": 0}
    llm = stir(AutoModelForCausalLM.from_config(LLMS[case.llm](vocab_size=len(tokenizer), **ids)))
    reader = TextReader(reading_tokenizer(), "instruction", 40) if case.reads else None
    words = {"text_vocab": reader.vocabulary.size, "text_positions": 40} if reader else {}
    options = {**QFORMER, **words, **case.options} if case.connector == "qformer" else case.options
    connector = stir(make_connector(case.connector, vision, llm, options))
    geometry = Geometry(
        vision.image_size, case.fit, vision.image_mean, vision.image_std, connector.num_tokens(*vision.grid), None
    )
    VLMWrapper(vision, connector, llm).save_pretrained(folder)
    Processor(tokenizer, geometry, case.template, 1000, reader=reader).save_pretrained(folder)


def reading_tokenizer() -> PreTrainedTokenizerBase:
    """Another than the language model's, which frames nothing by itself."""
    tokenizer = byte_tokenizer("first")
    tokenizer.backend_tokenizer.post_processor = None
    return tokenizer


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    generator = np.random.default_rng(0)
    for name, size in PICTURES.items():
        Image.fromarray(generator.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)).save(folder / name)
    return folder


def talks(case: Case) -> list[tuple[tuple[Turn, ...], str]]:
    """InstructBLIP's processor pads instructions on the left, where positions begin: so they are equally long here."""
    if case.reads:
        return [TALKS[0], ((Turn("user", f"{IMAGE_MARK}\nWhich is red?"),), "large.png")]
    return [talk for talk in TALKS if len(talk[0]) == 1 or case.template != "plain"]


@pytest.fixture(scope="module")
def exported(tmp_path_factory, pictures) -> dict[str, dict]:
    home = tmp_path_factory.mktemp("exports")
    jobs = []
    for name, case in CASES.items():
        build(case, home / name / "model")
        export(home / name / "model", home / name / "out")
        asked = talks(case)
        questions = [[typed(turn) for turn in turns] for turns, _ in asked]
        shown = [[str(pictures / file)] for _, file in asked]
        jobs.append({"backend": "pil", "folder": str(home / name / "out"), "questions": questions, "pictures": shown})
    return {name: {**found, "home": home / name} for name, found in zip(CASES, run_exports(home, jobs))}


@pytest.mark.parametrize("name", CASES)
def test_transformers_alone_gives_the_same(name, exported, pictures):
    case, found = CASES[name], exported[name]
    assert found["module"] == "transformers"
    assert found["class"] == ("InstructBlip" if case.reads else "Blip2") + "ForConditionalGeneration"
    model, processor = (each.from_pretrained(found["home"] / "model") for each in (VLMWrapper, Processor))
    ends = []
    for number, (turns, file) in enumerate(talks(case)):
        prompt = processor.prompt(Conversation("asked", turns, (ImageOnDisk(pictures / file),)))
        batch = processor.collate([prompt])
        text = {"text_ids": batch.text_ids, "text_mask": batch.text_mask}
        with torch.no_grad():
            expected = model(batch.input_ids, batch.images, batch.is_image, **text)[0]
            options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": processor.renderer.stop_ids}
            new = model.generate(
                batch.input_ids, batch.images, batch.is_image, batch.lengths, pad_token_id=0, **text, **options
            )
        ends.append(expected[-1])
        for which in ("alone", "batch"):
            got = found[which][number]
            is_text, ids = prompt.tokens.image_index < 0, torch.tensor(got["ids"])
            assert len(ids) == len(is_text) and ids[is_text].equal(prompt.tokens.input_ids[is_text]), which
            assert len(ids[~is_text].unique()) == 1 and not torch.isin(ids[is_text], ids[~is_text]).any()
            assert difference(got["logits"], expected) <= 1e-5, which
            assert got["answer"] == processor.tokenizer.decode(new[0], skip_special_tokens=True), which
    ends = torch.stack(ends)
    assert ends.std(0).max() > 0.01 * ends.abs().max()  # the pictures matter


@pytest.mark.parametrize(
    "case, words",
    [
        (Case(vision="laion"), "with a norm before its blocks (CLIP's) is no encoder of BLIP-2's classes"),
        (Case(vision="timm siglip"), "without a class token, or with gated layers, is no encoder of BLIP-2's classes"),
        (Case(options={"vision_norm": False}), "connector.vision_norm=false: BLIP-2's classes normalise"),
        (Case(options={"vision_norm_eps": 0.5}), "the norms' eps: 0.5 and 1e-06"),
        (Case(fit="pad"), "image_fit=pad: BLIP-2's processors stretch"),
        (Case(template="bare", reads=True), "has the Q-Former read the whole prompt, not the instruction"),
        (Case(connector="avgpool", options={"window": 2}), "connector=avgpool: BLIP-2's classes have the qformer only"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_blip2_cannot_hold_is_refused_with_what_works(case, words, tmp_path):
    build(case, tmp_path / "model")
    with pytest.raises(ValueError, match=re.escape(words)) as error:
        export(tmp_path / "model", tmp_path / "out", "blip2")
    assert "--format vlmtrain takes any" in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()
    if case.connector == "qformer":
        done = export(tmp_path / "model", tmp_path / "out")
        assert done.model_class == "VLMTrainForConditionalGeneration" and words in done.remarks[0]


def test_the_towers_load_alone(tmp_path):
    for name, tower in HF_TOWERS.items():
        model = stir(tower())
        model.save_pretrained(tmp_path / name)
        vision = build_vision("hf", path=str(tmp_path / name), layer=-1, **LOOK)
        assert isinstance(vision, HFVision)
        images = torch.randn(2, 3, SIDE, SIDE)
        with torch.no_grad():
            features = vision(images)
            tokens = torch.cat([features.prefix, features.patches.flatten(1, 2)], 1)
            assert model.post_layernorm(tokens).equal(model(images).last_hidden_state)
