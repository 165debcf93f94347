"""Models on InternVL's and nanoVLM's tiles: the same results packed, saved and exported, and refused settings."""

from __future__ import annotations

from io import BytesIO

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from vlmtrain import build_model
from vlmtrain.data import Conversation, Processor, Turn
from vlmtrain.data.images import ImageInMemory
from vlmtrain.interop.export import export
from vlmtrain.model import VLMWrapper
from vlmtrain.model.attention import attend_in_segments
from vlmtrain.model.joining import JoiningConnector
from vlmtrain.settings import compose
from vlmtrain.training.assembly import build_skeleton, build_tokenizer
from vlmtrain.training.init_from import with_init_from

GRIDS = [[1, 1], [1, 2], [2, 1], [2, 2]]
WORDS = ["<|global_image|>", *(f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)), "<img>", "</img>"]
SIZES = [(120, 50), (48, 48), (60, 200)]  # (width, height)


def built(style: str, frame: list[str] | None = None):
    tokens = {"new_tokens": WORDS, "image_frame": frame}
    tiles = {"image_fit": "tiles", "image_tiles": GRIDS, "image_tile_style": style}
    return build_model("tiny", {"pixel_shuffle": {"factor": 2}}, {"tiny": tokens}, **tiles)


def image(size: tuple[int, int]) -> Image.Image:
    return Image.effect_noise(size, 90).convert("RGB")


def talk(images: list[Image.Image], *answer: str) -> Conversation:
    encoded = []
    for one in images:
        one.save(file := BytesIO(), "PNG")
        encoded.append(ImageInMemory(file.getvalue(), "noise"))
    turns = (Turn("user", "<image>\n" * len(images) + "What color?"), *(Turn("assistant", text) for text in answer))
    return Conversation("talk", turns, tuple(encoded))


@pytest.mark.parametrize("style", ["internvl", "nanovlm"])
def test_packed_rows_equal_padded_ones(style):
    model, processor = built(style, WORDS[-2:])
    samples = [processor(talk([image(SIZES[n]) for n in each], "red")) for each in ((0, 1), (), (2,))]
    padded, packed = processor.collate(samples), processor.pack(samples)
    with torch.no_grad():
        rows = model(padded)
        attend_in_segments(model.llm)
        row = model(packed)[0]
    apart = row.split([len(sample.tokens) for sample in samples])
    for one, same in zip(rows, apart):
        torch.testing.assert_close(one[: len(same)], same, rtol=0, atol=1e-4)


@pytest.mark.parametrize("style", ["internvl", "nanovlm"])
def test_an_export_gives_the_same_ids_and_logits(style, tmp_path):
    model, processor = built(style, WORDS[-2:])
    assert not hasattr(model.connector, "newline")
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    again = Processor.from_pretrained(tmp_path / "model")
    images = [[image(size) for size in SIZES], [image(SIZES[2])]]
    batch, same = (each.collate([each.prompt(talk(group)) for group in images]) for each in (processor, again))
    assert batch.visual.placements == same.visual.placements and batch.input_ids.equal(same.input_ids)
    logits = VLMWrapper.from_pretrained(tmp_path / "model")(same)
    assert logits.equal(model(batch))

    done = export(tmp_path / "model", tmp_path / "out")
    assert done.model_class == "VLMTrainForConditionalGeneration" and done.largest_relative_difference < 1e-6
    theirs = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    prepare = AutoProcessor.from_pretrained(tmp_path / "out")
    texts = [
        prepare.apply_chat_template(
            [{"role": "user", "content": [*[{"type": "image"}] * len(group), {"type": "text", "text": "What color?"}]}],
            add_generation_prompt=True,
        )
        for group in images
    ]
    inputs = prepare(images=images, text=texts)
    found = theirs(**inputs).logits[..., : logits.shape[-1]]
    image_id = theirs.config.image_token_id
    for row, length in enumerate(batch.lengths):
        ids = batch.input_ids[row, :length].masked_fill(batch.visual.index[row, :length] >= 0, image_id)
        assert inputs["input_ids"][row, -length:].equal(ids)
        torch.testing.assert_close(found[row, -length:], logits[row, :length], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_fit": "pad"}, r"image_tile_style=internvl needs stages\.\w+\.image_fit=tiles, got pad"),
        ({"image_tiles_most": 4}, r"image_tile_style=internvl does not support stages\.\w+\.image_tiles_most=4"),
        ({"image_tile_style": "mosaic"}, r"image_tile_style=mosaic: expected .*llava_next.*internvl.*nanovlm"),
        (
            {"image_tile_style": "nanovlm"},
            r"image_tile_style=nanovlm: '<\|global_image\|>' is not a token .*new_tokens",
        ),
    ],
)
def test_settings_that_would_have_no_effect_are_refused(changes, message):
    tiles = {"image_fit": "tiles", "image_tiles": GRIDS, "image_tile_style": "internvl", **changes}
    with pytest.raises(ValueError, match=message):
        build_model("tiny", "mlp", "tiny", **tiles)


def test_transformers_own_classes_are_refused(tmp_path):
    model, processor = build_model("tiny", "mlp", "tiny", image_fit="tiles", image_tile_style="internvl")
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=r"image_tile_style=internvl: .* a newline after each row of tiles"):
        export(tmp_path / "model", tmp_path / "out", "llava")


def test_only_newlines_need_weights():
    line = ["recipe=llava_next", "mini=true"]
    assert compose(line).newline
    assert not compose([*line, "stages.instruct.image_tile_style=internvl"]).newline


def test_plans_use_the_connector_of_init_from(tmp_path):
    """Also with tiles, where it gets a newline if it has none."""
    model, processor = built("nanovlm", WORDS[-2:])
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    line = ["recipe=llava_next", "mini=true", "stage=instruct", f"init_from={tmp_path / 'model'}"]
    run = with_init_from(compose(line))
    skeleton = build_skeleton(run, run.stages["instruct"], build_tokenizer(run))["connector"]
    assert isinstance(skeleton, JoiningConnector) and skeleton.num_tokens(4, 4) == model.connector.num_tokens(4, 4) == 4
    with pytest.raises(ValueError, match=r"connector\.factor=1, but the connector in init_from=.* has 2"):
        with_init_from(compose([*line, "connector=pixel_shuffle", "connector.factor=1"]))
    with pytest.raises(ValueError, match="is not a model folder"):
        with_init_from(compose([*line[:-1], f"init_from={tmp_path / 'nowhere'}"]))
