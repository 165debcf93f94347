"""Pictures: found, opened safely, fitted to the encoder's size, normalised."""

from __future__ import annotations

import math
import os
import stat
import warnings
from collections.abc import Callable, Iterator
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
from ..tiling import Tiles
from .file_index import read_span
from .records import BadSample

FITS = ("squash", "pad", "crop", "tiles")
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
"""Formats that are decoded inside this process; some others start programs."""
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
"""What undoes an EXIF orientation."""
_QUARTER_TURNS = [_UPRIGHT[orientation] for orientation in (5, 6, 7, 8)]

T = TypeVar("T")

ImageFile.LOAD_TRUNCATED_IMAGES = False


class EncodedImage:
    """Bytes that should be a picture, decoded when they are needed; a subclass says where they are."""

    @property
    def label(self) -> str:
        """What messages call the picture."""
        raise NotImplementedError

    def open(self) -> BinaryIO:
        """The bytes. Raises OSError or ValueError if there are none."""
        raise NotImplementedError

    def load(self) -> Image.Image:
        """The whole picture as RGB. Raises BadSample if it is missing, truncated, too large or no picture."""
        return self._opened(to_rgb)

    def size(self) -> tuple[int, int]:
        """``(H, W)`` of what `load` gives, without decoding it where the format allows. Raises BadSample."""
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
                raise BadSample(f"image {self.label} is no picture: {_described(file.read(16))}") from None
            except Exception as error:  # decoders answer hostile bytes with any exception
                raise BadSample(f"image {self.label} cannot be decoded: {first_line(error)}") from None

    def check(self) -> None:
        """Look at the head and the tail, decoding only where they do not tell. Raises BadSample."""
        with self._naming_failures():
            head, tail = self.ends()
        end = {b"\xff\xd8": b"\xff\xd9", b"\x89P": b"IEND"}.get(head[:2])
        if end is None or end not in tail:
            self.load()  # no cheap end mark, or it is missing or hidden (cameras append data of their own)

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
    """One picture file."""

    path: Path

    @property
    def label(self) -> str:
        return printable(str(self.path))

    def open(self) -> BinaryIO:
        if not stat.S_ISREG(os.stat(self.path).st_mode):  # a pipe would be waited for
            raise OSError("it is no regular file")
        return open(self.path, "rb")


@dataclass(frozen=True)
class ImageInMemory(EncodedImage):
    """One picture's encoded bytes."""

    data: bytes = field(repr=False)
    name: str

    @property
    def label(self) -> str:
        return printable(self.name)

    def open(self) -> BinaryIO:
        return BytesIO(self.data)


@dataclass(frozen=True)
class ImageInFile(EncodedImage):
    """One picture among others in a file: `length` bytes from `offset` on."""

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


class PictureFolder:
    """Pictures by path, from a folder that they cannot lead out of, unless `outside` says that they may.

    folder: None if there are no pictures. Raises ValueError if it is not there.
    """

    def __init__(self, folder: str | Path | None, outside: bool = False):
        if folder is not None and not Path(folder).is_dir():
            raise ValueError(f"data.images={folder} is not a folder")
        self.folder, self.outside = folder, outside
        self._inside = None if folder is None else os.path.join(os.path.realpath(folder), "")

    def picture(self, path: str, name: str) -> ImageOnDisk:
        """The picture of record `name` at `path`. Raises BadSample if the path may not be followed."""
        if "\\" in path:
            raise BadSample(f"{name}: image path {shown(path)} has backslashes; folders are parted by '/'")
        if self.folder is None and not (self.outside and os.path.isabs(path)):
            raise BadSample(f"{name}: the record has a picture, but data.images is not set")
        whole = Path(self.folder or "", path)
        if not self.outside and not self._real(str(whole)).startswith(self._inside):
            raise BadSample(
                f"{name}: image path {shown(path)} leads out of data.images; data.outside_images=true allows that"
            )
        return ImageOnDisk(whole)

    @staticmethod
    def _real(path: str) -> str:
        folder, file = os.path.split(path)
        try:
            return os.path.realpath(path) if os.path.islink(path) else os.path.join(_real_folder(folder), file)
        except (OSError, ValueError):
            return ""


@lru_cache(maxsize=2**16)
def _real_folder(folder: str) -> str:
    return os.path.realpath(folder)


def _check_size(size: tuple[int, int]) -> None:
    width, height = size
    if min(size) < 1:
        raise ValueError(f"it has {width}x{height} pixels")
    if width * height > MAX_PIXELS:
        raise ValueError(f"it has {width}x{height} pixels: too many")
    if max(size) > MAX_SIDE:
        raise ValueError(f"it has {width}x{height} pixels: a side of more than {MAX_SIDE}")
    if max(size) > MAX_ASPECT * min(size):
        raise ValueError(f"it has {width}x{height} pixels: one side is more than {MAX_ASPECT} times the other")


