"""Encoded media: files, bytes in memory, or parts of larger files, and the folders in which records name them."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

from ..errors import first_line, printable, shown
from .file_index import read_span
from .records import BadSample

MAX_PIXELS = 100_000_000
MAX_SIDE = 65_535
MAX_ASPECT = 200


class Encoded:
    """An encoded medium; a subclass provides its bytes, and another one says what they are (`noun`)."""

    noun: str

    @property
    def label(self) -> str:
        """Name of the medium in messages."""
        raise NotImplementedError

    def open(self) -> BinaryIO:
        """Open the encoded bytes. Raises OSError or ValueError if they are not available."""
        raise NotImplementedError

    def ends(self) -> tuple[bytes, bytes]:
        """The first 8 bytes and the last 64."""
        with self.open() as file:
            head = file.read(8)
            file.seek(max(-64, -file.seek(0, os.SEEK_END)), os.SEEK_END)
            return head, file.read()

    @contextmanager
    def naming_failures(self) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            raise BadSample(f"{self.noun} {self.label} does not exist") from None
        except (OSError, ValueError) as error:
            if isinstance(error, BadSample):
                raise
            reason = getattr(error, "strerror", None) or first_line(error)
            raise BadSample(f"{self.noun} {self.label} cannot be read: {reason}") from None


@dataclass(frozen=True)
class OnDisk(Encoded):
    """A file. relative: its path within the folder of media, if it has one."""

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
class InMemory(Encoded):
    """Encoded bytes."""

    data: bytes = field(repr=False)
    name: str

    @property
    def label(self) -> str:
        return printable(self.name)

    def open(self) -> BinaryIO:
        return BytesIO(self.data)


@dataclass(frozen=True)
class InFile(Encoded):
    """A part of a larger file: `length` bytes from `offset`."""

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


class MediaFolder:
    """Media as records name them: by path relative to a folder.

    folder: None if no path is relative. outside: whether paths may lead out of the folder. root: its real path. Raises
    ValueError if the folder does not exist.
    """

    noun: str
    key: str

    def __init__(self, folder: str | Path | None = None, outside: bool = False):
        if folder is not None and not Path(folder).is_dir():
            raise ValueError(f"{self.key}={folder} is not a folder")
        self.folder, self.outside = folder, outside
        self.root = None if folder is None else os.path.join(os.path.realpath(folder), "")

    def whole(self, path: str, name: str) -> Path:
        """The complete path that record `name` gives. Raises BadSample if it is not allowed."""
        if re.match(r"(https?|s3|gs|ftp)://", path, re.IGNORECASE):
            raise BadSample(
                f"{name}: {self.noun} {shown(path)} is a URL; {self.noun}s are not downloaded, so save them as files"
            )
        path = path.removeprefix("file://")
        if "\\" in path:
            raise BadSample(f"{name}: {self.noun} path {shown(path)} has backslashes; separate folders with '/'")
        if self.folder is None and not (self.outside and os.path.isabs(path)):
            article = "an" if self.noun == "image" else "a"
            raise BadSample(f"{name}: the record has {article} {self.noun}, but {self.key} is not set")
        whole = Path(self.folder or "", path)
        if not self.outside and not self._real(str(whole)).startswith(self.root):
            raise BadSample(
                f"{name}: {self.noun} path {shown(path)} leads out of {self.key}; data.outside_images=true allows that"
            )
        return whole

    @staticmethod
    def _real(path: str) -> str:
        folder, file = os.path.split(path)
        try:
            whole = os.path.islink(path) or file == ".."
            return os.path.realpath(path) if whole else os.path.join(_real_folder(folder), file)
        except (OSError, ValueError):
            return ""


_real_folder = lru_cache(maxsize=2**16)(os.path.realpath)


def in_natural_order(name: str) -> list[tuple[int, str]]:
    """Sort key with numeric order: ``2.jpg`` before ``10.jpg``."""
    return [(int(piece), "") if piece.isdecimal() else (-1, piece) for piece in re.split(r"(\d+)", name)]


class BadSize(ValueError):
    """An image or a video whose size is outside the limits."""


def check_size(size: tuple[int, int]) -> None:
    """Raise BadSize for a size ``(W, H)`` outside the limits."""
    width, height = size
    if min(size) < 1:
        raise BadSize(f"it has {width}x{height} pixels")
    if width * height > MAX_PIXELS:
        raise BadSize(f"it has {width}x{height} pixels: too many")
    if max(size) > MAX_SIDE:
        raise BadSize(f"it has {width}x{height} pixels: a side of more than {MAX_SIDE}")
    if max(size) > MAX_ASPECT * min(size):
        raise BadSize(f"it has {width}x{height} pixels: one side is more than {MAX_ASPECT} times the other")
