"""Images within a page."""

from __future__ import annotations

import base64
import io

from PIL import Image


def image_uri(image: Image.Image, side: int = 160) -> str:
    """An image as a data URI, its longer side scaled to `side` pixels."""
    scale = side / max(image.size)
    size = tuple(max(1, round(edge * scale)) for edge in image.size)
    buffer = io.BytesIO()
    image.resize(size, Image.Resampling.LANCZOS).save(buffer, "JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
