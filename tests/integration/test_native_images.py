"""Images of their own sizes in every command: the same counts, and the same answers after saving and export."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

from tests.conftest import gpt, human, run, train
from tests.integration import native_models
from vlmtrain import build_model
from vlmtrain.data import Conversation, Processor, Turn
from vlmtrain.data.images import ImageOnDisk
from vlmtrain.evaluation.generation import generate
from vlmtrain.interop.export import export
from vlmtrain.model import VLMWrapper

SIZES = [(75, 45), (45, 75), (48, 48), (130, 24)]  # (width, height)
LIMITS = (576, 4096)
# 75 x 45 pixels are rounded to 6 x 4 patches of 12 pixels, or to 3 x 2 windows of two patches
PATCHES, WINDOWS = [24, 24, 16, 22], [6, 6, 4, 5]
FIT = ["stages.instruct.image_fit=native", f"stages.instruct.image_pixels=[{LIMITS[0]},{LIMITS[1]}]"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder, records = tmp_path_factory.mktemp("native"), []
    for number, size in enumerate(SIZES):
        image = Image.effect_noise(size, 90).convert("RGB")
        image.save(folder / f"{number}.png")
        records.append({"image": f"{number}.png", "conversations": [human("<image>\nWhat color?"), gpt("red")]})
    (folder / "data.json").write_text(json.dumps(records))
    return folder


def data(folder) -> list[str]:
    splits = (f"data.{split}={folder / 'data.json'}" for split in ("align", "instruct", "validation"))
    return ["recipe=llava_1_5", "mini=true", "data=llava_json", f"data.images={folder}", *splits, *FIT]


def vlmtrain(*line: str):
    return run(sys.executable, "-m", "vlmtrain.cli", *line)


def asked(folder, *numbers: int) -> Conversation:
    turns = (Turn("user", "<image>\n" * len(numbers) + "What color?"),)
    return Conversation("asked", turns, tuple(ImageOnDisk(folder / f"{number}.png") for number in numbers))


@pytest.mark.parametrize(("connector", "counts"), [("mlp", PATCHES), ("avgpool", WINDOWS)])
def test_commands_agree_on_the_number_of_tokens(connector, counts, folder):
    _, processor = build_model("tiny", connector, "tiny", image_fit="native", image_pixels=list(LIMITS))
    planned = [processor.plan(asked(folder, number)).placements[0].tokens for number in range(4)]
    assert planned == counts
    for (width, height), count in zip(SIZES, counts):
        size = ["--image-size", str(height), str(width), "--patch-size", "12", "--connector", connector]
        done = vlmtrain("tokens", *size, "--image-pixels", *map(str, LIMITS), "--json")
        assert json.loads(done.stdout)[0]["tokens"] == count
    line = [*data(folder), f"connector={connector}", "stage=instruct"]
    checked = json.loads(vlmtrain("check", *line, "--json").stdout)
    (report,) = checked["instruct"]["sources"].values()
    assert report["image_tokens"] == sum(counts)


def test_saved_and_exported_models_give_the_same_answers(folder, tmp_path):
    choice = {"qwen3_vl_merger": {"levels": 2}}
    model, processor = build_model("tiny", choice, "tiny", image_fit="native", image_pixels=list(LIMITS))
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    again, reader = VLMWrapper.from_pretrained(tmp_path / "model"), Processor.from_pretrained(tmp_path / "model")
    talk = asked(folder, 3, 0)
    batch, same = (each.collate([each.prompt(talk)]) for each in (processor, reader))
    assert batch.visual.items == same.visual.items and batch.visual.placements == same.visual.placements
    assert again(same).equal(model(batch))
    answer = generate(again, reader, same, max_new_tokens=6)

    done = export(tmp_path / "model", tmp_path / "out")
    assert done.model_class == "VLMTrainForConditionalGeneration" and done.largest_relative_difference < 1e-6
    assert any("images of one size" in remark or "qwen3_vl_merger" in remark for remark in done.remarks)
    theirs = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    prepare = AutoProcessor.from_pretrained(tmp_path / "out")
    content = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "What color?"}]
    text = prepare.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = prepare(images=[Image.open(folder / f"{number}.png") for number in (3, 0)], text=text)
    logits = theirs(**inputs).logits
    torch.testing.assert_close(logits[..., : model.llm.config.vocab_size], model(batch), rtol=0, atol=1e-5)
    new = theirs.generate(**inputs, max_new_tokens=6)[0, inputs["input_ids"].shape[1] :]
    kept = len(answer[0])
    assert new[:kept].tolist() == answer[0].tolist()


def test_a_tower_of_qwen_with_rows_of_positions(folder, tmp_path):
    """A complete checkpoint as the encoder, the published kind of merger, and M-RoPE in a plain language model."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2}
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]}
    text = {**sizes, "num_hidden_layers": 1, "num_key_value_heads": 1, "vocab_size": 50, "rope_parameters": rope}
    vision = {**sizes, "num_heads": 2, "depth": 2, "out_hidden_size": 128, "patch_size": 6, "window_size": 24}
    vision["fullatt_block_indexes"] = [1]
    torch.manual_seed(0)
    published = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision))
    published.save_pretrained(tmp_path / "qwen")
    look = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (tmp_path / "qwen" / "preprocessor_config.json").write_text(json.dumps(look))
    parts = (
        {"hf": {"path": str(tmp_path / "qwen"), "layer": -1}},
        "qwen2_5_vl_merger",
        {"tiny": {"positions": "mrope"}},
    )
    model, processor = build_model(*parts, image_fit="native", image_pixels=list(LIMITS))
    batch = processor.collate([processor.prompt(asked(folder, *numbers)) for numbers in ((0, 3), (1,), ())])
    assert [item.grids[0] for item in batch.visual.items] == [(8, 12), (4, 22), (12, 8)]
    assert batch.positions.shape == (3, *batch.input_ids.shape)
    # the first image has 4 x 6 merged tokens
    first = batch.visual.index[0] == 0
    assert (batch.positions[1, 0, first] - batch.positions[0, 0, first]).max() == 3
    assert (batch.positions[2, 0, first] - batch.positions[0, 0, first]).max() == 5
    rows = torch.tensor([[8, 12], [4, 22], [12, 8]])
    merged = published.model.visual(  # each image is two equal frames
        torch.cat([_in_published_order(image) for image in batch.visual.normalized().pixels[0]]),
        grid_thw=torch.cat([torch.ones(3, 1, dtype=torch.long), rows], 1),
    )
    features = model.encode(batch.visual)
    model.connector.load_published(published.model.visual.merger.state_dict())
    tokens = model.connect(features, batch.visual).tokens
    torch.testing.assert_close(tokens, merged.pooler_output, rtol=0, atol=1e-5)
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    again, reader = VLMWrapper.from_pretrained(tmp_path / "model"), Processor.from_pretrained(tmp_path / "model")
    same = reader.collate([reader.prompt(asked(folder, *numbers)) for numbers in ((0, 3), (1,), ())])
    assert again(same).equal(model(batch))
    done = export(tmp_path / "model", tmp_path / "out")
    assert "requires the language model's model_type=qwen2, got llama" in done.remarks[0]
    check_own_class(tmp_path / "out", folder, model, processor)


