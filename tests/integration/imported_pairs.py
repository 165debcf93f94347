"""A model folder beside the published model that it was imported from, and images of noise to ask about."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from torch import nn
from transformers import ProcessorMixin

from vlmtrain.data import Processor
from vlmtrain.interop.importing import Import
from vlmtrain.model import VLMWrapper


class Pair(NamedTuple):
    """A model folder and its processor beside the published model that it was imported from."""

    home: Path
    done: Import
    model: VLMWrapper
    processor: Processor
    theirs: nn.Module
    prepare: ProcessorMixin


def draw_noise(folder: Path, sizes: Mapping[str, tuple[int, int]]) -> np.random.Generator:
    """Write images of noise of `sizes` (width, height) by name; returns the generator."""
    generator = np.random.default_rng(0)
    for name, (width, height) in sizes.items():
        Image.fromarray(generator.integers(0, 255, (height, width, 3), dtype=np.uint8)).save(folder / f"{name}.png")
    return generator
