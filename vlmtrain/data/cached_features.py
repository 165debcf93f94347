"""Cached features as data workers read them, before an image is opened.

    CACHE/keys/<ab>/<lookup>                   the keys of an image's items, one per line
    CACHE/<encoder>/<ab>/<key>.safetensors     the features of an item

A key is the hash of the pixels that the encoder receives. A lookup is the hash of the path, size and time of
modification of an image, of a video, or of each frame of one, and of what is shown of it, so a medium that is unchanged
is not decoded to find its keys. Both are files of their own that are written under a temporary name first: other
workers and ranks see them at once, and no locks are needed, which network file systems may not have.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import secrets
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import PIL
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..connectors import VisionFeatures
from ..visual import Item, normalized
from .encoded import InFile, InMemory, OnDisk
from .file_index import stamp_of
from .geometry import Geometry
from .records import ImageSource, VideoSource
from .video import EncodedVideo, FrameSequence

PARTIAL = ".partial"
_VERSION = 1  # of the pixels that are made of an image
_KEY = re.compile(r"[0-9a-f]{32}(-\d+x\d+)?")
_SETTLED = 2 * 10**9  # nanoseconds; the coarsest clock of a file system in use, FAT's
_DATED = 315_705_600 * 10**9  # 3 January 1980; archives that are reproducible date all files to 1970 or 1980


class ItemFeatures(NamedTuple):
    """The key of an item and its features, without the batch dimension; None if they are not cached."""

    key: str
    features: VisionFeatures | None


@dataclass(frozen=True)
class FeatureFiles:
    """The files of one encoder in a feature cache.

    root: of the cache; folder: of the encoder; levels: number of hidden layers that it returns in addition.
    """

    root: Path
    folder: Path
    levels: int

    def find(
        self, medium: ImageSource | VideoSource, items: Sequence[Item], geometry: Geometry, encoder: int = 0
    ) -> list[ItemFeatures] | None:
        """The features of the items of a medium; None if some are missing. A medium that is a file is not opened."""
        found = [self._item(key) for key in self._keys(self._lookup(medium, items, geometry, encoder))]
        return found if len(found) == len(items) and all(item.features is not None for item in found) else None

    def named(
        self,
        shown: Sequence[Tensor],
        medium: ImageSource | VideoSource,
        items: Sequence[Item],
        geometry: Geometry,
        encoder: int = 0,
    ) -> list[ItemFeatures]:
        """The items of a medium whose pixels are `shown`, with the features of those that the cache has."""
        look, with_shape = geometry.mean_std[encoder], geometry.fit == "native"
        keys = [pixel_key(normalized(each, *look), with_shape) for each in shown]
        lookup = self._lookup(medium, items, geometry, encoder)
        if lookup is not None and keys != self._keys(lookup):
            with contextlib.suppress(OSError):  # a cache that cannot be written is read
                lookup.parent.mkdir(parents=True, exist_ok=True)
                write_whole(lookup, "\n".join(keys).encode())
        return [self._item(key) for key in keys]

    def file(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"

    def read(self, key: str) -> VisionFeatures | None:
        """The features of an item; None if they are missing or damaged."""
        try:
            with safe_open(self.file(key), "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
                intact = (file.metadata() or {}).get("crc") == checksum(tensors)
        except (OSError, SafetensorError):
            return None
        levels = [f"level{i}" for i in range(self.levels)]
        if not intact or tensors.keys() - {"prefix"} != {"patches", *levels}:
            return None
        return VisionFeatures(tensors["patches"], tensors.get("prefix"), tuple(tensors[level] for level in levels))

    def _item(self, key: str) -> ItemFeatures:
        return ItemFeatures(key, self.read(key))

    def _keys(self, lookup: Path | None) -> list[str]:
        """The keys that were written for a lookup; none if there are none or they are damaged."""
        try:
            keys = lookup.read_text("ascii").split("\n") if lookup is not None else []
        except (OSError, ValueError):
            return []
        return keys if all(map(_KEY.fullmatch, keys)) else []

    def _lookup(self, image: ImageSource, items: Sequence[Item], geometry: Geometry, encoder: int) -> Path | None:
        facts = _facts(image)
        if facts is None:
            return None
        plan = [
            (item.fits[encoder], item.box, item.pixels[encoder], *([item.times] if item.times else []))
            for item in items
        ]
        look = (*geometry.mean_std[encoder], geometry.fit == "native")
        told = repr((_VERSION, PIL.__version__, facts, plan, look))
        name = hashlib.blake2b(told.encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()
        return self.root / "keys" / name[:2] / name


def _facts(medium: ImageSource | VideoSource) -> tuple | None:
    """Values that differ if the encoded medium, its clip or one of its frames does; None if there are none.

    A file that is still being written, or whose date is that of all files of an archive, has none.
    """
    if isinstance(medium, FrameSequence):
        frames = [_facts(frame) for frame in medium.images]
        return None if None in frames else (medium.fps, medium.start, medium.end, *frames)
    clip = (medium.start, medium.end) if isinstance(medium, EncodedVideo) else ()
    if isinstance(medium, InMemory):
        return hashlib.blake2b(medium.data, digest_size=16).hexdigest(), *clip
    if not isinstance(medium, OnDisk | InFile):
        return None
    path = medium.path if isinstance(medium, OnDisk) else medium.file
    try:
        size, modified = stamp_of(path)
    except (OSError, ValueError):
        return None
    if not _DATED < modified < time.time_ns() - _SETTLED:
        return None
    if isinstance(medium, OnDisk):
        return medium.relative or str(path), size, modified, *clip
    return path.name, size, modified, medium.offset, medium.length, *clip


def pixel_key(pixels: Tensor, with_shape: bool) -> str:
    """Cache key of the normalized pixels ``(..., 3, H, W)``, float32, of an item: their hash.

    with_shape: for images of different sizes, whose bytes may be equal although their shapes are not.
    """
    key = hashlib.blake2b(pixels.contiguous().numpy(), digest_size=16).hexdigest()
    return f"{key}-{pixels.shape[-2]}x{pixels.shape[-1]}" if with_shape else key


def write_whole(file: Path, data: bytes) -> None:
    """Write a file so that it is never seen in part. Raises OSError."""
    partial = file.with_suffix(f".{secrets.token_hex(8)}{PARTIAL}")
    try:
        partial.write_bytes(data)
        partial.replace(file)
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise


def checksum(tensors: dict[str, Tensor]) -> str:
    """CRC-32 over names, shapes, dtypes and bytes. A flipped bit in the header can change any of the first three."""
    crc = 0
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        crc = zlib.crc32(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode(), crc)
        crc = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy(), crc)
    return f"{crc:08x}"