def _described(head: bytes) -> str:
    return f"it starts with {head!r}, which is none of {', '.join(FORMATS)}" if head else "it is empty"


def _orientation(image: Image.Image) -> int | None:
    try:
        return image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # notes beside the picture may be broken in any way, and the picture is not
        return None


def _upright_size(image: Image.Image) -> tuple[int, int]:
    turned = _UPRIGHT.get(_orientation(image)) in _QUARTER_TURNS
    return image.size if turned else image.size[::-1]


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB, upright (EXIF), first frame, transparency laid on white.

    Raises ValueError for pixels whose range is not known.
    """
    image.load()
    orientation = _orientation(image)
    if orientation in _UPRIGHT:
        image = image.transpose(_UPRIGHT[orientation])
    if image.mode.startswith("I"):  # 16-bit grey: `convert` would clip, not scale
        pixels = np.asarray(image).astype(np.int64)
        if pixels.min() < 0 or pixels.max() > 0xFFFF:
            raise ValueError("grey values of more than 16 bits")
        return Image.fromarray((pixels >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("grey values in floating point")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        canvas = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(canvas, image).convert("RGB")
    return image.convert("RGB")


def fit_image(image: Image.Image, size: tuple[int, int], fit: str, mean: tuple[float, ...]) -> Image.Image:
    """Bring a picture to `size` ``(H, W)``.

    squash: stretch. crop: scale until it covers, to whole pixels, and cut the centre (CLIP's own way).
    pad: fill up to the aspect of `size` with the mean colour, cut to whole levels, then scale (LLaVA-1.5, published
    code).
    """
    height, width = size
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
    """The picture in the middle of a canvas of the aspect of `size` ``(H, W)``, scaled to it.

    Pillow scales rows before columns, so bands of rows may go one after another: the canvas of a long picture, which is
    up to `MAX_ASPECT` times as large as the picture, is never whole in memory.
    """
    height, width = size
    across, down = round(image.height * width / height), round(image.width * height / width)
    whole = max(image.width, across), max(image.height, down)
    left, top = (whole[0] - image.width) // 2, (whole[1] - image.height) // 2
    narrow = Image.new("RGB", (width, whole[1]), color)
    rows = max(1, BAND_PIXELS // whole[0])
    for first in range(0, image.height, rows):
        last = min(image.height, first + rows)
        band = _on_canvas(image.crop((0, first, image.width, last)), (whole[0], last - first), (left, 0), color)
        narrow.paste(band.resize((width, last - first), Image.Resampling.BICUBIC), (0, top + first))
    return narrow.resize((width, height), Image.Resampling.BICUBIC)


def _on_canvas(
    image: Image.Image, size: tuple[int, int], corner: tuple[int, int], color: tuple[int, ...]
) -> Image.Image:
    """A picture with its upper left corner at `corner` of a canvas of one colour, `size` ``(W, H)``."""
    canvas = Image.new("RGB", size, color)
    canvas.paste(image, corner)
    return canvas


def cut_tiles(image: Image.Image, size: tuple[int, int], tiles: Tiles) -> list[Image.Image]:
    """The views of a picture in tiles of `size` ``(H, W)``: the whole stretched to one, then the tiles row by row.

    The tiles cut a canvas on which the picture stands in the middle, as large as it fits, on black (LLaVA-NeXT,
    published code).
    """
    height, width = size
    whole = (tiles.columns * width, tiles.rows * height)
    scale = min(whole[0] / image.width, whole[1] / image.height)
    inner = tuple(min(side, math.ceil(own * scale)) for side, own in zip(whole, image.size))
    corner = (whole[0] - inner[0]) // 2, (whole[1] - inner[1]) // 2
    canvas = _on_canvas(image.resize(inner, Image.Resampling.BICUBIC), whole, corner, BLACK)
    corners = [(column * width, row * height) for row in range(tiles.rows) for column in range(tiles.columns)]
    stretched = image.resize((width, height), Image.Resampling.BICUBIC)
    return [stretched, *(canvas.crop((x, y, x + width, y + height)) for x, y in corners)]


def to_tensor(image: Image.Image, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """``(3, H, W)`` float32, normalised by channel mean and standard deviation of values in [0, 1]."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float().div_(255)
    return pixels.sub_(torch.tensor(mean)[:, None, None]).div_(torch.tensor(std)[:, None, None])
