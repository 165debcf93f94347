"""The processor: samples and batches, and that saving preserves them."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from vlmtrain.data.geometry import Geometry
from vlmtrain.data.processor import Processor
from vlmtrain.data.records import BadSample, Conversation, Turn
from vlmtrain.data.rendered import IGNORE

from . import chat_formats

GEOMETRY = Geometry((8, 12), "pad", (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), tokens=6)


class Noise:
    def __init__(self, seed: int):
        self.seed = seed

    def load(self) -> Image.Image:
        return Image.fromarray(np.random.default_rng(self.seed).integers(0, 256, (20, 16, 3), np.uint8))


def conversation(pictures: int, question: str = "What is this?", answer: str = "red", id: str = "x") -> Conversation:
    turns = (Turn("user", "<image>" * pictures + question), Turn("assistant", answer))
    return Conversation(id, turns, tuple(Noise(i) for i in range(pictures)))


@pytest.fixture
def processor(tokenizer) -> Processor:
    return Processor(tokenizer, GEOMETRY, "chat", max_length=300)


def test_rows_are_padded_on_the_right(processor):
    samples = [processor(c) for c in (conversation(0, "a"), conversation(2, "Describe the picture."), conversation(1))]
    batch = processor.collate(samples)
    lengths = [len(sample.tokens) for sample in samples]
    assert batch.lengths.tolist() == lengths
    for tensor in (batch.input_ids, batch.targets, batch.weights, batch.visual.mask):
        assert tensor.shape == (3, max(lengths))
    for row, (sample, length) in enumerate(zip(samples, lengths)):
        assert batch.input_ids[row, :length].equal(sample.tokens.input_ids)
        assert batch.targets[row, :length].equal(sample.tokens.targets)
        assert batch.visual.mask[row, :length].equal(sample.tokens.index >= 0)
        assert (batch.targets[row, length:] == IGNORE).all()
        assert not batch.weights[row, length:].any() and not batch.visual.mask[row, length:].any()
        assert batch.weights[row].gt(0).equal(batch.targets[row] != IGNORE)


def test_there_are_as_many_image_positions_as_visual_tokens(processor):
    samples = [processor(conversation(pictures)) for pictures in (2, 0, 1, 3)]
    batch = processor.collate(samples)
    assert batch.visual.pixels[0].shape == (6, 3, 8, 12)
    assert batch.visual.mask.sum(1).tolist() == [2 * 6, 0, 6, 3 * 6]
    shown = [image for row in (0, 2, 3) for image in samples[row].pixels[0]]
    assert batch.visual.pixels[0].equal(torch.stack(shown))


def test_images_are_fitted_and_normalized(processor):
    (image,) = processor.collate([processor(conversation(1))]).to(torch.device("cpu")).visual.pixels[0]
    # a 20 x 16 image (H x W) fitted to 8 x 12: on a canvas of 20 x 30, seven columns from its left edge
    inside = Image.new("RGB", (30, 20), tuple(int(255 * channel) for channel in GEOMETRY.mean))
    inside.paste(Noise(0).load(), (7, 0))
    inside = inside.resize((12, 8), Image.Resampling.BICUBIC)
    expected = (torch.from_numpy(np.array(inside)).double() / 255 - torch.tensor(GEOMETRY.mean)) / torch.tensor(
        GEOMETRY.std
    )
    torch.testing.assert_close(image.permute(1, 2, 0).double(), expected, rtol=0, atol=1e-5)


def test_a_batch_without_images_has_a_placeholder(processor):
    batch = processor.collate([processor(conversation(0))])
    assert not batch.visual.items and not batch.visual.mask.any() and batch.visual.pixels[0].shape == (1, 3, 8, 12)


def test_a_batch_is_filled_with_rows_without_weight(processor):
    batch = processor.collate([processor(conversation(1))], rows=3)
    assert batch.input_ids.shape[0] == 3 and len(batch.visual.pixels[0]) == 1
    assert not batch.weights[1:].any() and not batch.visual.mask[1:].any() and (batch.targets[1:] == IGNORE).all()
    empty = processor.collate([], rows=2)
    assert empty.input_ids.shape == (2, 1) and not empty.visual.items and not empty.weights.any()


class Levels:
    """An image of the right size with all levels in each channel."""

    def load(self) -> Image.Image:
        values = np.random.default_rng(0).permuted(np.arange(3 * 256).reshape(3, -1) % 256, axis=1)
        return Image.fromarray(values.reshape(3, 16, 16).transpose(1, 2, 0).astype(np.uint8))


GPU = pytest.param("cuda", marks=pytest.mark.gpu)


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_images_are_bytes_that_are_normalized_when_they_are_moved(tokenizer, dtype, device):
    """To the bits of the definition in numpy, in float32 and in this order, rounded once at the end."""
    processor = Processor(tokenizer, replace(GEOMETRY, size=(16, 16)), "chat", max_length=300)
    asked = Conversation("x", conversation(1).turns, (Levels(),))
    batch = processor.collate([processor(asked)])
    assert batch.visual.pixels[0].dtype == torch.uint8
    levels = np.asarray(Levels().load()).transpose(2, 0, 1).astype(np.float32)
    mean, std = (np.array(each, np.float32)[:, None, None] for each in (GEOMETRY.mean, GEOMETRY.std))
    expected = torch.from_numpy((levels / np.float32(255) - mean) / std)
    assert batch.to(torch.device(device), dtype).visual.pixels[0][0].cpu().equal(expected.to(dtype))
    assert batch.visual.normalized().pixels[0][0].equal(expected)


def test_normalized_images_are_mixed_with_others(processor):
    """Such as blanked ones: they are not normalized again."""
    samples = [processor(conversation(1)), processor(conversation(1))]
    blank = samples[1]._replace(pixels=((torch.zeros(3, 8, 12),),))
    both = processor.collate([samples[0], blank]).to(torch.device("cpu")).visual.pixels[0]
    alone = processor.collate(samples[:1]).to(torch.device("cpu")).visual.pixels[0]
    assert both[0].equal(alone[0]) and not both[1].any()
    assert not processor.collate([processor(conversation(0))]).to(torch.device("cpu")).visual.pixels[0].any()


def test_only_images_change_their_dtype(processor):
    batch = processor.collate([processor(conversation(1))]).to(torch.device("cpu"), torch.bfloat16)
    assert batch.visual.pixels[0].dtype == torch.bfloat16
    assert batch.weights.dtype == torch.float32 and batch.input_ids.dtype == batch.targets.dtype == torch.int64


def test_without_a_geometry_images_are_bad_samples(tokenizer):
    processor = Processor(tokenizer, None, "chat", max_length=300)
    with pytest.raises(BadSample, match="x: the sample has an image, but the model has no vision encoder"):
        processor(conversation(1))
    batch = processor.collate([processor(conversation(0))])
    assert batch.visual is None


def test_the_prompt_is_the_sample_up_to_its_answer(processor):
    whole = conversation(2)
    sample, prompt = processor(whole), processor.prompt(Conversation("x", whole.turns[:1], whole.images))
    start, _ = sample.tokens.answers[0]
    assert prompt.tokens.input_ids.equal(sample.tokens.input_ids[:start])
    torch.testing.assert_close(prompt.pixels, sample.pixels, rtol=0, atol=0)


def test_an_unknown_fit_is_an_error():
    with pytest.raises(ValueError, match="image_fit=stretch: expected one of squash, pad, crop"):
        Geometry((8, 8), "stretch", (0.5,) * 3, (0.5,) * 3, 4)


@pytest.mark.parametrize("kind", ["tiny", "llama_bpe", "unigram_always", "byte_bpe", "wordpiece"])
@pytest.mark.parametrize("template, fallback", [("plain", None), ("chat", "vicuna_v1"), ("vicuna_v1", None)])
@pytest.mark.parametrize("geometry", [GEOMETRY, None])
def test_saved_and_loaded_it_renders_the_same(tmp_path, kind, template, fallback, geometry):
    processor = Processor(copy.deepcopy(chat_formats.tokenizers()[kind]), geometry, template, 300, fallback)
    processor.save_pretrained(tmp_path)
    again = Processor.from_pretrained(tmp_path)
    assert again.geometry == geometry and again.renderer.stop_ids == processor.renderer.stop_ids
    assert again.filler == processor.filler
    subject = conversation(2 if geometry else 0, "What </s> is <|end|> this?", "a red<s> circle.")
    one, other = processor(subject), again(subject)
    torch.testing.assert_close(one.pixels, other.pixels, rtol=0, atol=0)
    for field in ("input_ids", "targets", "weights", "index"):
        assert getattr(one.tokens, field).equal(getattr(other.tokens, field)), field
    assert one.tokens.answers == other.tokens.answers
    with pytest.raises(BadSample, match="max_length=300"):
        again(conversation(0, answer="What " * 400))


def test_a_folder_without_a_processor_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"is not a model folder: processor/processor\.json is missing"):
        Processor.from_pretrained(tmp_path)


def test_media_are_images_under_another_name():
    one, other = conversation(1), conversation(2)
    assert one.media == one.images and Conversation("x", one.turns, images=one.images).media == one.media
    assert replace(one, images=other.images).media == other.media and replace(one, images=()).media == ()
    assert replace(one, media=other.media).images == other.images
