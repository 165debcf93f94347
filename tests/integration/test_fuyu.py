"""Fuyu, imported: equal to transformers before and after training."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoProcessor, FuyuForCausalLM, FuyuImageProcessorPil

from tests.conftest import gpt, human, metrics, train
from tests.integration.fuyu_models import ANSWER, IMAGE, LARGEST, NEWLINE, PATCH, build_fuyu
from tests.integration.imported_pairs import Pair, draw_noise
from tests.integration.model_parity import FUYU_CASES, check, export_all
from vlmtrain.batch import Batch
from vlmtrain.cli import main
from vlmtrain.data import Conversation, Processor, Turn
from vlmtrain.data.images import ImageOnDisk
from vlmtrain.data.processor import Sample
from vlmtrain.interop.export import export
from vlmtrain.interop.fitting import DoesNotFit, relative_difference
from vlmtrain.interop.importing import import_model
from vlmtrain.model import VLMWrapper

SIZES = {  # width, height
    "wide": (31, 17),
    "tall": (11, 35),
    "whole": (18, 12),
    "pixel": (1, 1),
    "large": (130, 71),
    "limit": (48, 36),
    "long": (100, 3),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    draw_noise(folder, SIZES)
    return folder


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Pair:
    home = tmp_path_factory.mktemp("fuyu")
    build_fuyu(home / "hf")
    done = import_model(home / "hf", home / "model")
    model, processor = VLMWrapper.from_pretrained(home / "model").eval(), Processor.from_pretrained(home / "model")
    theirs = FuyuForCausalLM.from_pretrained(home / "hf").eval()
    return Pair(home, done, model, processor, theirs, AutoProcessor.from_pretrained(home / "hf"))


def samples_of(pair: Pair, files: Path, *names: str) -> list[Sample]:
    said = Turn("user", "<image>\nWhat is this?")
    return [pair.processor.prompt(Conversation(name, (said,), (ImageOnDisk(files / f"{name}.png"),))) for name in names]


def batch_of(pair: Pair, files: Path, *names: str) -> Batch:
    return pair.processor.collate(samples_of(pair, files, *names))


def canvas(files: Path, name: str) -> Tensor:
    """The whole canvas ``(3, H, W)`` of an image, made by transformers with Pillow."""
    images = FuyuImageProcessorPil(patch_size={"height": PATCH, "width": PATCH}, size=LARGEST)
    return images(Image.open(files / f"{name}.png"), return_tensors="pt")["images"][0, 0].float()


def inputs(pair: Pair, files: Path, name: str) -> dict[str, Tensor]:
    """The inputs of transformers' processor, with pixels of its canvas that is scaled with Pillow."""
    given = pair.prepare(
        images=Image.open(files / f"{name}.png"), text="What is this?", return_legacy_image_output=False
    )
    ids = given["input_ids"][0].tolist()
    rows = ids.count(pair.prepare.image_newline_id)
    columns = ids.count(pair.prepare.image_token_id) // rows
    shown = canvas(files, name)[None, :, : rows * PATCH, : columns * PATCH]
    patches = pair.prepare.image_processor.patchify_image(shown)[0]
    assert patches.shape == given["pixel_values"].shape
    return {"input_ids": given["input_ids"], "pixel_values": patches}


def test_prompts_pixels_logits_and_gradients(pair, files):
    """Images of several sizes in one batch; transformers sees each alone."""
    batch = batch_of(pair, files, *SIZES).to(torch.device("cpu"))
    shown = tuple(image.requires_grad_() for image in batch.visual.pixels[0])
    logits = pair.model(batch._replace(visual=batch.visual._replace(pixels=(shown,))))
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
    sum((row * own)[: int(n)].sum() for row, own, n in zip(logits, weights, batch.lengths)).backward()
    for number, name in enumerate(SIZES):
        given, length = inputs(pair, files, name), int(batch.lengths[number])
        ids = batch.input_ids[number].masked_fill(batch.visual.mask[number], pair.theirs.config.image_token_id)
        assert ids[:length].equal(given["input_ids"][0]), name
        pixels, (height, width) = shown[number], shown[number].shape[1:]
        assert (pixels - canvas(files, name)[:, :height, :width]).abs().max() < 1e-6, name
        given["pixel_values"].requires_grad_()
        expected = pair.theirs(**given).logits[0]
        assert relative_difference(logits[number, :length], expected) <= 1e-5, name
        (expected * weights[number, :length]).sum().backward()
        found = pair.prepare.image_processor.patchify_image(pixels.grad[None])[0]
        assert relative_difference(found, given["pixel_values"].grad) <= 1e-5, name


