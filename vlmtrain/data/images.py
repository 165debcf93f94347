"""Images: found, opened safely, and fitted to the encoder's size."""

from __future__ import annotations

import base64
import math
import re
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError
from torch import Tensor
from torch.nn import functional as F

from ..errors import first_line, shown
from ..visual import WHOLE, Item, Size
from .encoded import (
    BadSize,
    Encoded,
    InFile,
    InMemory,
    MediaFolder,
    OnDisk,
    check_size,
)
from .records import BadSample
from .regions import Frame

FITS = ("squash", "pad", "crop", "tiles", "native")
BILINEAR, ANTIALIASED = "squash_bilinear", "squash_antialiased"
FRAME_FITS = ("squash", "pad", "crop", BILINEAR)
CANVASES = (*FRAME_FITS, ANTIALIASED, "contain")
"""How an image is brought onto the canvas of an item, see `fit_image`."""
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
"""Formats that Pillow decodes within this process; for some others it starts external programs."""
BAND_PIXELS = 4_000_000
BLACK = (0, 0, 0)
PADDING = (1, 1, 1)
"""The color right of and below an image that is padded to whole patches (transformers' processor of Fuyu)."""

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""Transpositions that undo an EXIF orientation."""

T = TypeVar("T")

ImageFile.LOAD_TRUNCATED_IMAGES = False


class EncodedImage(Encoded):
    """An encoded image that is decoded on demand; a subclass provides its bytes."""

    noun = "image"

    def load(self) -> Image.Image:
        """Decode the image as RGB. Raises BadSample if it is missing, truncated, too large or not an image."""
        return self._opened(to_rgb)

    def size(self) -> tuple[int, int]:
        """Size ``(H, W)`` of the loaded image, without decoding it if the format allows. Raises BadSample."""
        return self._opened(_upright_size)

    def _opened(self, read: Callable[[Image.Image], T]) -> T:
        with self.naming_failures():
            file = self.open()
        with file, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                with Image.open(file, formats=FORMATS) as image:
                    check_size(image.size)
                    return read(image)
            except UnidentifiedImageError:
                file.seek(0)
                head = file.read(16)
                found = f"it starts with {head!r}, which is not one of {', '.join(FORMATS)}" if head else "it is empty"
                raise BadSample(f"image {self.label} is not an image: {found}") from None
            except BadSize as error:
                raise BadSample(f"image {self.label} cannot be used: {error}") from None
            except Exception as error:  # decoders can raise any exception for malformed bytes
                raise BadSample(f"image {self.label} cannot be decoded: {first_line(error)}") from None

    def check(self) -> None:
        """Check the first and last bytes, and decode the image only if they are inconclusive. Raises BadSample."""
        with self.naming_failures():
            head, tail = self.ends()
        end = {b"\xff\xd8": b"\xff\xd9", b"\x89P": b"IEND"}.get(head[:2])
        if end is None or end not in tail:
            self.load()  # the format has no end marker, or it is missing or not at the end (cameras append data)


@dataclass(frozen=True)
class ImageOnDisk(OnDisk, EncodedImage):
    """An image file. relative: its path within the folder of images, if it has one."""


@dataclass(frozen=True)
class ImageInMemory(InMemory, EncodedImage):
    """The encoded bytes of an image."""


@dataclass(frozen=True)
class ImageInFile(InFile, EncodedImage):
    """An image within a larger file: `length` bytes from `offset`."""


class ImageFolder(MediaFolder):
    """Images as records name them: encoded, or by path relative to a folder."""

    noun, key = "image", "data.images"

    def read(self, value: object, label: str, name: str) -> EncodedImage:
        """The image of record `name`: a path, bytes, base64, a data URL, or an object with one of these.

        label: of an encoded image. Raises BadSample if `value` is none of these, or if a path is not allowed.
        """
        if isinstance(value, dict):
            given = [value[key] for key in ("bytes", "data", "base64", "path", "url") if value.get(key) is not None]
            value = given[0] if given else value
        if isinstance(value, bytes):
            return ImageInMemory(value, label)
        if not isinstance(value, str) or not value:
            raise BadSample(f"{name}: image {label} must be bytes, base64 or a path, got {shown(value)}")
        if _is_encoded(value):
            return ImageInMemory(_decoded(value, label, name), label)
        return ImageOnDisk(self.whole(value, name), value.removeprefix("file://"))


_BASE64_STARTS = ("/9j/", "iVBORw0KGgo", "R0lGOD", "UklGR")  # of JPEG, PNG, GIF and WebP files
_EXTENSION = re.compile(r"[^\n]{1,4000}\.(jpe?g|png|webp|gif|bmp|tiff?|jp2|avif)", re.IGNORECASE)


def _is_encoded(text: str) -> bool:
    """Whether text is a data URL, or an image in base64 rather than a path."""
    return text.startswith("data:") or (len(text) > 80 and text.startswith(_BASE64_STARTS))


def _decoded(text: str, label: str, name: str) -> bytes:
    header, comma, data = text.partition(",") if text.startswith("data:") else ("", "", text)
    if header and not (comma and header.endswith(";base64")):
        raise BadSample(f"{name}: image {label} is a data URL without base64: {shown(header)}")
    try:
        return base64.b64decode(data, validate=True)
    except ValueError as error:
        raise BadSample(f"{name}: image {label} is not valid base64: {first_line(error)}") from None


def is_image_value(value: object) -> bool:
    """Whether a value of a record is an image or the path of one, or a list of them."""
    if isinstance(value, list):
        return bool(value) and all(map(is_image_value, value))
    if isinstance(value, dict):
        return isinstance(value.get("bytes"), bytes) or (
            set(value) <= {"bytes", "path"} and is_image_value(value.get("path"))
        )
    return isinstance(value, bytes) or (
        isinstance(value, str) and (_is_encoded(value) or bool(_EXTENSION.fullmatch(value)))
    )


def _orientation(image: Image.Image) -> int | None:
    try:
        return image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # broken metadata can raise any exception although the image itself is intact
        return None


def _upright_size(image: Image.Image) -> tuple[int, int]:
    return image.size if _orientation(image) in (5, 6, 7, 8) else image.size[::-1]


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert to RGB: upright (EXIF), first frame, transparency on white.

    Raises ValueError for pixels whose value range is unknown.
    """
    image.load()
    orientation = _orientation(image)
    if orientation in _UPRIGHT:
        image = image.transpose(_UPRIGHT[orientation])
    if image.mode.startswith("I"):  # 16-bit gray: `convert` would clip, not scale
        pixels = np.asarray(image).astype(np.int64)
        if pixels.min() < 0 or pixels.max() > 0xFFFF:
            raise ValueError("gray values of more than 16 bits")
        return Image.fromarray((pixels >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("gray values in floating point")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        canvas = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(canvas, image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")  # which copies


class Steps(NamedTuple):
    """How an image is fitted: scaled to `inner`, put on a canvas with its upper left corner at `corner`, and the canvas
    scaled to the final size. What lies outside the canvas is cut off.

    Sizes are ``(W, H)`` in pixels, and corners ``(x, y)``.
    """

    inner: tuple[int, int]
    corner: tuple[int, int]
    canvas: tuple[int, int]


def fitting_steps(own: Size, size: Size, fit: str) -> Steps:
    """The steps by which `fit_image` fits an image of the size `own` ``(H, W)`` to `size` ``(H, W)``."""
    (down, across), (height, width) = own, size
    if fit in ("squash", BILINEAR, ANTIALIASED):
        return Steps((width, height), (0, 0), (width, height))
    if fit == "pad":
        canvas = max(across, round(down * width / height)), max(down, round(across * height / width))
        return Steps((across, down), ((canvas[0] - across) // 2, (canvas[1] - down) // 2), canvas)
    if fit == "crop":
        covers_width = width * down >= height * across
        inner = (width, width * down // across) if covers_width else (height * across // down, height)
        return Steps(inner, (-((inner[0] - width) // 2), -((inner[1] - height) // 2)), (width, height))
    assert fit == "contain", fit
    scale = min(width / across, height / down)
    inner = min(width, math.ceil(across * scale)), min(height, math.ceil(down * scale))
    return Steps(inner, ((width - inner[0]) // 2, (height - inner[1]) // 2), (width, height))


def frame_of(own: Size, size: Size, fit: str) -> Frame:
    """Where the pixels of an image of the size `own` ``(H, W)`` are after `fit_image`."""
    steps = fitting_steps(own, size, fit)
    seen = size[1], size[0]
    shrink = [side / whole for side, whole in zip(seen, steps.canvas)]
    scale = [inner / side * by for inner, side, by in zip(steps.inner, (own[1], own[0]), shrink)]
    offset = [corner * by for corner, by in zip(steps.corner, shrink)]
    return Frame((own[1], own[0]), seen, tuple(scale), tuple(offset))


def fit_image(image: Image.Image, size: Size, fit: str, mean: tuple[float, ...]) -> Image.Image:
    """Fit an image to `size` ``(H, W)``.

    squash: stretch. crop: scale to cover `size`, rounded to whole pixels, and crop the center (as in CLIP).
    pad: pad to the aspect ratio of `size` with the mean color, truncated to integer levels, then scale (LLaVA-1.5,
    published code). contain: scale to the largest size that fits, and center on black (LLaVA-NeXT, published code).
    squash_bilinear: stretch with bilinear interpolation and without antialiasing (Molmo2, published code);
    squash_antialiased: with it (Fuyu, published code). The others are bicubic, with antialiasing.
    """
    height, width = size
    steps = fitting_steps((image.height, image.width), size, fit)
    if fit == "contain":
        return _on_canvas(image.resize(steps.inner, Image.Resampling.BICUBIC), steps.canvas, steps.corner, BLACK)
    if image.size == (width, height):
        return image
    if fit == BILINEAR:
        levels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float()
        levels = F.interpolate(levels, size, mode="bilinear")[0].round().clamp(0, 255).byte()
        return Image.fromarray(levels.permute(1, 2, 0).numpy())
    if fit == "pad":
        return _padded_and_scaled(image, size, steps, tuple(int(255 * channel) for channel in mean))
    if fit == ANTIALIASED:
        return image.resize(steps.inner, Image.Resampling.BILINEAR)
    left, top = -steps.corner[0], -steps.corner[1]
    whole = image.resize(steps.inner, Image.Resampling.BICUBIC)
    return whole if fit == "squash" else whole.crop((left, top, left + width, top + height))


def _padded_and_scaled(image: Image.Image, size: Size, steps: Steps, color: tuple[int, ...]) -> Image.Image:
    """Put an image on the canvas of `steps`, and scale it to `size` ``(H, W)``.

    Pillow scales rows before columns, so bands of rows can be processed one at a time. The canvas of an elongated
    image, which is up to `MAX_ASPECT` times as large as the image, is never completely in memory.
    """
    (height, width), (left, top), whole = size, steps.corner, steps.canvas
    narrow = Image.new("RGB", (width, whole[1]), color)
    rows = max(1, BAND_PIXELS // whole[0])
    for first in range(0, image.height, rows):
        last = min(image.height, first + rows)
        band = image if rows >= image.height else image.crop((0, first, image.width, last))
        if whole[0] > image.width:
            band = _on_canvas(band, (whole[0], last - first), (left, 0), color)
        narrow.paste(band.resize((width, last - first), Image.Resampling.BICUBIC), (0, top + first))
    return narrow.resize((width, height), Image.Resampling.BICUBIC)


def _on_canvas(
    image: Image.Image, size: tuple[int, int], corner: tuple[int, int], color: tuple[int, ...]
) -> Image.Image:
    """Place an image with its upper left corner at `corner` on a canvas of one color, `size` ``(W, H)``."""
    canvas = Image.new("RGB", size, color)
    canvas.paste(image, corner)
    return canvas


def show_items(image: Image.Image, items: Iterable[Item], mean: tuple[float, ...], encoder: int = 0) -> list[Tensor]:
    """What an encoder is shown of an image: tensors ``(3, H, W)`` uint8, one for each of its items."""
    canvases: dict[tuple[str, tuple[int, int]], Image.Image] = {}
    shown = []
    for item in items:
        fit, size = key = item.fits[encoder], item.canvas(encoder)
        if key not in canvases:
            canvases[key] = fit_image(image, size, fit, mean)
        canvas, (height, width) = canvases[key], item.pixels[encoder]
        if max(item.box) > 1:
            canvas = _on_canvas(canvas, (width, height), (0, 0), PADDING)
        elif item.box != WHOLE:
            left, top = round(item.box[0] * canvas.width), round(item.box[1] * canvas.height)
            canvas = canvas.crop((left, top, left + width, top + height))
        shown.append(torch.from_numpy(np.asarray(canvas).transpose(2, 0, 1).copy()))
    return shown
