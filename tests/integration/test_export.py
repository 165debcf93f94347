"""Exported models where vlmtrain cannot be imported: the same tokens, logits and answers, alone and in batches."""

from __future__ import annotations

import copy
import json
import re
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from timm.models import register_model, vision_transformer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    Gemma2Config,
    GenerationConfig,
    GPT2Config,
    LlamaConfig,
    OPTConfig,
    Phi3Config,
    PreTrainedTokenizerFast,
    Qwen2Config,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from tests.conftest import run
from vlmtrain.cli import main
from vlmtrain.data.connector_text import TextReader
from vlmtrain.data.images import ImageOnDisk
from vlmtrain.data.processor import Geometry, Processor
from vlmtrain.data.records import IMAGE_MARK, Conversation, Turn
from vlmtrain.interop.export import export
from vlmtrain.model import VLMWrapper
from vlmtrain.model.parts import make_connector
from vlmtrain.model.vision import VisionEncoder, build_vision

SIDE, PATCH, NEW = 32, 8, 12
SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED = {**SHAPE, "intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8}
LLMS = {
    "llama": lambda **o: LlamaConfig(**GROUPED, **o),
    "llama, tied": lambda **o: LlamaConfig(**GROUPED, tie_word_embeddings=True, **o),
    "qwen2": lambda **o: Qwen2Config(**GROUPED, **o),
    "qwen2, rows to spare": lambda **o: Qwen2Config(**GROUPED, **{**o, "vocab_size": o["vocab_size"] + 7}),
    "phi3": lambda **o: Phi3Config(**GROUPED, **o),
    "gemma2, no cap": lambda **o: Gemma2Config(**GROUPED, final_logit_softcapping=None, **o),
    "gemma2": lambda **o: Gemma2Config(**GROUPED, final_logit_softcapping=3.0, **o),
    "opt": lambda **o: OPTConfig(**SHAPE, ffn_dim=48, word_embed_proj_dim=32, **o),
    "gpt2": lambda **o: GPT2Config(n_embd=32, n_layer=2, n_head=4, **o),
}
COMMON = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": SIDE, "patch_size": PATCH}
DINO = {**COMMON, "mlp_ratio": 2}
HF_VISION = {
    "clip": lambda: CLIPVisionModel(CLIPVisionConfig(**COMMON, intermediate_size=32)),
    "siglip": lambda: SiglipVisionModel(SiglipVisionConfig(**COMMON, intermediate_size=32)),
    "dinov2": lambda: Dinov2Model(Dinov2Config(**DINO)),
    "registers": lambda: Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**DINO, num_register_tokens=4)),
}
OPEN_CLIP = {
    "embed_dim": 12,
    "vision_cfg": {"image_size": SIDE, "layers": 3, "width": 16, "head_width": 8, "patch_size": PATCH},
    "text_cfg": {"context_length": 8, "vocab_size": 32, "width": 16, "heads": 2, "layers": 1},
}
TOWERS = {
    "openai": {**OPEN_CLIP, "quick_gelu": True},
    "laion": OPEN_CLIP,
    "layer scale": {**OPEN_CLIP, "vision_cfg": {**OPEN_CLIP["vision_cfg"], "ls_init_value": 0.3}},
    "coca": {**OPEN_CLIP, "vision_cfg": {**OPEN_CLIP["vision_cfg"], "attentional_pool": True, "attn_pooler_heads": 2}},
    "no pre-norm": {**OPEN_CLIP, "vision_cfg": {**OPEN_CLIP["vision_cfg"], "no_ln_pre": True}},
    "timm vit": {
        "embed_dim": 12,
        "vision_cfg": {"timm_model_name": "test_vit", "timm_pool": "", "timm_proj": "linear", "image_size": SIDE},
        "text_cfg": OPEN_CLIP["text_cfg"],
    },
    "timm siglip": {
        "embed_dim": 16,
        "vision_cfg": {
            "timm_model_name": "tiny_siglip",
            "timm_pool": "map",
            "timm_proj": "none",
            "image_size": SIDE,
        },
        "text_cfg": OPEN_CLIP["text_cfg"],
    },
}


@register_model
def tiny_siglip(pretrained: bool = False, **options) -> nn.Module:
    """SigLIP's image tower as timm builds it, small."""
    shape = {"patch_size": PATCH, "embed_dim": 16, "depth": 3, "num_heads": 2, "mlp_ratio": 2}
    shape |= {"class_token": False, "act_layer": "gelu_tanh"}
    return vision_transformer._create_vision_transformer("tiny_siglip", pretrained, **{**shape, **options})


