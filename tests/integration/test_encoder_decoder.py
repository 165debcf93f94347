"""Encoder-decoder language models: gradients beside transformers' BLIP-2, and training, resume, validation and chat."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import Blip2ForConditionalGeneration, InstructBlipForConditionalGeneration

from tests.integration.imported_pairs import draw_noise
from tests.integration.published_models import build_blip
from tests.integration.tiny_parts import t5_tokenizer
from vlmtrain.data.images import ImageOnDisk
from vlmtrain.data.processor import Processor
from vlmtrain.data.records import Conversation, Turn
from vlmtrain.evaluation.chat import Chat
from vlmtrain.interop.export import export
from vlmtrain.interop.fitting import relative_difference
from vlmtrain.interop.importing import import_model
from vlmtrain.model import VLMWrapper
from vlmtrain.objectives.language_modelling import LanguageModelling
from vlmtrain.planning.plan import Machine, plan_run
from vlmtrain.runs.folder import RunFolder
from vlmtrain.settings import compose
from vlmtrain.training.checks import check_stages

from ..conftest import data_overrides, metrics, run, train

TALKS = [("What is this?", "a red circle"), ("Which is red, 1 or 2?", "2"), ("Why", "it is late")]
CLASSES = {"blip-2": Blip2ForConditionalGeneration, "instructblip": InstructBlipForConditionalGeneration}


@pytest.mark.parametrize("kind", CLASSES)
def test_losses_and_gradients_of_images_are_those_of_transformers(kind, tmp_path):
    """Rows of several lengths in one batch; transformers sees each row alone. In float64: some gradients are tiny."""
    build_blip(tmp_path / "hf", kind, llm="flan_t5")
    import_model(tmp_path / "hf", tmp_path / "model")
    model = VLMWrapper.from_pretrained(tmp_path / "model").double()
    processor = Processor.from_pretrained(tmp_path / "model")
    theirs = CLASSES[kind].from_pretrained(tmp_path / "hf").double().eval()
    draw_noise(tmp_path, {str(number): (40, 30) for number in range(len(TALKS))})
    talks = [
        Conversation("t", (Turn("user", f"<image>\n{asked}"), Turn("assistant", said)), (ImageOnDisk(file),))
        for (asked, said), file in zip(TALKS, sorted(tmp_path.glob("*.png")), strict=True)
    ]
    batch = processor.collate([processor(each) for each in talks]).to(torch.device("cpu"), torch.float64)
    pixels = batch.visual.normalized().pixels[0].clone().requires_grad_()
    given = batch._replace(visual=batch.visual._replace(pixels=(pixels,)))
    logits, expected_loss, found_loss = model(given), 0.0, LanguageModelling()(model, batch, None)
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
    lengths = (batch.lengths - batch.decoder.starts - 1).tolist()  # the last token of an answer predicts none
    sum((row * own)[:length].sum() for row, own, length in zip(logits, weights, lengths)).backward()
    for row, (asked, said) in enumerate(TALKS):
        ids, labels = (t5_tokenizer()(text, return_tensors="pt").input_ids for text in (asked, said))
        image = torch.full((1, 3), theirs.config.image_token_id)
        options = {}
        if kind == "instructblip":
            mask = batch.visual.texts.mask[row : row + 1].long()
            options = {"qformer_input_ids": batch.visual.texts.ids[row : row + 1], "qformer_attention_mask": mask}
        shown = pixels[row : row + 1].detach().requires_grad_()
        out = theirs(pixel_values=shown, input_ids=torch.cat([image, ids], 1), labels=labels, **options)
        count = labels.shape[1]
        assert relative_difference(logits[row, :count], out.logits[0]) <= 1e-5
        (out.logits[0] * weights[row, :count]).sum().backward()
        assert relative_difference(pixels.grad[row], shown.grad[0]) <= 1e-5
        expected_loss += float(out.loss) * count
    assert float(found_loss) == pytest.approx(expected_loss, rel=1e-5)


def test_other_formats_are_refused(tmp_path):
    build_blip(tmp_path / "hf", llm="flan_t5")
    import_model(tmp_path / "hf", tmp_path / "model")
    for form, words in (("vlmtrain", "use --format blip2"), ("llava", "only BLIP-2's classes have an encoder-decoder")):
        with pytest.raises(ValueError, match=words):
            export(tmp_path / "model", tmp_path / "out", form)


# training


def line(files: dict[str, Path], run_dir: Path, *more: str) -> list[str]:
    stages = {
        "align": ("max_steps=6", "batch_size=4", "template=prefix"),
        "instruct": ("max_steps=4", "batch_size=4", "template=bare", "train.vision=1e-4"),
    }
    return [
        *("recipe=llava_1_5", "mini=true", "llm.config.model_type=t5", "+llm.config.dropout_rate=0.0"),
        *(*data_overrides(files), f"run_dir={run_dir}", "workers=0"),
        *(f"stages.{stage}.{key}" for stage, keys in stages.items() for key in keys),
        *("validation.samples=4", "validation.final_samples=6", "validation.max_new_tokens=3", *more),
    ]


@pytest.fixture(scope="module")
def runs(llava_files, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("t5")
    train(*line(llava_files, folder / "run"))
    return folder


def test_recomputed_activations_and_micro_batches_change_nothing(runs, llava_files):
    split = ["stages.instruct.gradient_checkpointing=true", "stages.instruct.micro_batch_size=1"]
    start = [f"init_from={runs / 'run' / 'align' / 'model'}", "stage=instruct"]
    train(*line(llava_files, runs / "split", *start, *split))
    for one, other in zip(metrics(runs / "run", "instruct"), metrics(runs / "split", "instruct"), strict=True):
        for key in ("loss", "grad_norm"):
            assert one[key] == pytest.approx(other[key], rel=1e-4)
        assert one["flops"] > 0 and one["target_tokens"] == other["target_tokens"] < one["tokens"]


def test_adapters_validation_evaluation_and_chat(runs, llava_files):
    lora = ["stages.instruct.lora={llm: {rank: 2}}", f"init_from={runs / 'run' / 'align' / 'model'}", "stage=instruct"]
    train(*line(llava_files, runs / "lora", *lora))
    model = runs / "lora" / "instruct" / "model"
    assert (model.parent / "adapters" / "llm").exists() or (model / "adapters" / "llm").exists()
    scores = json.loads((runs / "lora" / "instruct" / "summary.json").read_text())["validation"]
    assert {"loss", "exact_match", "blind_exact_match"} <= scores.keys()
    data = [f"data.images={llava_files['images']}", f"data.validation={llava_files['validation']}", "data=llava_json"]
    done = run(sys.executable, "-m", "vlmtrain.cli", "evaluate", str(model), *data, "--json", "samples=6")
    found = json.loads(done.stdout)
    assert found["loss"] == pytest.approx(scores["loss"], rel=1e-5)
    chat = Chat(VLMWrapper.from_pretrained(model), Processor.from_pretrained(model))
    chat.show(llava_files["images"] / "red.png")
    pieces: list[str] = []
    first = chat.say("What color is this?", 5, pieces.append)
    assert "".join(pieces).strip() == first
    assert chat.say("Sure?", 5) is not None and len(chat.turns) == 4


def test_what_does_not_go_with_it_is_refused_before_training(llava_files, tmp_path):
    for more, words in (
        (["stages.instruct.layout=packed"], "layout=packed: T5ForConditionalGeneration is an encoder-decoder model"),
        (["stages.instruct.padding=false"], "padding=false: T5ForConditionalGeneration is an encoder-decoder model"),
        (
            ["fusion.attention=prefix"],
            "T5ForConditionalGeneration is an encoder-decoder model and does not support fusion.attention=prefix",
        ),
        (["llm.positions=mrope"], "llm.positions=mrope: T5ForConditionalGeneration has no rotary positions"),
        (
            ["fusion=gated_cross_attention", 'llm.new_tokens=["<image>"]', "connector=perceiver_resampler"],
            "fusion=gated_cross_attention needs a decoder-only language model",
        ),
        (
            ["validation.shots=[0,2]", "validation.shots_from=instruct"],
            "an encoder-decoder language model answers one question per sample",
        ),
    ):
        settings = compose(line(llava_files, tmp_path / "run", *more))
        with pytest.raises(ValueError, match=words):
            check_stages(settings, RunFolder(tmp_path / "run"))


def test_the_plan_has_the_published_size():
    """FlanT5-XL has 2.85B parameters."""
    generate = plan_run(compose(["recipe=blip2_flan_t5", "stage=generate", "init_from=null"]), Machine())[-1]
    assert generate.parts["llm"] == {"trainable": 0, "frozen": 2_849_757_184}