def test_packed_rows_equal_padded_ones(pair, files):
    pair.check_packed(samples_of(pair, files, "wide", "tall", "large"))


@torch.no_grad()
def test_greedy_answers(pair, files):
    options = {"max_new_tokens": 16, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    options["suppress_tokens"] = [pair.theirs.config.image_token_id]
    expected = []
    for name in SIZES:
        given = inputs(pair, files, name)
        expected.append(pair.theirs.generate(**given, **options)[0, given["input_ids"].shape[1] :])
    together = pair.model.generate(batch_of(pair, files, *SIZES), **options)
    assert all(one.equal(other) for one, other in zip(together, expected, strict=True))
    assert len({tuple(each.tolist()) for each in expected}) > 3


def test_counts_from_headers_equal_those_of_the_processor(pair):
    generator, geometry = random.Random(0), pair.processor.geometry
    sizes = [tuple(round(60 ** generator.random() * 3) for _ in range(2)) for _ in range(80)]
    sizes = [size for size in sizes if max(size) < 12 * min(size)]  # transformers cannot show a side below one pixel
    for height, width in [*sizes, (2000, 1999), (71, 48), (36, 200), (37, 48), (1, 30)]:
        given = pair.prepare(images=Image.new("RGB", (width, height)), text="?", return_legacy_image_output=False)
        ids = given["input_ids"][0].tolist()
        (item,), (placement,) = geometry.plan([(height, width)])
        assert placement.newlines == ids.count(pair.prepare.image_newline_id), (height, width)
        assert placement.slots == ids.count(pair.prepare.image_token_id) == math.prod(item.grids[0]), (height, width)
        assert placement.slots <= geometry.most_tokens


def test_what_was_imported_is_told(pair):
    assert (pair.done.image_fit, pair.done.template, pair.done.connector) == ("native", "fuyu", "linear")
    assert pair.done.largest_relative_difference <= 1e-5
    assert pair.processor.renderer.stop_ids == [pair.processor.tokenizer.convert_tokens_to_ids("|ENDOFTEXT|")]


def test_an_import_trains_and_exports_to_its_own_class(pair, files, tmp_path):
    model = pair.trained(batch_of(pair, files, "wide", "large"), tmp_path / "trained")
    done = export(tmp_path / "trained", tmp_path / "out")
    assert done.model_class == "FuyuForCausalLM" and done.largest_relative_difference <= 1e-5
    before, after = (load_file(folder / "model.safetensors") for folder in (pair.home / "hf", tmp_path / "out"))
    assert before.keys() == after.keys()
    changed = {name for name in before if not before[name].equal(after[name][: len(before[name])])}
    names = ("vision_embed_tokens", "language_model.model.embed_tokens", "language_model.lm_head")
    assert {f"{name}.weight" for name in names} < changed

    theirs, prepare = FuyuForCausalLM.from_pretrained(tmp_path / "out"), AutoProcessor.from_pretrained(tmp_path / "out")
    given = prepare(images=Image.open(files / "wide.png"), text="What is this?", return_legacy_image_output=False)
    expected = theirs(input_ids=given["input_ids"], pixel_values=given["pixel_values"]).logits[0]
    model.eval()
    assert relative_difference(model(batch_of(pair, files, "wide"))[0], expected) <= 1e-5
    own = export(tmp_path / "trained", tmp_path / "own", "vlmtrain")
    assert own.largest_relative_difference <= 1e-5


def test_exports_load_without_vlmtrain(tmp_path):
    for name, found in export_all(FUYU_CASES, tmp_path).items():
        check(found["parity"], 1e-5)
        assert (found["parity"].model_class, found["parity"].module) == (FUYU_CASES[name].becomes, "transformers")


def test_a_run_starts_from_a_published_model(files, tmp_path, capsys):
    records = [
        {"image": f"{name}.png", "conversations": [human("<image>\nWhat is this?"), gpt("noise")]}
        for name in ("wide", "large")
    ]
    records.append({"conversations": [human("hello"), gpt("noise")]})
    (tmp_path / "data.json").write_text(json.dumps(records))
    build_fuyu(tmp_path / "hf")
    data = [
        "data=llava_json",
        f"data.images={files}",
        f"data.instruct={tmp_path / 'data.json'}",
        "data.validation=null",
    ]
    limits = f"stages.instruct.image_pixels=[1,{LARGEST['height'] * LARGEST['width']}]"
    steps = [f"stages.instruct.{each}" for each in ("max_steps=1", "batch_size=3", "layout=padded", "max_length=400")]
    line = ["recipe=fuyu", "mini=true", "stage=instruct", *data, limits, *steps, "llm.new_tokens=[]"]
    line += ["llm.image_newline=null", f"features.cache={tmp_path / 'cache'}", f"init_from={tmp_path / 'hf'}"]
    train(*line, "run_dir=run", cwd=tmp_path)
    (step,) = metrics(tmp_path / "run", "instruct")
    held = Processor.from_pretrained(tmp_path / "run" / "instruct" / "model").geometry
    assert held.newline == NEWLINE and held.size == (LARGEST["height"], LARGEST["width"])
    assert not (tmp_path / "cache").exists()  # features of raw patches are their pixels

    line[-1] = f"init_from={tmp_path / 'run' / 'imported'}"
    main(["check", *line, "--json"])
    (report,) = json.loads(capsys.readouterr().out)["instruct"]["sources"].values()
    assert report["image_tokens"] == step["image_tokens"] == 3 * 6 + 5 * 8


def published_as_on_the_hub(folder: Path) -> None:
    """Rewrite a folder's configurations to the older layout of the published ones."""
    config = json.loads((folder / "config.json").read_text())
    text = config.pop("text_config")
    rope = text.pop("rope_parameters")
    text.pop("model_type")
    config.pop("image_token_id")  # 71011 on the Hub; the tiny vocabulary has another one
    kept = {"image_token_id": 1, "rope_theta": rope["rope_theta"]}
    (folder / "config.json").write_text(json.dumps({**text, **config, **kept}))
    images = json.loads((folder / "processor_config.json").read_text())["image_processor"]
    (folder / "preprocessor_config.json").write_text(json.dumps(images))
    (folder / "processor_config.json").unlink()


def test_a_folder_in_the_layout_of_the_hub(tmp_path):
    build_fuyu(tmp_path / "hf")
    published_as_on_the_hub(tmp_path / "hf")
    assert import_model(tmp_path / "hf", tmp_path / "model").largest_relative_difference <= 1e-5


@pytest.mark.parametrize(
    ("options", "fit", "message"),
    [
        ({}, "squash", "--image-fit squash: .* is a Fuyu, which supports only native"),
        ({"size": {"height": 40, "width": 48}}, None, r"expected multiples of patch_size=6 of config\.json"),
        ({"patch_size": {"height": 12, "width": 12}}, None, r"patch_size=\{'height': 12, 'width': 12\}, expected 6"),
        ({"image_mean": 0.4}, None, r"image_mean=0\.4, expected 0\.5"),
        ({"padding_value": 40.0}, None, "Fuyu's processor makes other pixels, by 39 of 255 levels"),
        ({"do_resize": False}, None, "Fuyu's processor (cannot prepare|makes other)"),
    ],
)
def test_what_cannot_be_imported_is_refused(options, fit, message, tmp_path):
    build_fuyu(tmp_path / "hf", **options)
    with pytest.raises(ValueError, match=message):
        import_model(tmp_path / "hf", tmp_path / "model", image_fit=fit)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"newline": ""}, r"Fuyu requires llm\.image_newline=\|NEWLINE\|, got None"),
        ({"frame": (IMAGE, ANSWER)}, "Fuyu requires llm.image_frame=.*, got "),
        ({"image_pixels": (1, 1000)}, r"image_pixels=\[1, 1000\]: .* MAX from 1728"),
        ({"image_pixels": (100, 1728)}, "expected MIN up to 36"),
    ],
)
def test_other_models_are_not_exported_as_fuyu(change, message, pair, tmp_path):
    processor = Processor.from_pretrained(pair.home / "model")
    for key, value in change.items():
        object.__setattr__(processor.geometry, key, value)
    pair.model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    with pytest.raises(DoesNotFit, match=message):
        export(tmp_path / "model", tmp_path / "out", "fuyu")