class Case(NamedTuple):
    """What is exported, and the class that it should become."""

    vision: str = "clip"
    llm: str = "llama"
    connector: str = "mlp"
    options: dict = {}  # noqa: RUF012
    fit: str = "squash"
    template: str = "chat"
    tokenizer: str = "tiny"
    image_size: int | None = None
    layer: int = -2
    form: str = "hf"
    becomes: str = "LlavaForConditionalGeneration"


NEXT = {"fit": "tiles", "becomes": "LlavaNextForConditionalGeneration"}
UNFIT = ("registers", "no pre-norm", "timm vit")
CASES = {
    **{vision: Case(vision=vision) for vision in (*HF_VISION, *TOWERS) if vision not in UNFIT},
    **{llm: Case(llm=llm) for llm in LLMS if llm != "gemma2"},
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
    "tiles": Case(**NEXT),
    "tiles, siglip, linear": Case(vision="siglip", connector="linear", **NEXT),
    "tiles, openai": Case(vision="openai", llm="qwen2", **NEXT),
    "tiles, another size": Case(vision="dinov2", image_size=48, **NEXT),
}
OWN = {"becomes": "VLMTrainForConditionalGeneration"}
READING = {"num_queries": 3, "hidden_size": 16, "depth": 2, "num_heads": 2, "intermediate_size": 16, "dropout": 0.0}
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
}
PICTURES = {"wide.png": (64, 32), "tall.png": (32, 64), "square.png": (32, 32), "large.png": (130, 90)}
TALKS = (
    ((Turn("user", f"{IMAGE_MARK}\nWhat is this?"),), ("wide.png",)),
    ((Turn("user", f"{IMAGE_MARK}\n{IMAGE_MARK}\nWhich is red, 1 or 2?"),), ("square.png", "tall.png")),
    (
        (
            Turn("user", f"What is in\n{IMAGE_MARK}"),
            Turn("assistant", "a red circle"),
            Turn("user", f"{IMAGE_MARK}\nand in this one, which is larger by far?"),
        ),
        ("large.png", "wide.png"),
    ),
)


def stir(module: nn.Module) -> nn.Module:
    """Far from where all outputs are alike."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(3) if parameter.dim() > 1 else parameter.add_(0.2 * torch.randn(parameter.shape))
    return module.eval()


def byte_tokenizer(scheme: str) -> PreTrainedTokenizerFast:
    """Like Llama-2's: spaces shown as a sign of their own, one before the first word, and a BOS of its own accord."""
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<s>", "</s>", "<unk>", "\u2581"])}
    for code in range(32, 127):
        vocabulary.setdefault(chr(code), len(vocabulary))
    for token in ("\n", "\u00e9"):
        vocabulary[token] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=scheme)
    tokenizer.add_special_tokens(["<pad>", "<s>", "</s>", "<unk>"])
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", [("<s>", 1)])
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def build_encoder(case: Case, folder: Path) -> VisionEncoder:
    if case.vision in TOWERS:
        return build_vision("open_clip", model_config=TOWERS[case.vision], image_size=case.image_size, layer=case.layer)
    stir(HF_VISION[case.vision]()).save_pretrained(folder)
    look = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]}
    return build_vision("hf", path=str(folder), image_size=case.image_size, layer=case.layer, **look)


def build(case: Case, folder: Path, tiny) -> None:
    """Write a model folder."""
    torch.manual_seed(0)
    vision = build_encoder(case, folder / "encoder")
    if case.vision in TOWERS:
        stir(vision)
    tokenizer = copy.deepcopy(tiny) if "space" not in case.tokenizer else byte_tokenizer(case.tokenizer.split()[-1])
    if case.tokenizer == "marks":
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = LLMS[case.llm](vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **ids)
    llm = stir(AutoModelForCausalLM.from_config(config))
    tiled = case.fit == "tiles"
    connector = stir(make_connector(case.connector, vision, llm, case.options, newline=tiled))
    tokens, grid = connector.num_tokens(*vision.grid), connector.output_grid(*vision.grid)
    grids = ((1, 2), (2, 1), (2, 2)) if tiled else ()
    look = (vision.image_mean, vision.image_std)
    geometry = Geometry(vision.image_size, case.fit, *look, tokens, grid, grids)
    VLMWrapper(vision, connector, llm).save_pretrained(folder)
    Processor(tokenizer, geometry, case.template, 1000).save_pretrained(folder)


