"""PaliGemma and PaliGemma 2, imported: equal to transformers before and after training."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoProcessor, PaliGemmaForConditionalGeneration

from tests.integration.imported_pairs import Pair, draw_noise
from tests.integration.model_parity import PALIGEMMA_CASES, check, export_all
from tests.integration.paligemma_models import build_paligemma
from vlmtrain.batch import Batch
from vlmtrain.data import Conversation, Processor, Turn
from vlmtrain.data.images import ImageOnDisk
from vlmtrain.interop.export import export
from vlmtrain.interop.fitting import DoesNotFit, relative_difference
from vlmtrain.interop.importing import import_model
from vlmtrain.model import VLMWrapper

ASKED = {  # the images, the question and its answer
    "wide": (("wide",), "what is it?", "a red cat"),
    "long": (("tall",), "answer en how many of them are larger than this one?", "2"),
    "two": (("wide", "tall"), "same?", "no, the second one is taller"),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    draw_noise(folder, {"wide": (50, 20), "tall": (20, 60)})
    return folder


@pytest.fixture(scope="module", params=["paligemma", "paligemma2"])
def pair(request, tmp_path_factory) -> Pair:
    home = tmp_path_factory.mktemp(request.param)
    build_paligemma(home / "hf", request.param)
    done = import_model(home / "hf", home / "model")
    model, processor = VLMWrapper.from_pretrained(home / "model").eval(), Processor.from_pretrained(home / "model")
    theirs = PaliGemmaForConditionalGeneration.from_pretrained(home / "hf").eval()
    prepare = AutoProcessor.from_pretrained(home / "hf", backend="pil")
    return Pair(home, done, model, processor, theirs, prepare)


def conversation(files: Path, name: str, answered: bool = True) -> Conversation:
    images, question, answer = ASKED[name]
    turns = (Turn("user", "<image>" * len(images) + question), Turn("assistant", answer))
    return Conversation(name, turns[: 1 + answered], tuple(ImageOnDisk(files / f"{each}.png") for each in images))


def inputs(pair: Pair, files: Path, name: str, answered: bool = True) -> dict[str, Tensor]:
    """The inputs of transformers' class, with the answer as the suffix."""
    images, question, answer = ASKED[name]
    shown = [Image.open(files / f"{each}.png") for each in images]
    given = {"text": "<image>" * len(images) + question, "suffix": answer if answered else None}
    return dict(pair.prepare(images=shown, **given, return_tensors="pt"))


def batch_of(pair: Pair, files: Path) -> Batch:
    return pair.processor.collate([pair.processor(conversation(files, name)) for name in ASKED])


def test_prompts_pixels_labels_logits_and_gradients(pair, files):
    """Prompts and answers in one batch; transformers sees each alone."""
    batch = batch_of(pair, files).to(torch.device("cpu"))
    shown = batch.visual.pixels[0].requires_grad_()
    logits = pair.model(batch._replace(visual=batch.visual._replace(pixels=(shown,))))
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
    sum((row * own)[: int(n)].sum() for row, own, n in zip(logits, weights, batch.lengths)).backward()
    start = 0
    for number, (name, (images, _, _)) in enumerate(ASKED.items()):
        given, length = inputs(pair, files, name), int(batch.lengths[number])
        ids = batch.input_ids[number].masked_fill(batch.visual.mask[number], pair.theirs.config.image_token_id)
        assert ids[:length].equal(given["input_ids"][0]), name
        labels = given.pop("labels")[0]
        trained = batch.weights[number, :length] > 0
        assert batch.targets[number, :length][trained].equal(labels[labels != -100]), name
        mine = slice(start, start := start + len(images))
        assert (shown[mine] - given["pixel_values"]).abs().max() < 1e-6, name
        given["pixel_values"].requires_grad_()
        expected = pair.theirs(**given).logits[0]
        assert relative_difference(logits[number, :length], expected) <= 1e-5, name
        (expected * weights[number, :length]).sum().backward()
        assert relative_difference(shown.grad[mine], given["pixel_values"].grad) <= 1e-5, name


def test_packed_rows_equal_padded_ones(pair, files):
    pair.check_packed([pair.processor(conversation(files, name)) for name in ASKED])