def test_parts_of_qwen_become_its_class(folder, tmp_path):
    """A tower, a merger and an ordinary Qwen2 with a tokenizer and a template that know nothing of images."""
    native_models.build_native(tmp_path / "qwen", "qwen2_5_vl")
    words = ["[start]", "[end]"]
    config = {"model_type": "qwen2", "hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
    llm = {"tiny": {"positions": "mrope", "new_tokens": words, "image_frame": words, "config": config}}
    vision = {"hf": {"path": str(tmp_path / "qwen"), "layer": -1}}
    model, processor = build_model(
        vision, "qwen2_5_vl_merger", llm, image_fit="native", image_pixels=list(LIMITS), template="vicuna_v1"
    )
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    done = export(tmp_path / "model", tmp_path / "out")
    assert done.model_class == "Qwen2_5_VLForConditionalGeneration" and done.largest_relative_difference <= 1e-5
    again = AutoProcessor.from_pretrained(tmp_path / "out")
    assert again.image_token == "<|image_pad|>"
    with pytest.raises(
        ValueError, match=r"llm\.image_frame: Qwen2_5_VLForConditionalGeneration requires a token before"
    ):
        export(_without_frame(tmp_path / "model", tmp_path / "frameless"), tmp_path / "refused", "native")


def _without_frame(folder: Path, copy: Path) -> Path:
    VLMWrapper.from_pretrained(folder).save_pretrained(copy)
    processor = Processor.from_pretrained(folder)
    processor.geometry = replace(processor.geometry, frame=("", ""))
    processor.save_pretrained(copy)
    return copy


@pytest.mark.parametrize("positions", ["interleaved_mrope", "xdrope"])
def test_exports_with_other_rows_of_positions(positions, folder, tmp_path):
    words = ["[start]", "[end]"]
    llm = {"tiny": {"positions": positions, "new_tokens": words, "image_frame": words}}
    model, processor = build_model("tiny", "hunyuan_merger", llm, image_fit="native", image_pixels=list(LIMITS))
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    export(tmp_path / "model", tmp_path / "out")
    check_own_class(tmp_path / "out", folder, model, processor)


def test_llavas_classes_do_not_take_rows_of_positions(tmp_path):
    model, processor = build_model("tiny", "mlp", {"tiny": {"positions": "mrope"}})
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    done = export(tmp_path / "model", tmp_path / "out")
    assert done.model_class == "VLMTrainForConditionalGeneration" and "llm.positions=mrope" in done.remarks[0]


def check_own_class(out: Path, folder: Path, model: VLMWrapper, processor: Processor) -> None:
    """An export in the project's own class: logits and answers of a batch that is padded on the left."""
    theirs, prepare = AutoModelForImageTextToText.from_pretrained(out), AutoProcessor.from_pretrained(out)
    rows = ((0, 3), (1,), ())
    batch = processor.collate([processor.prompt(asked(folder, *numbers)) for numbers in rows])
    texts = []
    for numbers in rows:
        content = [{"type": "image"} for _ in numbers] + [{"type": "text", "text": "What color?"}]
        texts.append(prepare.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True))
    images = [Image.open(folder / f"{number}.png") for numbers in rows for number in numbers]
    inputs = prepare(images=images, text=texts)
    assert inputs["attention_mask"][-1, 0] == 0
    expected, logits = model(batch), theirs(**inputs).logits
    for row, mask, found, length in zip(expected, inputs["attention_mask"].bool(), logits, batch.lengths):
        torch.testing.assert_close(found[mask][:, : row.shape[1]], row[:length], rtol=0, atol=2e-5)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    new = theirs.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]
    assert new.tolist() == [each.tolist() for each in model.generate(batch, **options)]