def talks(case: Case, pictures: Path) -> list[tuple[tuple[Turn, ...], list[Path]]]:
    chosen = [talk for talk in TALKS if case.template != "plain" or len(talk[0]) == 1]
    return [(turns, [pictures / name for name in names]) for turns, names in chosen]


def typed(turn: Turn) -> dict:
    """A turn as Hugging Face's processors are told of it."""
    content = []
    for line in turn.text.split("\n"):
        content.append({"type": "image"} if line == IMAGE_MARK else {"type": "text", "text": line})
    return {"role": turn.role, "content": content}


def run_exports(folder: Path, jobs: list[dict], *own: str) -> list[dict]:
    (folder / "jobs.json").write_text(json.dumps(jobs))
    script = Path(__file__).with_name("transformers_only.py")
    run(sys.executable, str(script), str(folder / "jobs.json"), str(folder / "found.pt"), *own, cwd=folder)
    return torch.load(folder / "found.pt", weights_only=True)


def job(case: Case, folder: Path, pictures: Path, backend: str | None = "pil") -> dict:
    asked = talks(case, pictures)
    return {
        "backend": backend,
        "folder": str(folder),
        "questions": [[typed(turn) for turn in turns] for turns, _ in asked],
        "pictures": [[str(file) for file in files] for _, files in asked],
    }


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    generator = np.random.default_rng(0)
    for name, size in PICTURES.items():
        Image.fromarray(generator.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)).save(folder / name)
    return folder


@pytest.fixture(scope="module")
def exported(tmp_path_factory, tokenizer, pictures) -> dict[str, dict]:
    """What transformers alone makes of every case."""
    home = tmp_path_factory.mktemp("exports")
    for name, case in CASES.items():
        build(case, home / name / "model", tokenizer)
        export(home / name / "model", home / name / "out", case.form)
    found = run_exports(home, [job(case, home / name / "out", pictures) for name, case in CASES.items()])
    return {name: {**each, "home": home / name} for name, each in zip(CASES, found)}


@pytest.fixture(scope="module")
def own(tmp_path_factory, tokenizer, pictures) -> dict[str, dict]:
    """What transformers makes of every case that needs vlmtrain."""
    home = tmp_path_factory.mktemp("own")
    for name, case in OWN_CASES.items():
        build(case, home / name / "model", tokenizer)
        export(home / name / "model", home / name / "out", case.form)
    jobs = [job(case, home / name / "out", pictures, None) for name, case in OWN_CASES.items()]
    return {name: {**each, "home": home / name} for name, each in zip(OWN_CASES, run_exports(home, jobs, "own"))}


def ours(home: Path, case: Case, pictures: Path) -> list[dict]:
    model, processor = VLMWrapper.from_pretrained(home / "model"), Processor.from_pretrained(home / "model")
    answers = []
    for turns, files in talks(case, pictures):
        prompt = processor.prompt(Conversation("asked", turns, tuple(map(ImageOnDisk, files))))
        batch = processor.collate([prompt])
        options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": processor.renderer.stop_ids}
        with torch.no_grad():
            logits = model(batch.input_ids, batch.images, batch.is_image, tiles=batch.tiles)[0]
            ids = model.generate(
                batch.input_ids, batch.images, batch.is_image, batch.lengths, batch.tiles, pad_token_id=0, **options
            )
        text = processor.tokenizer.decode(ids[0], skip_special_tokens=True)
        answers.append({"tokens": prompt.tokens, "logits": logits, "answer": text, "images": batch.images})
    return answers


