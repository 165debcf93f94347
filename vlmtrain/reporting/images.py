"""Images within a page."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable

from PIL import Image

COLUMNS = 4
"""Frames of a video in a row."""


def image_uri(image: Image.Image, side: int = 160) -> str:
    """An image as a data URI, its longer side scaled to `side` pixels."""
    return _uri(_scaled(image, side))


def strip_uri(frames: Iterable[Image.Image], side: int = 120) -> str:
    """The frames of a video in rows, in one image as a data URI. side: longer side of a frame in pixels."""
    small = [_scaled(frame, side) for frame in frames]
    width, height = small[0].size
    columns = min(COLUMNS, len(small))
    strip = Image.new("RGB", (columns * width, -(-len(small) // columns) * height), "white")
    for number, frame in enumerate(small):
        strip.paste(frame, (number % columns * width, number // columns * height))
    return _uri(strip)


def _scaled(image: Image.Image, side: int) -> Image.Image:
    scale = side / max(image.size)
    size = tuple(max(1, round(edge * scale)) for edge in image.size)
    return image.resize(size, Image.Resampling.LANCZOS)


def _uri(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
