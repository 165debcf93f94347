"""IDEFICS beside transformers: prompts, pixels, logits, gradients and answers; export, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from transformers import AutoImageProcessor, AutoProcessor, IdeficsForVisionText2Text

from tests.conftest import train
from tests.integration.idefics_models import FAKE, IMAGE, SIDE, build_idefics
from tests.integration.imported_pairs import Pair, draw_noise
from tests.integration.model_parity import IDEFICS, IDEFICS_CASES, check, export_all
from vlmtrain.batch import Batch
from vlmtrain.data import Conversation, Processor, Turn
from vlmtrain.data.images import ImageOnDisk
from vlmtrain.files import read_json
from vlmtrain.interop.export import export
from vlmtrain.interop.fitting import DoesNotFit, relative_difference
from vlmtrain.interop.idefics import as_idefics
from vlmtrain.interop.importing import import_model
from vlmtrain.model import VLMWrapper
from vlmtrain.model.attention import attend_in_segments

SIZES = {"wide": (50, 20), "tall": (20, 50), "same": (SIDE, SIDE)}
KINDS = {
    "resampler": {},
    "features": {"resampler": False, "alpha_type": "vector"},
    "without norms": {"qk_layer_norms": False, "dialogue": False, "spare": 2},
}
# questions, and the same as IDEFICS's processor takes them, without what a dialogue has around them
ASKED = (
    (f"{IMAGE}What is this?", ["wide", "What is this?"]),
    (f"See {IMAGE} and {IMAGE}: which?", ["See", "tall", "and", "wide", ": which?"]),
    (f"{IMAGE}{IMAGE}Both?", ["same", "wide", "Both?"]),
    ("Hello", ["Hello"]),
)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    draw_noise(folder, SIZES)
    return folder


@pytest.fixture(scope="module", params=KINDS)
def pair(request, tmp_path_factory) -> Pair:
    home = tmp_path_factory.mktemp("idefics")
    build_idefics(home / "hf", **KINDS[request.param])
    done = import_model(home / "hf", home / "model")
    model, processor = VLMWrapper.from_pretrained(home / "model").eval(), Processor.from_pretrained(home / "model")
    theirs, prepare = (
        IdeficsForVisionText2Text.from_pretrained(home / "hf").eval(),
        AutoProcessor.from_pretrained(home / "hf"),
    )
    prepare.image_processor = AutoImageProcessor.from_pretrained(home / "hf", backend="pil")
    return Pair(home, done, model, processor, theirs, prepare)


def batch_of(pair: Pair, files: Path, packed: bool = False) -> Batch:
    samples = []
    for said, pieces in ASKED:
        images = tuple(ImageOnDisk(files / f"{piece}.png") for piece in pieces if piece in SIZES)
        samples.append(pair.processor.prompt(Conversation("asked", (Turn("user", said),), images)))
    return pair.processor.pack(samples) if packed else pair.processor.collate(samples)


def inputs_of(pair: Pair, files: Path) -> dict:
    prompts = []
    for _, pieces in ASKED:
        prompt = [Image.open(files / f"{piece}.png") if piece in SIZES else piece for piece in pieces]
        if pair.done.template == "idefics":
            start = ["User:"] if pieces[0] in SIZES else []
            prompt = [*start, *prompt] if start else [f"User: {prompt[0]}", *prompt[1:]]
            prompt[-1] += "<end_of_utterance>\nAssistant:"
        prompts.append(prompt)
    return pair.prepare(text=prompts)


def test_prompts_pixels_logits_and_gradients(pair, files):
    batch, given = batch_of(pair, files).to(torch.device("cpu")), inputs_of(pair, files)
    real = given["attention_mask"].bool()
    for ids, mask, own, length in zip(given["input_ids"], real, batch.input_ids, batch.lengths, strict=True):
        assert ids[mask].equal(own[:length])
    pixels, theirs = batch.visual.pixels[0].requires_grad_(), given["pixel_values"].requires_grad_()
    counts = [sum(piece in SIZES for piece in pieces) for _, pieces in ASKED]
    assert (torch.cat([row[:count] for row, count in zip(theirs, counts)]) - pixels).abs().max() < 1e-6
    logits, expected = pair.model(batch), pair.theirs(**given).logits
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
    rows = list(zip(logits, expected, real, weights, batch.lengths))
    for ours, row, mask, _, length in rows:
        assert relative_difference(ours[:length], row[mask]) <= 1e-5
    sum((ours * each)[:length].sum() for ours, _, _, each, length in rows).backward()
    sum((row[mask] * each[:length]).sum() for _, row, mask, each, length in rows).backward()
    found = torch.cat([row[:count] for row, count in zip(theirs.grad, counts)])
    assert relative_difference(pixels.grad, found) <= 1e-5
    assert (found.abs().amax((1, 2, 3)) > 1e-4 * found.abs().max()).all()


def test_packed_rows_equal_padded_ones(pair, files):
    padded = batch_of(pair, files)
    expected = [row[: int(length)] for row, length in zip(pair.model(padded), padded.lengths)]
    model = VLMWrapper.from_pretrained(pair.home / "model").eval()
    attend_in_segments(model.llm)
    assert relative_difference(model(batch_of(pair, files, packed=True))[0], torch.cat(expected)) <= 1e-5


@torch.no_grad()
def test_greedy_answers(pair, files):
    given, options = inputs_of(pair, files), {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    options |= {"suppress_tokens": pair.prepare.tokenizer.convert_tokens_to_ids([FAKE, IMAGE]), "pad_token_id": 0}
    expected = pair.theirs.generate(**given, **options)[:, given["input_ids"].shape[1] :]
    assert pair.model.generate(batch_of(pair, files), **options).equal(expected)
    assert len({tuple(row) for row in expected.tolist()}) == len(ASKED)


def test_an_import_trains_and_exports_to_its_own_class(pair, files, tmp_path):
    assert pair.done.largest_relative_difference <= 1e-5
    model = pair.trained(batch_of(pair, files), tmp_path / "trained")
    done = export(tmp_path / "trained", tmp_path / "out")
    assert done.model_class == IDEFICS and done.largest_relative_difference <= 1e-5
    before, after = (load_file(folder / "model.safetensors") for folder in (pair.home / "hf", tmp_path / "out"))
    assert {name: each.shape for name, each in before.items()} == {name: each.shape for name, each in after.items()}
    same = {name for name in before if before[name].equal(after[name])}
    assert all("post_layernorm" in name for name in same)  # the norm after the encoder's last block is not read

    theirs = IdeficsForVisionText2Text.from_pretrained(tmp_path / "out").eval()
    given = inputs_of(pair._replace(prepare=AutoProcessor.from_pretrained(tmp_path / "out", backend="pil")), files)
    with torch.no_grad():
        found, expected = model.eval()(batch_of(pair, files)), theirs(**given).logits
    for ours, row, mask in zip(found, expected, given["attention_mask"].bool()):
        assert relative_difference(ours[: int(mask.sum())], row[mask]) <= 1e-5


@pytest.mark.slow
def test_models_agree_without_vlmtrain(tmp_path):
    for name, found in export_all(IDEFICS_CASES, tmp_path).items():
        check(found["parity"], 1e-5)
        assert (found["parity"].model_class, found["parity"].module) == (IDEFICS_CASES[name].becomes, "transformers")


@pytest.mark.slow
def test_a_run_starts_from_a_published_model_and_exports(tmp_path):
    build_idefics(tmp_path / "hf", resampler=False)
    line = ["recipe=idefics", "mini=true", "stage=instruct", f"init_from={tmp_path / 'hf'}", "data.validation=null"]
    steps = ["max_steps=1", "batch_size=2", "max_length=1500", "train.connector=null"]  # it has no weights
    train(*line, *(f"stages.instruct.{each}" for each in steps), "workers=0", "run_dir=run", cwd=tmp_path)
    model = tmp_path / "run" / "instruct" / "model"
    processor, parts = Processor.from_pretrained(model), read_json(model.parent / "summary.json")["parts"]
    assert processor.geometry.frame == (FAKE, FAKE) and processor.geometry.frame_shared
    assert {name for name, part in parts.items() if part["sha256_before"] != part["sha256_after"]} == {
        *("vision", "fusion", "llm")
    }
    done = export(model, tmp_path / "out", "idefics")
    assert done.model_class == IDEFICS and done.largest_relative_difference <= 1e-5


@pytest.mark.parametrize(
    ("options", "fit", "message"),
    [
        ({}, "pad", "--image-fit pad: .* is an IDEFICS, which supports only squash"),
        ({"dropout": 0.1}, None, r"config\.json: dropout=0\.1, expected 0"),
        ({"hidden_act": "gelu"}, None, r"hidden_act=gelu, expected silu"),
    ],
)
def test_what_cannot_be_imported_is_refused(options, fit, message, tmp_path):
    build_idefics(tmp_path / "hf", **options)
    with pytest.raises(ValueError, match=message):
        import_model(tmp_path / "hf", tmp_path / "model", image_fit=fit)


def test_other_prompts_pixels_and_tokenizers_are_refused(tmp_path):
    build_idefics(tmp_path / "hf")
    with pytest.raises(
        DoesNotFit, match="template=plain: IDEFICS's processor writes conversations that start with <s>"
    ):
        import_model(tmp_path / "hf", tmp_path / "model", template="plain")
    settings = tmp_path / "hf" / "processor_config.json"
    told = settings.read_text()
    settings.write_text(told.replace('"resample": 3', '"resample": 2'))
    with pytest.raises(DoesNotFit, match=r"IDEFICS's processor makes other pixels, by \d+ of 255 levels"):
        import_model(tmp_path / "hf", tmp_path / "model")
    settings.write_text(told.replace(f'": {SIDE}', f'": {SIDE + 8}'))
    with pytest.raises(DoesNotFit, match=r"IDEFICS's processor makes images .*, expected"):
        import_model(tmp_path / "hf", tmp_path / "model")
    settings.write_text(told)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        words = (tmp_path / "hf" / file).read_text()
        (tmp_path / "hf" / file).write_text(words.replace(FAKE, "<fake>"))
    with pytest.raises(ValueError, match=f"the tokenizer has no {FAKE}, which stands in prompts with images"):
        import_model(tmp_path / "hf", tmp_path / "model")


def named(connector: str) -> nn.Module:
    module = nn.Module()
    module.config = {"name": connector}
    return module


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m, p: setattr(m.fusion, "attend", "all"), "IDEFICS requires fusion.attend=last, got all"),
        (lambda m, p: setattr(m.fusion, "every", 3), "fusion.every=3: IDEFICS requires a divisor of the 4 blocks"),
        (lambda m, p: setattr(m.vision, "layer", 1), "IDEFICS requires vision.layer=2, got 1"),
        (
            lambda m, p: setattr(m.llm.config, "num_key_value_heads", 2),
            "IDEFICS requires num_key_value_heads=4, got 2",
        ),
        (
            lambda m, p: setattr(m, "connector", named("mlp")),
            "connector=mlp: IDEFICS has idefics_resampler, or identity",
        ),
        (lambda m, p: object.__setattr__(p.geometry, "fit", "pad"), "IDEFICS requires image_fit=squash, got pad"),
        (
            lambda m, p: object.__setattr__(p.geometry, "frame", ("", "")),
            r"IDEFICS requires llm.image_frame=\[.*\], got \['', ''\]",
        ),
    ],
)
def test_other_models_are_not_exported_as_idefics(change, message, pair):
    model, processor = VLMWrapper.from_pretrained(pair.home / "model"), Processor.from_pretrained(pair.home / "model")
    change(model, processor)
    with pytest.raises(DoesNotFit, match=message):
        as_idefics(model, processor)


def test_a_folder_in_the_layout_of_the_hub(tmp_path):
    build_idefics(tmp_path / "hf", spaces="always")
    config, images = (read_json(tmp_path / "hf" / name) for name in ("config.json", "processor_config.json"))
    del config["rope_parameters"], config["vision_config"]["model_type"]
    look = {key: images["image_processor"][key] for key in ("image_mean", "image_std", "image_processor_type")}
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    (tmp_path / "hf" / "preprocessor_config.json").write_text(json.dumps({**look, "image_size": SIDE}))
    (tmp_path / "hf" / "processor_config.json").unlink()
    assert import_model(tmp_path / "hf", tmp_path / "model").largest_relative_difference <= 1e-5
