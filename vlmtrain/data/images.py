"""Images: found, opened safely, and fitted to the encoder's size."""

from __future__ import annotations

import base64
import math
import os
import re
import stat
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import BinaryIO, TypeVar

import numpy as np
import torch
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError
from torch import Tensor

from ..errors import first_line, printable, shown
from ..visual import WHOLE, Item
from .file_index import read_span
from .records import BadSample

FITS = ("squash", "pad", "crop", "tiles", "native")
CANVASES = ("squash", "pad", "crop", "contain")
"""How an image is brought onto the canvas of an item, see `fit_image`."""
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
"""Formats that Pillow decodes within this process; for some others it starts external programs."""
MAX_PIXELS = 100_000_000
MAX_SIDE = 65_535
MAX_ASPECT = 200
BAND_PIXELS = 4_000_000
BLACK = (0, 0, 0)

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


class EncodedImage:
    """An encoded image that is decoded on demand; a subclass provides its bytes."""

    @property
    def label(self) -> str:
        """Name of the image in messages."""
        raise NotImplementedError

    def open(self) -> BinaryIO:
        """Open the encoded bytes. Raises OSError or ValueError if they are not available."""
        raise NotImplementedError

    def load(self) -> Image.Image:
        """Decode the image as RGB. Raises BadSample if it is missing, truncated, too large or not an image."""
        return self._opened(to_rgb)

    def size(self) -> tuple[int, int]:
        """Size ``(H, W)`` of the loaded image, without decoding it if the format allows. Raises BadSample."""
        return self._opened(_upright_size)

    def _opened(self, read: Callable[[Image.Image], T]) -> T:
        with self._naming_failures():
            file = self.open()
        with file, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                with Image.open(file, formats=FORMATS) as image:
                    _check_size(image.size)
                    return read(image)
            except UnidentifiedImageError:
                file.seek(0)
                head = file.read(16)
                found = f"it starts with {head!r}, which is not one of {', '.join(FORMATS)}" if head else "it is empty"
                raise BadSample(f"image {self.label} is not an image: {found}") from None
            except _BadSize as error:
                raise BadSample(f"image {self.label} cannot be used: {error}") from None
            except Exception as error:  # decoders can raise any exception for malformed bytes
                raise BadSample(f"image {self.label} cannot be decoded: {first_line(error)}") from None

    def check(self) -> None:
        """Check the first and last bytes, and decode the image only if they are inconclusive. Raises BadSample."""
        with self._naming_failures():
            head, tail = self.ends()
        end = {b"\xff\xd8": b"\xff\xd9", b"\x89P": b"IEND"}.get(head[:2])
        if end is None or end not in tail:
            self.load()  # the format has no end marker, or it is missing or not at the end (cameras append data)

    def ends(self) -> tuple[bytes, bytes]:
        """The first 8 bytes and the last 64."""
        with self.open() as file:
            head = file.read(8)
            file.seek(max(-64, -file.seek(0, os.SEEK_END)), os.SEEK_END)
            return head, file.read()

    @contextmanager
    def _naming_failures(self) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            raise BadSample(f"image {self.label} does not exist") from None
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or first_line(error)
            raise BadSample(f"image {self.label} cannot be read: {reason}") from None


@dataclass(frozen=True)
class ImageOnDisk(EncodedImage):
    """An image file. relative: its path within the folder of images, if it has one."""

    path: Path
    relative: str | None = field(default=None, compare=False)

    @property
    def label(self) -> str:
        return printable(str(self.path))

    def open(self) -> BinaryIO:
        if not stat.S_ISREG(os.stat(self.path).st_mode):  # opening a pipe would block
            raise OSError("it is not a regular file")
        return open(self.path, "rb")


@dataclass(frozen=True)
class ImageInMemory(EncodedImage):
    """The encoded bytes of an image."""

    data: bytes = field(repr=False)
    name: str

    @property
    def label(self) -> str:
        return printable(self.name)

    def open(self) -> BinaryIO:
        return BytesIO(self.data)


@dataclass(frozen=True)
class ImageInFile(EncodedImage):
    """An image within a larger file: `length` bytes from `offset`."""

    file: Path
    offset: int
    length: int
    name: str

    @property
    def label(self) -> str:
        return printable(f"{self.name} in {self.file}")

    def open(self) -> BinaryIO:
        return BytesIO(read_span(self.file, self.offset, self.length))

    def ends(self) -> tuple[bytes, bytes]:
        tail = min(self.length, 64)
        head = read_span(self.file, self.offset, min(self.length, 8))
        return head, read_span(self.file, self.offset + self.length - tail, tail)