def _in_published_order(image: torch.Tensor) -> torch.Tensor:
    """Rows of pixels as Qwen's processors make them: 2 x 2 squares of patches of two frames."""
    height, width = image.shape[1] // 6, image.shape[2] // 6
    cut = image.reshape(3, height // 2, 2, 6, width // 2, 2, 6).permute(1, 4, 2, 5, 0, 3, 6)
    return cut.reshape(height * width, 3, 1, 6, 6).expand(-1, -1, 2, -1, -1).flatten(1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["connector=c_abstractor"], "stages.instruct.image_fit=native: the connector does not support every grid"),
        (
            ["stages.instruct.image_pixels=null"],
            "image_pixels=[MIN, MAX] must be set with image_fit=native, and only then",
        ),
        (["stages.instruct.image_fit=pad"], "must be set with image_fit=native, and only then"),
        (["stages.instruct.image_pixels=[9,4]"], "expected null, or [MIN, MAX] pixels up to 100,000,000"),
        (["stages.instruct.image_pixels=[576,90000]"], "leaves no room for text: an image takes up to 625 tokens"),
    ],
)
def test_what_cannot_work_is_refused_before_training(change, message, folder, tmp_path):
    done = train(*data(folder), *change, f"run_dir={tmp_path / 'run'}", check=False)
    assert done.returncode == 2 and message in done.stderr
