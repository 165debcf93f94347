"""Parity of vlmtrain models with Hugging Face's classes: the cases that tests check and the parity table reports.

The case of an export is a model folder and its export; the case of an import is a random published model and its
import. In both cases, the two models answer the same questions about the same images, one by one and in one batch.
Hugging Face's model runs in a separate process (transformers_only.py).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from tests.conftest import run
from tests.integration.fuyu_models import IMAGE as FUYU_IMAGE
from tests.integration.fuyu_models import build_fuyu
from tests.integration.idefics_models import build_idefics
from tests.integration.molmo2_models import build_molmo2
from tests.integration.native_models import CLASSES as NATIVE
from tests.integration.native_models import build_native
from tests.integration.paligemma_models import build_paligemma
from tests.integration.published_models import build_blip, build_llava, build_parts
from tests.integration.tiny_parts import HF_VISION, LLMS, LOOK, TOWERS, byte_tokenizer, flan_t5, stir, t5_tokenizer
from vlmtrain.data.connector_text import TextReader
from vlmtrain.data.geometry import Geometry, View
from vlmtrain.data.images import ImageOnDisk
from vlmtrain.data.processor import Processor
from vlmtrain.data.records import IMAGE_MARK, Conversation, Turn
from vlmtrain.data.shapes import VOCABULARY
from vlmtrain.data.templates import CAPTIONS
from vlmtrain.interop.export import export
from vlmtrain.interop.fitting import relative_difference
from vlmtrain.interop.idefics import FAKE
from vlmtrain.interop.importing import MODEL_CLASSES, import_model
from vlmtrain.interop.molmo2 import pixel_patches, tile_grids
from vlmtrain.interop.native_parity import pixel_rows
from vlmtrain.model import VLMWrapper
from vlmtrain.model.encoder_decoder import prepared, start_token
from vlmtrain.model.parts import make_connector
from vlmtrain.model.tiny_tokenizer import build_tiny_tokenizer
from vlmtrain.model.vision import PatchVision, VisionEncoder, build_vision
from vlmtrain.tiling import Overlap

NEW = 12
SCRIPT = Path(__file__).with_name("transformers_only.py")
PICTURES = {"wide.png": (64, 32), "tall.png": (32, 64), "square.png": (32, 32), "large.png": (130, 90)}
WITH_VIDEO = [MODEL_CLASSES[name] for name in ("llava_onevision", *NATIVE)]
MOLMO2, FUYU, PALIGEMMA, IDEFICS = (MODEL_CLASSES[kind] for kind in ("molmo2", "fuyu", "paligemma", "idefics"))
UNSCALED = {"height": 96, "width": 132}  # of Fuyu's images, which transformers scales down with torchvision only
Talk = tuple[tuple[Turn, ...], tuple[str, ...]]


def user(words: str) -> Turn:
    return Turn("user", words)


ONE: Talk = (user(f"{IMAGE_MARK}\nWhat is this?"),), ("wide.png",)
TWO: Talk = (user(f"{IMAGE_MARK}\n{IMAGE_MARK}\nWhich is red, 1 or 2?"),), ("square.png", "tall.png")
LONG: Talk = (
    (
        user(f"What is in\n{IMAGE_MARK}"),
        Turn("assistant", "a red circle"),
        user(f"{IMAGE_MARK}\nand in this one, which is larger by far?"),
    ),
    ("large.png", "wide.png"),
)
AGAIN: Talk = (user(f"{IMAGE_MARK}\nWhat is it?"), Turn("assistant", "a red circle"), user("Sure?")), ("large.png",)
OTHER: Talk = (user(f"{IMAGE_MARK}\nWhich of them is red, 1 or 2?"),), ("square.png",)
# InstructBLIP's processor pads instructions on the left, which shifts positions: so all of them have the same length
EQUAL: Talk = (user(f"{IMAGE_MARK}\nWhich is red?"),), ("large.png",)
PROMPTS: list[Talk] = [ONE, TWO, OTHER]  # of one question, as PaliGemma's processor takes them
ALONE: list[Talk] = [ONE, OTHER, EQUAL]  # of one question about one image, as Fuyu's processor takes them


# without newlines, because the published templates of native models write none
JOINED: list[Talk] = [
    ((user(f"{IMAGE_MARK}What is this?"),), ("wide.png",)),
    ((user(f"{IMAGE_MARK}{IMAGE_MARK}Which is red, 1 or 2?"),), ("square.png", "tall.png")),
    (
        (user(f"Look: {IMAGE_MARK}"), Turn("assistant", "a red circle"), user(f"{IMAGE_MARK}Sure?")),
        ("large.png", "wide.png"),
    ),
]


class Parity(NamedTuple):
    """How two models agree on the same conversations, one by one and in one batch.

    logits: largest difference, relative to the largest; pixels: in gray levels of 255. spread: how far the answers'
    first logits lie apart, which shows whether images and text matter.
    """

    model_class: str
    module: str
    prompts: bool
    logits: float
    answers: bool
    pixels: float
    spread: float


def check(parity: Parity, tolerance: float) -> None:
    assert parity.prompts and parity.answers, parity
    assert parity.logits <= tolerance and parity.pixels <= 0.01, parity
    assert parity.spread > 0.01, parity


def draw_pictures(folder: Path) -> Path:
    folder.mkdir()
    generator = np.random.default_rng(0)
    for name, size in PICTURES.items():
        Image.fromarray(generator.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)).save(folder / name)
    return folder


def typed(turn: Turn) -> dict:
    """A turn in the format of Hugging Face's processors."""
    if "\n" not in turn.text:  # for templates that write nothing between an image and its text
        first, *rest = turn.text.split(IMAGE_MARK)
        pieces = [{"type": "text", "text": first}]
        for piece in rest:
            pieces += [{"type": "image"}, {"type": "text", "text": piece}]
        return {"role": turn.role, "content": [piece for piece in pieces if piece.get("text", "image")]}
    content = []
    for line in turn.text.split("\n"):
        content.append({"type": "image"} if line == IMAGE_MARK else {"type": "text", "text": line})
    return {"role": turn.role, "content": content}