class ImageFolder:
    """Images as records name them: encoded, or by path relative to a folder.

    folder: None if no path is relative. outside: whether paths may lead out of the folder. root: its real path. Raises
    ValueError if the folder does not exist.
    """

    def __init__(self, folder: str | Path | None, outside: bool = False):
        if folder is not None and not Path(folder).is_dir():
            raise ValueError(f"data.images={folder} is not a folder")
        self.folder, self.outside = folder, outside
        self.root = None if folder is None else os.path.join(os.path.realpath(folder), "")

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
        if re.match(r"(https?|s3|gs|ftp)://", value, re.IGNORECASE):
            raise BadSample(f"{name}: image {shown(value)} is a URL; images are not downloaded, so save them as files")
        return self.picture(value.removeprefix("file://"), name)

    def picture(self, path: str, name: str) -> ImageOnDisk:
        """The image of record `name` at `path`. Raises BadSample if the path is not allowed."""
        if "\\" in path:
            raise BadSample(f"{name}: image path {shown(path)} has backslashes; separate folders with '/'")
        if self.folder is None and not (self.outside and os.path.isabs(path)):
            raise BadSample(f"{name}: the record has an image, but data.images is not set")
        whole = Path(self.folder or "", path)
        if not self.outside and not self._real(str(whole)).startswith(self.root):
            raise BadSample(
                f"{name}: image path {shown(path)} leads out of data.images; data.outside_images=true allows that"
            )
        return ImageOnDisk(whole, path)

    @staticmethod
    def _real(path: str) -> str:
        folder, file = os.path.split(path)
        try:
            return os.path.realpath(path) if os.path.islink(path) else os.path.join(_real_folder(folder), file)
        except (OSError, ValueError):
            return ""


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


_real_folder = lru_cache(maxsize=2**16)(os.path.realpath)


class _BadSize(ValueError):
    """An image whose size is outside the limits."""


def _check_size(size: tuple[int, int]) -> None:
    width, height = size
    if min(size) < 1:
        raise _BadSize(f"it has {width}x{height} pixels")
    if width * height > MAX_PIXELS:
        raise _BadSize(f"it has {width}x{height} pixels: too many")
    if max(size) > MAX_SIDE:
        raise _BadSize(f"it has {width}x{height} pixels: a side of more than {MAX_SIDE}")
    if max(size) > MAX_ASPECT * min(size):
        raise _BadSize(f"it has {width}x{height} pixels: one side is more than {MAX_ASPECT} times the other")


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


def fit_image(image: Image.Image, size: tuple[int, int], fit: str, mean: tuple[float, ...]) -> Image.Image:
    """Fit an image to `size` ``(H, W)``.

    squash: stretch. crop: scale to cover `size`, rounded to whole pixels, and crop the center (as in CLIP).
    pad: pad to the aspect ratio of `size` with the mean color, truncated to integer levels, then scale (LLaVA-1.5,
    published code). contain: scale to the largest size that fits, and center on black (LLaVA-NeXT, published code).
    """
    height, width = size
    if fit == "contain":
        return _contained(image, size)
    if image.size == (width, height):
        return image
    if fit == "squash":
        return image.resize((width, height), Image.Resampling.BICUBIC)
    if fit == "crop":
        if width * image.height >= height * image.width:
            whole = (width, width * image.height // image.width)
        else:
            whole = (height * image.width // image.height, height)
        left, top = (whole[0] - width) // 2, (whole[1] - height) // 2
        return image.resize(whole, Image.Resampling.BICUBIC).crop((left, top, left + width, top + height))
    assert fit == "pad", fit
    return _padded_and_scaled(image, size, tuple(int(255 * channel) for channel in mean))


def _padded_and_scaled(image: Image.Image, size: tuple[int, int], color: tuple[int, ...]) -> Image.Image:
    """Center the image on a canvas with the aspect ratio of `size` ``(H, W)``, and scale to `size`.

    Pillow scales rows before columns, so bands of rows can be processed one at a time. The canvas of an elongated
    image, which is up to `MAX_ASPECT` times as large as the image, is never completely in memory.
    """
    height, width = size
    across, down = round(image.height * width / height), round(image.width * height / width)
    whole = max(image.width, across), max(image.height, down)
    left, top = (whole[0] - image.width) // 2, (whole[1] - image.height) // 2
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


def _contained(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    height, width = size
    scale = min(width / image.width, height / image.height)
    inner = tuple(min(side, math.ceil(own * scale)) for side, own in zip((width, height), image.size))
    corner = (width - inner[0]) // 2, (height - inner[1]) // 2
    return _on_canvas(image.resize(inner, Image.Resampling.BICUBIC), (width, height), corner, BLACK)


def show_items(image: Image.Image, items: Iterable[Item], mean: tuple[float, ...], encoder: int = 0) -> list[Tensor]:
    """What an encoder is shown of an image: tensors ``(3, H, W)`` uint8, one for each of its items."""
    canvases: dict[tuple[str, tuple[int, int]], Image.Image] = {}
    shown = []
    for item in items:
        fit, size = key = item.fits[encoder], item.canvas(encoder)
        if key not in canvases:
            canvases[key] = fit_image(image, size, fit, mean)
        canvas, (height, width) = canvases[key], item.pixels[encoder]
        if item.box != WHOLE:
            left, top = round(item.box[0] * canvas.width), round(item.box[1] * canvas.height)
            canvas = canvas.crop((left, top, left + width, top + height))
        shown.append(torch.from_numpy(np.asarray(canvas).transpose(2, 0, 1).copy()))
    return shown