@torch.no_grad()
def test_greedy_answers(pair, files):
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    options["suppress_tokens"] = [pair.theirs.config.image_token_id]
    expected = []
    for name in ASKED:
        given = inputs(pair, files, name, answered=False)
        given.pop("labels")
        expected.append(pair.theirs.generate(**given, **options)[0, given["input_ids"].shape[1] :])
    prompts = [pair.processor.prompt(conversation(files, name, answered=False)) for name in ASKED]
    together = pair.model.generate(pair.processor.collate(prompts), **options)
    assert all(one.equal(other) for one, other in zip(together, expected, strict=True))
    assert len({tuple(each.tolist()) for each in expected}) > 1


def test_what_was_imported_is_told(pair):
    assert (pair.done.image_fit, pair.done.template, pair.done.connector) == ("squash", "paligemma", "linear")
    assert pair.done.largest_relative_difference <= 1e-5
    assert pair.processor.attention == "prefix" and pair.model.vision.final_norm


def test_an_import_trains_and_exports_to_its_own_class(pair, files, tmp_path):
    model = pair.trained(batch_of(pair, files), tmp_path / "trained")
    done = export(tmp_path / "trained", tmp_path / "out")
    assert done.model_class == "PaliGemmaForConditionalGeneration" and done.largest_relative_difference <= 1e-5
    before, after = (load_file(folder / "model.safetensors") for folder in (pair.home / "hf", tmp_path / "out"))
    assert before.keys() == after.keys()
    unchanged = {name for name in before if before[name].equal(after[name][: len(before[name])])}
    assert not unchanged

    theirs = PaliGemmaForConditionalGeneration.from_pretrained(tmp_path / "out")
    prepare = AutoProcessor.from_pretrained(tmp_path / "out", backend="pil")
    given = inputs(pair._replace(prepare=prepare), files, "two")
    given.pop("labels")
    expected = theirs(**given).logits[0]
    alone = pair.processor.collate([pair.processor(conversation(files, "two"))])
    assert relative_difference(model.eval()(alone)[0], expected) <= 1e-5


@pytest.mark.slow
def test_exports_load_without_vlmtrain(tmp_path):
    for name, found in export_all(PALIGEMMA_CASES, tmp_path).items():
        check(found["parity"], 1e-5)
        assert (found["parity"].model_class, found["parity"].module) == (PALIGEMMA_CASES[name].becomes, "transformers")


@pytest.mark.parametrize(
    ("options", "fit", "message"),
    [
        ({}, "pad", "--image-fit pad: .* is a PaliGemma, which supports only squash"),
        ({"resample": 2}, None, r"resample=2, expected 3 \(bicubic\)"),
        ({"size": {"height": 24, "width": 24}}, None, "images of 1 x 24 x 24 pixels, expected 1 x 32 x 32"),
    ],
)
def test_what_cannot_be_imported_is_refused(options, fit, message, tmp_path):
    build_paligemma(tmp_path / "hf", **options)
    with pytest.raises(ValueError, match=message):
        import_model(tmp_path / "hf", tmp_path / "model", image_fit=fit)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda model, _: setattr(model.vision, "final_norm", False),
            r"vision\.final_norm=false: PaliGemma's features",
        ),
        (lambda _, processor: setattr(processor, "attention", "causal"), "LLaVA's classes take features before"),
        (
            lambda _, processor: object.__setattr__(processor.geometry, "fit", "pad"),
            "exported only as PaliGemma: PaliGemma requires image_fit=squash, got pad",
        ),
        (
            lambda _, processor: setattr(processor.renderer, "template", "interleaved"),
            "PaliGemma requires template=paligemma, got interleaved",
        ),
    ],
)
def test_other_models_are_not_exported_as_paligemma(change, message, pair, tmp_path):
    model, processor = (each.from_pretrained(pair.home / "model") for each in (VLMWrapper, Processor))
    change(model, processor)
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    form = "llava" if processor.attention == "causal" else "paligemma"
    with pytest.raises(DoesNotFit, match=message):
        export(tmp_path / "model", tmp_path / "out", form)