def job(folder: Path, talks: list[Talk], pictures: Path, backend: str | None = "pil", **options) -> dict:
    """A job for transformers_only.py."""
    return {
        **options,
        "backend": backend,
        "folder": str(folder),
        "questions": [[typed(turn) for turn in turns] for turns, _ in talks],
        "pictures": [[str(pictures / name) for name in names] for _, names in talks],
    }


def options_of(model_class: str) -> dict:
    """How transformers runs a model: with Pillow, which has no video processor, and nothing of Molmo2 and Fuyu.

    Its class for HunyuanOCR numbers images over a batch, whereas here they are numbered in each sample.
    """
    if model_class in (MOLMO2, FUYU):
        return {"backend": None}
    if model_class not in WITH_VIDEO:
        return {}
    return {"backend": None, "images_backend": "pil", "together": not model_class.startswith("HunYuan")}


def run_outside(home: Path, jobs: list[dict], *own: str) -> list[dict]:
    """The output of transformers for some folders; own: with vlmtrain imported."""
    (home / "jobs.json").write_text(json.dumps(jobs))
    run(sys.executable, str(SCRIPT), str(home / "jobs.json"), str(home / "found.pt"), *own, cwd=home)
    return torch.load(home / "found.pt", weights_only=True)


def run_here(folder: Path, talks: list[Talk], pictures: Path) -> list[dict]:
    """The output of a model folder."""
    model, processor = VLMWrapper.from_pretrained(folder), Processor.from_pretrained(folder)
    answers = []
    for turns, names in talks:
        shown = tuple(ImageOnDisk(pictures / name) for name in names)
        batch = processor.collate([processor.prompt(Conversation("asked", turns, shown))])
        greedy = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": processor.renderer.stop_ids}
        known = processor.tokenizer.get_vocab()  # exports never answer with the token of images
        never = [IMAGE_MARK, FAKE] if FAKE in known else ["<|image_pad|>", "<image_pad>", FUYU_IMAGE]
        if tokens := [known[token] for token in never if token in known]:
            greedy["suppress_tokens"] = tokens
        with torch.no_grad():
            logits = model(batch)[0]
            ids = model.generate(batch, pad_token_id=0, **greedy)
        text = processor.tokenizer.decode(ids[0], skip_special_tokens=True)
        order = model.vision.patch_size[0], model.vision.multiple
        look = {"std": processor.geometry.std, "channels_last": isinstance(model.vision, PatchVision)}
        answers.append({"batch": batch, "logits": logits, "answer": text, "order": order, **look})
    return answers


