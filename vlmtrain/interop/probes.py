"""Images of noise, with which models are compared."""

from __future__ import annotations

from io import BytesIO

import torch
from PIL import Image

from ..data.images import ImageInMemory
from ..visual import Size


def noise(size: Size, seed: int = 0) -> ImageInMemory:
    """An image of noise of a size ``(H, W)``."""
    pixels = torch.randint(0, 256, (*size, 3), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    encoded = BytesIO()
    Image.fromarray(pixels.numpy()).save(encoded, "PNG")
    return ImageInMemory(encoded.getvalue(), "probe")
