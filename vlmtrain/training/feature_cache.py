"""Disk cache for the features of a frozen encoder, so that it processes each image once.

Its files are described in `vlmtrain.data.cached_features`. The name of an encoder's folder is the hash of its weights,
architecture, layers and image size.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import time
import weakref
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from ..connectors import Features, VisionFeatures
from ..data.cached_features import PARTIAL, FeatureFiles, checksum, write_whole
from ..model.vision import VisionEncoder
from ..model.vision.base import packed, rows_of, stacked
from ..settings import Features as FeatureOptions
from ..visual import Cached, Pixels
from .assembly import DTYPES
from .log import logger

STALE_SECONDS = 3600


class FeatureCache:
    """Features of one encoder: read from disk if they are cached, otherwise computed and written.

    encoder_hash: hash of its weights. limit: maximum size of `folder` in bytes, over all runs that share it.
    stored: dtype that features are rounded to, including newly computed ones, so that an image has the same features
    each time; None for the encoder's dtype. Several processes may share a folder: files are written under a temporary
    name first. A damaged file is recomputed. A folder that cannot be written is used read-only.
    """

    def __init__(
        self, folder: Path, encoder: VisionEncoder, encoder_hash: str, limit: int, stored: torch.dtype | None = None
    ):
        self.dtype = next(encoder.parameters()).dtype
        self.stored = stored or self.dtype
        architecture = json.dumps(encoder.architecture, sort_keys=True)
        facts = (encoder_hash, architecture, encoder.layer, encoder.levels, encoder.image_size, self.dtype)
        facts += (self.stored,) if self.stored != self.dtype else ()
        self.encoder = encoder
        self.root = folder
        self.folder = folder / hashlib.sha256(repr(facts).encode()).hexdigest()[:32]
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"features.cache={folder} cannot be written: {error}") from None
        try:
            self.budget = _Budget(folder, limit)
        except OSError as error:
            logger.warning(f"features.cache={folder} is used read-only, as it cannot be written: {error}")
            self.budget = None
        self.files = FeatureFiles(folder, self.folder, len(encoder.levels))
        self.hits = self.misses = 0

    @classmethod
    def of(cls, options: FeatureOptions, encoder: VisionEncoder, encoder_hash: str) -> FeatureCache:
        """Create the cache that the settings `features` describe."""
        stored = DTYPES[options.dtype] if options.dtype else None
        return cls(Path(options.cache), encoder, encoder_hash, int(options.max_gb * 2**30), stored)

    def __call__(self, pixels: Pixels, cached: Cached) -> Features:
        """Return the features of a batch's items on the encoder's device, as the encoder makes them.

        pixels: of the items whose features were not read with the batch.
        """
        rows = dict(zip(cached.numbers, rows_of(cached.features) if cached.features else ()))
        others = [number for number in range(len(cached.keys)) if number not in rows]
        keys = [cached.keys[number] for number in others]
        found = {key: self.files.read(key) for key in keys}  # an earlier batch may have had the same image
        missing = {key: number for number, key in enumerate(keys) if found[key] is None}
        if missing:
            numbers = list(missing.values())
            computed = self.encoder.encode(
                pixels[numbers] if isinstance(pixels, Tensor) else tuple(pixels[number] for number in numbers)
            )
            for key, row in zip(missing, rows_of(computed)):
                found[key] = row.to(self.stored)
                self._write(key, found[key])
        self.hits += len(cached.keys) - len(missing)
        self.misses += len(missing)
        rows |= {number: found[key] for number, key in zip(others, keys)}
        device = next(self.encoder.parameters()).device
        if not others:
            features = cached.features.to(device, self.dtype)
            # pinning memory makes lists of tuples
            return features._replace(grids=tuple(map(tuple, features.grids))) if features.grids else features
        ordered = [rows[number].to(device, self.dtype) for number in range(len(cached.keys))]
        return stacked(ordered) if isinstance(pixels, Tensor) else packed(ordered)

    def _write(self, key: str, features: VisionFeatures) -> None:
        if self.budget is None:
            return
        tensors = {name: tensor.cpu().clone() for name, tensor in _tensors(features).items()}  # two may be one layer
        data = save(tensors, metadata={"crc": checksum(tensors)})
        file = self.files.file(key)
        try:
            file.parent.mkdir(exist_ok=True)
            replaced = file.stat().st_size if file.exists() else 0
            if not self.budget.take(len(data) - replaced):
                logger.warning(f"{self.root} is full (features.max_gb): other images are not cached")
                self.budget = None
                return
            write_whole(file, data)
        except OSError as error:
            logger.warning(f"{file} cannot be written, so nothing more is cached: {error}")
            self.budget = None


class _Budget:
    """Limits the bytes in `folder`, over all processes that use it at the same time.

    The file ``.bytes`` holds the current total and is locked for updates. All users hold a shared lock on ``.users``.
    The first one counts the files again, as some may have been deleted or left partially written, and removes partial
    files older than `STALE_SECONDS`. If a process dies while writing an entry, the entry counts until then. On a file
    system without locks, the limit is approximate. Raises OSError if the folder cannot be written.
    """

    def __init__(self, folder: Path, limit: int):
        self.folder, self.limit = folder, limit
        users, self.counter = self._open(".users"), self._open(".bytes")
        with contextlib.suppress(BlockingIOError):
            _lock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(self.counter, 0)
        _lock(users, fcntl.LOCK_SH)
        self.take(0)

    def take(self, size: int) -> bool:
        """Reserve `size` bytes. Returns whether they fit within the limit."""
        _lock(self.counter, fcntl.LOCK_EX)
        try:
            known = os.pread(self.counter, 32, 0)
            total = int(known) if known.isdigit() else self._count()
            fits = total + size <= self.limit
            os.pwrite(self.counter, b"%020d" % (total + size * fits), 0)
        finally:
            _lock(self.counter, fcntl.LOCK_UN)
        return fits

    def _count(self) -> int:
        total = 0
        for file in self.folder.glob("*/*/*"):
            if file.suffix not in (PARTIAL, ".safetensors"):
                continue
            with contextlib.suppress(FileNotFoundError):
                status = file.stat()
                if file.suffix == PARTIAL and time.time() - status.st_mtime > STALE_SECONDS:
                    file.unlink()
                else:
                    total += status.st_size
        return total

    def _open(self, name: str) -> int:
        file = os.open(self.folder / name, os.O_RDWR | os.O_CREAT, 0o666)
        weakref.finalize(self, os.close, file)  # which releases the lock
        return file


def _lock(file: int, how: int) -> None:
    try:
        fcntl.flock(file, how)
    except BlockingIOError:
        raise
    except OSError:
        pass  # some network file systems do not support locks


def _tensors(row: VisionFeatures) -> dict[str, Tensor]:
    tensors = {"patches": row.patches} | ({} if row.prefix is None else {"prefix": row.prefix})
    return tensors | {f"level{i}": level for i, level in enumerate(row.levels)}