def measure(found: dict, folder: Path, talks: list[Talk], pictures: Path) -> Parity:
    """Compare `found`, the output of transformers, with the model folder."""
    answers = run_here(folder, talks, pictures)
    pairs = [pair for which in ("alone", "batch") for pair in zip(answers, found[which], strict=True)]
    ends = torch.stack([each["logits"][-1] for each in answers])
    return Parity(
        found["class"],
        found["module"],
        all(_same_prompt(ours["batch"], theirs["ids"]) for ours, theirs in pairs),
        max(difference(theirs["logits"], ours["logits"]) for ours, theirs in pairs),
        all(ours["answer"] == theirs["answer"] for ours, theirs in pairs),
        max(gray_levels(theirs["pixels"], ours) for ours, theirs in zip(answers, found["alone"])),
        float(ends.std(0).max() / ends.abs().max()),
    )


def _same_prompt(batch, ids: list[int]) -> bool:
    """The same text, and one other ID at all image positions; two if Molmo2's crops have newlines.

    The prompt of an encoder-decoder model is what its encoder reads.
    """
    read = batch.decoder.encoder_width if batch.decoder else None
    found, is_text = torch.tensor(ids), ~batch.visual.mask[0, :read]
    if len(found) != len(is_text) or not found[is_text].equal(batch.input_ids[0, :read][is_text]):
        return False
    kinds = 1 + any(isinstance(placement.tiles, Overlap) for placement in batch.visual.placements)
    return len(found[~is_text].unique()) == kinds and not torch.isin(found[is_text], found[~is_text]).any()


def difference(found: Tensor, expected: Tensor) -> float:
    """Of the logits that both have."""
    count = min(found.shape[-1], expected.shape[-1])
    return relative_difference(found[..., :count], expected[..., :count])


