"""Conversations about images in the middle of their text, and what a model computes for them."""

from __future__ import annotations

from dataclasses import replace
from io import BytesIO

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vlmtrain.data import Conversation, Processor, Turn
from vlmtrain.data.images import ImageInMemory
from vlmtrain.data.processor import Sample
from vlmtrain.model import VLMWrapper

IMAGE = "<image>"


def image(seed: int) -> ImageInMemory:
    file = BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (48, 48, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "png")
    return ImageInMemory(file.getvalue(), str(seed))


def talk(*images: int | None) -> Conversation:
    """A conversation of one exchange for each entry: a number of an image that its question shows, or None."""
    turns = []
    for number in images:
        turns += [Turn("user", f"{IMAGE if number is not None else ''} what color is this"), Turn("assistant", "red")]
    return Conversation("talk", tuple(turns), tuple(image(number) for number in images if number is not None))


TALKS = [talk(1, 2), talk(None), talk(None, 3, None), talk(4)]


@torch.no_grad()
def rows(model: VLMWrapper, processor: Processor, samples: list[Sample], packed: bool = False) -> list[Tensor]:
    """Logits of each sample."""
    lengths = [len(sample.tokens) for sample in samples]
    if packed:
        return list(model(processor.pack(samples))[0].split(lengths))
    return [row[:length] for row, length in zip(model(processor.collate(samples)), lengths)]


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def greedy(model: VLMWrapper, processor: Processor, sample: Sample, new: int) -> list[int]:
    """Greedy decoding without a cache: the complete text so far is read for each token."""
    tokens, out = sample.tokens, []
    for _ in range(new):
        with torch.no_grad():
            out.append(int(model(processor.collate([sample._replace(tokens=tokens)]))[0, -1].argmax()))
        ids, more = torch.cat([tokens.input_ids, torch.tensor(out[-1:])]), torch.tensor([-1])
        tokens = replace(
            tokens,
            input_ids=ids,
            index=torch.cat([tokens.index, more]),
            targets=torch.full_like(ids, -100),
            weights=torch.zeros(len(ids)),
        )
    return out


def asked(conversation: Conversation) -> Conversation:
    return replace(conversation, turns=conversation.turns[:-1])
