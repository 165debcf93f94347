"""A model folder beside the published model that it was imported from, and images of noise to ask about."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import nn
from transformers import ProcessorMixin

from vlmtrain.batch import Batch
from vlmtrain.data import Processor
from vlmtrain.data.processor import Sample
from vlmtrain.interop.fitting import relative_difference
from vlmtrain.interop.importing import Import
from vlmtrain.model import VLMWrapper
from vlmtrain.model.attention import attend_in_segments


class Pair(NamedTuple):
    """A model folder and its processor beside the published model that it was imported from."""

    home: Path
    done: Import
    model: VLMWrapper
    processor: Processor
    theirs: nn.Module
    prepare: ProcessorMixin

    def trained(self, batch: Batch, folder: Path) -> VLMWrapper:
        """The model after a training step on all tokens of a batch, and its folder with the processor."""
        model = VLMWrapper.from_pretrained(self.home / "model")
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        nn.functional.cross_entropy(model(batch)[:, :-1].transpose(1, 2), batch.input_ids[:, 1:]).backward()
        optimizer.step()
        model.save_pretrained(folder)
        self.processor.save_pretrained(folder)
        return model

    def check_packed(self, samples: list[Sample]) -> None:
        """Samples in one row have the logits that they have in rows of their own."""
        padded = self.processor.collate(samples)
        expected = [row[: int(length)] for row, length in zip(self.model(padded), padded.lengths)]
        model = VLMWrapper.from_pretrained(self.home / "model").eval()
        attend_in_segments(model.llm)
        assert relative_difference(model(self.processor.pack(samples))[0], torch.cat(expected)) <= 1e-5


def draw_noise(folder: Path, sizes: Mapping[str, tuple[int, int]]) -> np.random.Generator:
    """Write images of noise of `sizes` (width, height) by name; returns the generator."""
    generator = np.random.default_rng(0)
    for name, (width, height) in sizes.items():
        Image.fromarray(generator.integers(0, 255, (height, width, 3), dtype=np.uint8)).save(folder / f"{name}.png")
    return generator