def difference(found: Tensor, expected: Tensor) -> float:
    return float((found[..., : expected.shape[-1]] - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("name", CASES)
def test_transformers_alone_gives_the_same(name, exported, pictures):
    assert exported[name]["module"] == "transformers"
    check(CASES[name], exported[name], pictures)


@pytest.mark.parametrize("name", OWN_CASES)
def test_whatever_else_loads_once_vlmtrain_is_imported(name, own, pictures):
    check(OWN_CASES[name], own[name], pictures)


def check(case: Case, found: dict, pictures: Path) -> None:
    assert found["class"] == case.becomes
    answers = ours(found["home"], case, pictures)
    ends = torch.stack([each["logits"][-1] for each in answers])
    assert ends.std(0).max() > 0.01 * ends.abs().max()  # the pictures matter
    for which in ("alone", "batch"):
        for expected, got in zip(answers, found[which], strict=True):
            text, ids = expected["tokens"].image_index < 0, torch.tensor(got["ids"])
            assert len(ids) == len(text) and ids[text].equal(expected["tokens"].input_ids[text])
            assert len(ids[~text].unique()) == 1 and not torch.isin(ids[text], ids[~text]).any()
            assert difference(got["logits"], expected["logits"]) <= 1e-4, which
            assert got["answer"] == expected["answer"], which


def test_the_quicker_scaling_is_off_by_rounding_only(exported, pictures):
    """Not on pictures of the encoder's size, which nothing scales."""
    case, folder = CASES["clip"], exported["clip"]["home"]
    (found,) = run_exports(folder, [job(case, folder / "out", pictures, backend=None)])
    answers = ours(folder, case, pictures)
    std = min(Processor.from_pretrained(folder / "model").geometry.std)
    for expected, got in zip(answers, found["alone"], strict=True):
        assert float((got["pixels"] - expected["images"]).abs().max()) <= 1.01 / 255 / std
        assert difference(got["logits"], expected["logits"]) <= 0.02


# what does not fit


@pytest.mark.parametrize(
    "case, words",
    [
        (Case(vision="registers"), "5 prefix tokens"),
        (Case(llm="gemma2"), "LlavaForConditionalGeneration gives other logits than Gemma2ForCausalLM"),
        (
            Case(connector="avgpool", options={"window": 2}),
            "connector=avgpool: LLaVA's classes have linear and mlp only",
        ),
        (Case(options={"depth": 3}), "connector.depth=3"),
        (Case(options={"hidden_dim": 50}), "connector.hidden_dim=50"),
        (Case(vision="no pre-norm"), "this image tower is no CLIPVisionModel: pre_layrnorm"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_llava_cannot_hold_is_refused_with_what_works(case, words, tmp_path, tokenizer):
    build(case, tmp_path / "model", tokenizer)
    with pytest.raises(ValueError, match=re.escape(words)) as error:
        export(tmp_path / "model", tmp_path / "out", "llava")
    assert "--format vlmtrain takes any" in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_bad_folders_are_named(tmp_path, tokenizer, capsys):
    build(Case(), tmp_path / "model", tokenizer)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    for arguments, words in (
        (["export", str(tmp_path / "model"), str(tmp_path / "full")], "full exists already"),
        (["export", "none", str(tmp_path / "full" / "file" / "out")], "full/file is no folder that can be written to"),
        (["import", "none", str(tmp_path / "full" / "file" / "out")], "full/file is no folder that can be written to"),
        (["export", str(tmp_path / "none"), str(tmp_path / "out")], "none is not a model folder"),
    ):
        with pytest.raises(SystemExit):
            main(arguments)
        assert words in capsys.readouterr().err


def test_the_command_says_what_it_wrote(tmp_path, tokenizer, capsys):
    build(Case(fit="pad"), tmp_path / "model", tokenizer)
    main(["export", str(tmp_path / "model"), str(tmp_path / "out"), "--format", "hf", "--json"])
    said = json.loads(capsys.readouterr().out)
    assert said["model_class"] == "LlavaForConditionalGeneration" and said["largest_relative_difference"] < 1e-4
    assert any("image_fit=pad" in remark for remark in said["remarks"])
    main(["export", str(tmp_path / "model"), str(tmp_path / "again")])
    assert "LlavaForConditionalGeneration" in capsys.readouterr().out


def test_a_connector_that_reads_gets_its_instructions(tmp_path, tokenizer, pictures):
    case = Case(connector="qformer", options={**READING, "text_vocab": 400})
    build(case, tmp_path / "model", tokenizer)
    processor = Processor.from_pretrained(tmp_path / "model")
    processor.reader = TextReader(tokenizer, "instruction", 16)
    processor.save_pretrained(tmp_path / "model")
    done = export(tmp_path / "model", tmp_path / "out")
    assert done.model_class == "VLMTrainForConditionalGeneration" and "connector.vision_norm=false" in done.remarks[0]
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    theirs = AutoProcessor.from_pretrained(tmp_path / "out")
    ((turns, files), *_) = talks(case, pictures)
    shown = [Image.open(file) for file in files]
    text = theirs.apply_chat_template([typed(turn) for turn in turns], add_generation_prompt=True, tokenize=False)
    batch = processor.collate([processor.prompt(Conversation("one", turns, tuple(map(ImageOnDisk, files))))])
    with torch.no_grad():
        found = [model(**theirs(shown, text, instructions=[words])).logits for words in ("What is this?", "Who?")]
        expected = VLMWrapper.from_pretrained(tmp_path / "model")(
            batch.input_ids, batch.images, batch.is_image, text_ids=batch.text_ids, text_mask=batch.text_mask
        )
    assert difference(found[0], expected) <= 1e-4 < difference(found[1], expected)
    with pytest.raises(ValueError, match="pass instructions"):
        theirs(shown, text)
    with pytest.raises(ValueError, match="1 <image> tokens in the text, 2 pictures"):
        theirs(shown * 2, text)


def test_the_own_class_generates_what_transformers_callers_ask_for(tmp_path, tokenizer, pictures):
    case = Case(connector="avgpool", options={"window": 2})
    build(case, tmp_path / "model", tokenizer)
    export(tmp_path / "model", tmp_path / "out", "vlmtrain")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    theirs = AutoProcessor.from_pretrained(tmp_path / "out")
    ((turns, files), *_) = talks(case, pictures)
    text = theirs.apply_chat_template([typed(turn) for turn in turns], add_generation_prompt=True, tokenize=False)
    inputs = theirs([Image.open(file) for file in files], text)
    plain = model.generate(**inputs, max_new_tokens=4)
    found = model.generate(**inputs, max_new_tokens=4, return_dict_in_generate=True, output_scores=True)
    assert found.sequences.equal(plain) and len(found.scores) == plain.shape[1] - inputs["input_ids"].shape[1]
    settings = GenerationConfig(max_new_tokens=4, eos_token_id=model.generation_config.eos_token_id, pad_token_id=0)
    assert model.generate(**inputs, generation_config=settings)[0, : plain.shape[1]].equal(plain[0])
    # the exported settings hold: an end of turn there ends the answer
    model.generation_config.eos_token_id = int(plain[0, inputs["input_ids"].shape[1]])
    assert model.generate(**inputs, max_new_tokens=4).shape[1] == inputs["input_ids"].shape[1] + 1


@pytest.fixture(scope="module")
def own_class(tmp_path_factory, tokenizer) -> tuple:
    """A model of the own class, and its processor."""
    folder = tmp_path_factory.mktemp("own_class")
    build(Case(connector="avgpool", options={"window": 2}), folder / "model", tokenizer)
    export(folder / "model", folder / "out", "vlmtrain")
    model = AutoModelForImageTextToText.from_pretrained(folder / "out")
    return model.eval(), AutoProcessor.from_pretrained(folder / "out")


def test_the_own_class_takes_no_loss_at_pictures(own_class, pictures):
    """Labels that are the ids, as transformers' collators have them: image tokens are nothing to predict."""
    model, theirs = own_class
    inputs = theirs(Image.open(pictures / "wide.png"), f"{IMAGE_MARK}what is this", return_tensors="pt")
    ids = inputs["input_ids"]
    with torch.no_grad():
        done = model(**inputs, labels=ids)
    targets = ids[0, 1:]
    words = targets != theirs.image_token_id
    assert 0 < words.sum() < len(words)
    expected = nn.functional.cross_entropy(done.logits[0, :-1][words], targets[words])
    torch.testing.assert_close(done.loss, expected)


def test_the_own_processor_takes_files(own_class, pictures):
    _, theirs = own_class
    file, text = pictures / "large.png", f"{IMAGE_MARK}what is this"
    expected = theirs(Image.open(file), text)["pixel_values"]
    for given in (file, str(file), [[str(file)]]):
        assert theirs(given, text)["pixel_values"].equal(expected)
    content = [{"type": "image", "path": str(file)}, {"type": "text", "text": "what is this"}]
    talk = [{"role": "user", "content": content}]
    rendered = theirs.apply_chat_template(talk, tokenize=True, return_dict=True, return_tensors="pt")
    assert rendered["pixel_values"].equal(expected)
    with pytest.raises(ValueError, match=r"none\.png does not exist"):
        theirs("none.png", text)
    with pytest.raises(ValueError, match="images: got a Tensor, expected PIL pictures or paths") as error:
        theirs(torch.zeros(3, 8, 8), text)
    assert "\n" not in str(error.value)


def test_importing_vlmtrain_loads_nothing():
    run(sys.executable, "-c", "import vlmtrain, sys; assert not {'torch', 'transformers'} & set(sys.modules)")