def gray_levels(pixels: Tensor, ours: dict) -> float:
    """The largest difference of pixels, of 255 levels. LLaVA-NeXT pads images to the same number of views."""
    visual = ours["batch"].visual.normalized()
    expected = visual.pixels[0]
    if not isinstance(expected, Tensor):  # native resolution: rows of patches, in one or two equal frames
        expected = torch.cat([pixel_rows(image, *ours["order"]) for image in expected])
        if ours["channels_last"]:
            pixels = pixels.unflatten(1, (-1, 3)).transpose(1, 2)
        pixels, expected = pixels.reshape(len(expected), 3, -1), expected.flatten(2)
        expected = expected.repeat(1, 1, pixels.shape[2] // expected.shape[2])
        return float(((pixels - expected).abs() * torch.tensor(ours["std"])[:, None]).max()) * 255
    if pixels.dim() == 3:
        patch = ours["order"][0]
        levels = (pixels - pixel_patches(expected, patch)).abs() * torch.tensor(ours["std"]).repeat(patch * patch)
        return float(levels.max()) * 255
    if pixels.dim() == 5:
        views = list(expected.split([len(each.items) for each in visual.placements]))
        expected = torch.nn.utils.rnn.pad_sequence(views, batch_first=True)
    return float(((pixels - expected).abs() * torch.tensor(ours["std"])[:, None, None]).max()) * 255


# out


class Case(NamedTuple):
    """A model to export, and the class that it should become."""

    vision: str = "clip"
    llm: str = "llama"
    connector: str = "mlp"
    options: dict = {}  # noqa: RUF012
    fit: str = "squash"
    most: int = 0
    template: str = "chat"
    tokenizer: str = "tiny"
    image_size: int | None = None
    layer: int = -2
    form: str = "hf"
    becomes: str = "LlavaForConditionalGeneration"
    reads: bool = False
    style: str = "llava_next"

    @property
    def talks(self) -> list[Talk]:
        if self.vision in (*NATIVE, "idefics"):
            return JOINED
        if self.vision == "fuyu":
            return ALONE
        if self.vision == "paligemma":
            return PROMPTS
        if self.reads:
            return [ONE, EQUAL]
        talks = [ONE, OTHER, AGAIN] if self.becomes.startswith("Blip2") else [ONE, TWO, LONG]
        return [talk for talk in talks if self.template not in CAPTIONS or len(talk[0]) == 1]


NEXT = {"fit": "tiles", "becomes": "LlavaNextForConditionalGeneration"}
LLAVA_CASES = {
    **{name: Case(vision=name) for name in ("clip", "siglip", "dinov2")},
    **{name: Case(vision=name) for name in ("openai", "laion", "layer scale", "coca", "timm siglip")},
    **{name: Case(llm=name) for name in LLMS if name != "gemma2"},
    "linear": Case(connector="linear", layer=-1),
    "narrow mlp": Case(options={"hidden_dim": 20, "activation": "relu"}, layer=1),
    "silu": Case(options={"activation": "silu"}),
    "another size": Case(image_size=48),
    "another size, siglip": Case(vision="siglip", image_size=48, layer=3),
    "another size, dinov2": Case(vision="dinov2", image_size=48),
    "vicuna, space first": Case(template="vicuna_v1", tokenizer="space first"),
    "vicuna, space always": Case(template="vicuna_v1", tokenizer="space always"),
    "vicuna": Case(template="vicuna_v1"),
    "chatml": Case(template="chatml", tokenizer="marks", llm="qwen2"),
    "bare": Case(template="bare"),
    "plain": Case(template="plain", tokenizer="space first"),
    "crop": Case(fit="crop"),
    "pad": Case(fit="pad"),
    "tiles": Case(**NEXT),
    "tiles, siglip, linear": Case(vision="siglip", connector="linear", **NEXT),
    "tiles, openai": Case(vision="openai", llm="qwen2", **NEXT),
    "tiles, another size": Case(vision="dinov2", image_size=48, **NEXT),
    "tiles of images that are alone": Case(
        "siglip", "qwen2", fit="tiles", most=2, becomes="LlavaOnevisionForConditionalGeneration"
    ),
}
READING = {"num_queries": 3, "hidden_size": 16, "depth": 2, "num_heads": 2, "intermediate_size": 16, "dropout": 0.0}
OWN = {"becomes": "VLMTrainForConditionalGeneration"}
OWN_CASES = {
    "gemma2": Case(llm="gemma2", **OWN),
    "registers": Case(vision="registers", **OWN),
    "no pre-norm": Case(vision="no pre-norm", **OWN),
    "avgpool": Case(connector="avgpool", options={"window": 2}, fit="pad", **OWN),
    "token_packer": Case(connector="token_packer", options={"hidden_size": 16, "levels": 3}, **OWN),
    "perceiver, tiles": Case(
        connector="perceiver_resampler",
        options={"num_queries": 3, "depth": 1, "num_heads": 2, "head_dim": 4},
        vision="timm vit",
        fit="tiles",
        **OWN,
    ),
    "d_abstractor": Case(
        connector="d_abstractor",
        options={"grid": 2, "hidden_size": 16, "depth": 1, "num_heads": 2, "intermediate_size": 16, "dropout": 0.0},
        vision="siglip",
        image_size=48,
        **OWN,
    ),
    "qformer": Case(connector="qformer", options=READING, llm="opt", template="bare", **OWN),
    "layer scale": Case(vision="layer scale", llm="gpt2", form="vlmtrain", **OWN),
    "tied": Case(llm="llama, tied", form="vlmtrain", template="vicuna_v1", tokenizer="space first", **OWN),
    "avgpool, tiles": Case(connector="avgpool", options={"window": 2}, fit="tiles", **OWN),
    "several encoders": Case(vision="several", fit="tiles", **OWN),
}
QFORMER = {"num_queries": 3, "hidden_size": 16, "depth": 3, "num_heads": 2, "intermediate_size": 24, "dropout": 0.1}
QFORMER |= {"vision_norm": True, "vision_norm_eps": 1e-6}
BLIP2 = Case(
    "eva", "opt", "qformer", QFORMER, template="blip", tokenizer="space first", becomes="Blip2ForConditionalGeneration"
)
READS = {"reads": True, "becomes": "InstructBlipForConditionalGeneration"}


def blip2(options: dict | None = None, **fields) -> Case:
    return BLIP2._replace(options={**QFORMER, **(options or {})}, **fields)


BLIP_CASES = {
    "eva, opt": blip2(),
    "eva, scales": blip2(vision="scaled eva", llm="llama", layer=-1),
    "its own tower": blip2(vision="blip2", layer=2),
    "its own tower, another size": blip2(vision="instructblip", image_size=48, layer=-1),
    "no pre-norm, tied": blip2({"vision_norm_eps": 1e-5}, vision="no pre-norm", llm="llama, tied"),
    "every layer crosses": blip2({"cross_every": 1}),
    "one layer crosses": blip2({"cross_every": 5}),
    "prompts of a template": blip2(template="bare", llm="qwen2, rows to spare"),
    "captions": blip2(template="plain"),
    "flan_t5": blip2(llm="flan_t5", tokenizer="t5"),
    "flan_t5, prompts of a template": blip2(template="bare", llm="flan_t5", tokenizer="t5"),
    "flan_t5, captions": blip2(template="prefix", llm="flan_t5", tokenizer="t5"),
    "reads": blip2(llm="llama", **READS),
    "reads, flan_t5": blip2(llm="flan_t5", tokenizer="t5", **READS),
    "reads, its own tower": blip2(vision="instructblip", llm="opt", layer=-1, **READS),
}
NATIVE_LLMS = {"qwen2_vl": "qwen2", "qwen2_5_vl": "qwen2", "qwen3_vl": "qwen3", "hunyuan_vl": "hunyuan"}
NATIVE_CASES = {name: Case(vision=name, llm=llm, becomes=MODEL_CLASSES[name]) for name, llm in NATIVE_LLMS.items()}
POOL = {"levels": 2, "num_heads": 2, "intermediate_size": 24, "token_bias": True}
MOLMO2_CASE = Case("siglip", "qwen3", "attentional_pool", POOL, "tiles", template="chatml", tokenizer="molmo2")
MOLMO2_CASE = MOLMO2_CASE._replace(becomes=MOLMO2, style="molmo2")
MOLMO2_CASES = {
    "molmo2": MOLMO2_CASE,
    "molmo2, open_clip": MOLMO2_CASE._replace(vision="timm siglip", options={**POOL, "token_bias": False}),
}
IDEFICS_CASES = {
    name: Case("idefics", "llama", connector, {"resampler": connector != "identity"}, becomes=IDEFICS)
    for name, connector in (("resampler", "idefics_resampler"), ("features", "identity"))
}
FUYU_CASES = {"fuyu": Case("fuyu", "persimmon", "linear", becomes=FUYU)}
PALIGEMMA_CASES = {"paligemma": Case("paligemma", "gemma", "linear", becomes=PALIGEMMA)}
EXPORTS = {
    **{"llava": LLAVA_CASES, "blip2": BLIP_CASES, "native": NATIVE_CASES, "molmo2": MOLMO2_CASES, "fuyu": FUYU_CASES},
    **{"paligemma": PALIGEMMA_CASES, "idefics": IDEFICS_CASES, "vlmtrain": OWN_CASES},
}
"""Cases by their target; those of ``vlmtrain`` load only where it is imported."""


def export_all(cases: dict[str, Case], home: Path, *own: str) -> dict[str, dict]:
    """The output of transformers for the exports of some cases; own: with vlmtrain imported."""
    pictures, jobs = draw_pictures(home / "pictures"), []
    for name, case in cases.items():
        build(case, home / name / "model")
        export(home / name / "model", home / name / "out", case.form)
        how = {"backend": None} if own else options_of(case.becomes)
        jobs.append(job(home / name / "out", case.talks, pictures, **how))
    found = dict(zip(cases, run_outside(home, jobs, *own)))
    return {
        name: {"home": home / name, "parity": measure(found[name], home / name / "model", case.talks, pictures)}
        for name, case in cases.items()
    }


def build(case: Case, folder: Path) -> None:
    """Write a model folder."""
    if case.vision in NATIVE:
        build_native(folder.parent / "hf", case.vision)
        import_model(folder.parent / "hf", folder)
        return
    if case.vision == "idefics":
        build_idefics(folder.parent / "hf", **case.options)
        import_model(folder.parent / "hf", folder)
        return
    if case.vision == "fuyu":
        build_fuyu(folder.parent / "hf", size=UNSCALED)
        import_model(folder.parent / "hf", folder)
        return
    if case.vision == "paligemma":
        build_paligemma(folder.parent / "hf")
        import_model(folder.parent / "hf", folder)
        return
    torch.manual_seed(0)
    vision = build_encoder(case, folder / "encoder")
    tokenizer = build_tokenizer(case)
    ids = {key: getattr(tokenizer, key) for key in ("pad_token_id", "bos_token_id", "eos_token_id")}
    if case.llm == "flan_t5":
        llm = prepared(stir(flan_t5(vocab_size=len(tokenizer))))
    else:
        llm = stir(AutoModelForCausalLM.from_config(LLMS[case.llm](vocab_size=len(tokenizer), **ids)))
    reader = TextReader(frameless_tokenizer(), "instruction", 40) if case.reads else None
    words = {"text_vocab": reader.vocabulary.size, "text_positions": 40} if reader else {}
    tiled = case.fit == "tiles"
    connector = stir(make_connector(case.connector, vision, llm, {**case.options, **words}, newline=tiled or None))
    tokens, grid = connector.num_tokens(*vision.grid), connector.output_grid(*vision.grid)
    grids = ((1, 2), (2, 1), (2, 2)) if tiled else ()
    more, attention = {"tile_style": case.style}, "causal"
    if case.style == "molmo2":
        grids, attention = tuple(tile_grids(4)), "images"
        more |= {"tile_margin": 1, "patch_size": vision.patch_size, "connector": connector.config}
    views = [
        View(each.image_size, None, each.image_mean, each.image_std, each.patch_size)
        for each in vision.encoders.values()
    ]
    look = (case.fit, vision.image_mean, vision.image_std)
    geometry = Geometry(
        vision.image_size, *look, tokens, grid, grids, case.most, bool(case.most), others=tuple(views[1:]), **more
    )
    VLMWrapper(vision, connector, llm).save_pretrained(folder)
    how = {"attention": attention, "decoder_start": start_token(llm)}
    Processor(tokenizer, geometry, case.template, 1000, reader=reader, **how).save_pretrained(folder)


def build_encoder(case: Case, folder: Path) -> VisionEncoder:
    if case.vision == "several":
        openai = {"model_config": TOWERS["openai"], "image_size": 48, "image_mean": LOOK["image_mean"]}
        encoders = {"laion": {"model_config": TOWERS["laion"]}, "openai": openai}
        encoders = {name: {"provider": "open_clip", "layer": -1, **keys} for name, keys in encoders.items()}
        return stir(build_vision("several", encoders=encoders, grid="laion"))
    if case.vision in TOWERS:
        config = TOWERS[case.vision]
        return stir(build_vision("open_clip", model_config=config, image_size=case.image_size, layer=case.layer))
    stir(HF_VISION[case.vision]()).save_pretrained(folder)
    return build_vision("hf", path=str(folder), image_size=case.image_size, layer=case.layer, **LOOK)


def build_tokenizer(case: Case) -> PreTrainedTokenizerBase:
    if case.tokenizer == "t5":
        return t5_tokenizer()
    if "space" in case.tokenizer:
        return byte_tokenizer(case.tokenizer.split()[-1])
    tokenizer, marks = build_tiny_tokenizer(VOCABULARY), ["<|im_start|>", "<|im_end|>"]
    if case.tokenizer == "molmo2":
        marks += ["<im_start>", "<im_end>", "<low_res_im_start>"]
    if case.tokenizer in ("marks", "molmo2"):
        tokenizer.add_special_tokens({"additional_special_tokens": marks})
    return tokenizer


def frameless_tokenizer() -> PreTrainedTokenizerBase:
    """A tokenizer for a Q-Former: different from the language model's, and without special tokens around the text."""
    tokenizer = byte_tokenizer("first")
    tokenizer.backend_tokenizer.post_processor = None
    return tokenizer


# in

CHATTING = [ONE, TWO, ((*TWO[0], Turn("assistant", "The 2nd"), user("Sure?")), TWO[1])]


class Source(NamedTuple):
    """A model to import, its kind, and the questions it gets.

    write: writes the model as Hugging Face's class to ``hf`` in a folder; returns the arguments of
    `import_model`, if these are not just the model. kind: the class, or the publisher of a projector.
    """

    write: Callable[[Path], dict | None]
    kind: str
    talks: list[Talk]
    vision: str
    llm: str


def llava(kind: str = "llava", vision: str = "clip", llm: str = "llama", **options) -> Source:
    def write(folder: Path) -> None:
        build_llava(folder / "hf", kind, vision, llm, **options)

    return Source(write, MODEL_CLASSES[kind], CHATTING, vision, llm)


def blip(kind: str, llm: str = "opt", **options) -> Source:
    def write(folder: Path) -> None:
        build_blip(folder / "hf", kind, llm, **options)

    talks = [ONE, EQUAL] if kind == "instructblip" else [ONE, OTHER]
    return Source(write, MODEL_CLASSES[kind], talks, "blip2" if kind == "blip-2" else kind, llm)


def native(family: str) -> Source:
    def write(folder: Path) -> None:
        build_native(folder / "hf", family)

    return Source(write, MODEL_CLASSES[family], JOINED, family, NATIVE_CASES[family].llm)


def molmo2() -> Source:
    def write(folder: Path) -> None:
        build_molmo2(folder / "hf")

    return Source(write, MOLMO2, [ONE, TWO, AGAIN], "molmo2", "qwen3")


def fuyu() -> Source:
    def write(folder: Path) -> None:
        build_fuyu(folder / "hf", size=UNSCALED)

    return Source(write, FUYU, ALONE, "fuyu", "persimmon")


def paligemma(kind: str, llm: str) -> Source:
    def write(folder: Path) -> None:
        build_paligemma(folder / "hf", kind)

    return Source(write, PALIGEMMA, PROMPTS, "paligemma", llm)


def idefics(**options) -> Source:
    def write(folder: Path) -> None:
        build_idefics(folder / "hf", **options)

    return Source(write, IDEFICS, JOINED, "idefics", "llama")


def projector(depth: int) -> Source:
    return Source(partial(build_parts, depth=depth), "llava", CHATTING, "clip", "llama")


LLAVA_SOURCES = {
    "clip, llama": llava(),
    "clip, padded": llava(fit="pad"),
    "siglip, qwen2": llava(vision="siglip", llm="qwen2", fit="squash"),
    "dinov2, tied": llava(vision="dinov2", llm="llama, tied", vision_feature_layer=-1),
    "phi3, relu": llava(llm="phi3", projector_hidden_act="relu", vision_feature_layer=1),
    "no bias": llava(multimodal_projector_bias=False),
    "one layer": llava(projector_hidden_act="linear"),
    "next": llava(kind="llava_next"),
    "next, siglip, qwen2": llava(kind="llava_next", vision="siglip", llm="qwen2"),
    "onevision": llava(kind="llava_onevision", vision="siglip", llm="qwen2"),
    "projector": projector(2),
    "projector, one layer": projector(1),
}
BLIP_SOURCES = {
    "blip2, opt": blip("blip-2"),
    "blip2, an end of its own": blip("blip-2", end=40),
    "blip2, llama tied": blip("blip-2", llm="llama, tied", cross_attention_frequency=1),
    "instructblip, llama": blip("instructblip", llm="llama"),
    "instructblip, opt": blip("instructblip", cross_attention_frequency=3),
    "blip2, flan_t5": blip("blip-2", llm="flan_t5"),
    "instructblip, flan_t5": blip("instructblip", llm="flan_t5"),
}
NATIVE_SOURCES = {family: native(family) for family in NATIVE}
MOLMO2_SOURCES = {"molmo2": molmo2()}
FUYU_SOURCES = {"fuyu": fuyu()}
PALIGEMMA_SOURCES = {"paligemma": paligemma("paligemma", "gemma"), "paligemma2": paligemma("paligemma2", "gemma2")}
IDEFICS_SOURCES = {
    "resampler": idefics(),
    "features, without norms": idefics(resampler=False, qk_layer_norms=False),
    "gates of channels, tied": idefics(alpha_type="vector", tie_word_embeddings=True, spare=3),
}
IMPORTS = {
    **{"llava": LLAVA_SOURCES, "blip2": BLIP_SOURCES, "native": NATIVE_SOURCES, "molmo2": MOLMO2_SOURCES},
    **{"fuyu": FUYU_SOURCES, "paligemma": PALIGEMMA_SOURCES, "idefics": IDEFICS_SOURCES},
}


def import_all(sources: dict[str, Source], home: Path) -> dict[str, dict]:
    """Compare published models with the model folders that they are imported to, on the same conversations."""
    pictures, jobs, done = draw_pictures(home / "pictures"), [], {}
    for name, source in sources.items():
        told = source.write(home / name) or {"source": home / name / "hf"}
        done[name] = import_model(out=home / name / "model", **told)
        jobs.append(job(home / name / "hf", source.talks, pictures, **options_of(source.kind)))
    found = dict(zip(sources, run_outside(home, jobs)))
    return {
        name: {
            "home": home / name,
            "import": done[name],
            "parity": measure(found[name], home / name / "model", source.talks, pictures),
        }
        for name, source in sources.items()
    }
