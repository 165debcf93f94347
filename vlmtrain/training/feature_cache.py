"""Features of a frozen encoder on disk, so that it looks at each picture once.

DIR/<encoder>/<ab>/<picture>.safetensors, one file a view: the name of the folder is the hash of the encoder's weights,
architecture, layers and picture size, that of the file the hash of the pixels as the encoder sees them.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ..connectors import VisionFeatures
from ..model.vision import VisionEncoder
from .assembly import DTYPES
from .metrics import logger


class FeatureCache:
    """Features of one encoder, read where they are known and computed and written where they are not.

    encoder_hash: of its weights. limit: bytes that may be written below `folder`, by all runs that share it.
    stored: what features are rounded to, those that were just computed too, so that a picture looks the same each
    time; None for the encoder's own dtype. Several processes may share a folder: a file is written under another
    name first. One that is damaged is computed again.
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
        self.left = limit - sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
        self.names = {"patches", *(f"level{i}" for i in range(len(encoder.levels)))}
        self.hits = self.misses = 0

    @classmethod
    def from_options(cls, options: Mapping, encoder: VisionEncoder, encoder_hash: str) -> FeatureCache:
        """The cache that the settings `features` speak of."""
        stored = DTYPES[options["dtype"]] if options["dtype"] else None
        return cls(Path(options["cache"]), encoder, encoder_hash, int(options["max_gb"] * 2**30), stored)

    def __call__(self, images: Tensor, keys: Sequence[str]) -> VisionFeatures:
        """Features of views ``(V, 3, H, W)`` with their `keys`, on the views' device."""
        found = {key: self._read(key) for key in keys}
        missing = {key: number for number, key in enumerate(keys) if found[key] is None}
        if missing:
            computed = self.encoder(images[list(missing.values())])
            for place, key in enumerate(missing):
                found[key] = {name: tensor.to(self.stored) for name, tensor in _tensors(computed, place).items()}
                self._write(key, found[key])
        self.hits += len(keys) - len(missing)
        self.misses += len(missing)
        rows = [found[key] for key in keys]
        stacked = {name: torch.stack([row[name].to(images.device, self.dtype) for row in rows]) for name in rows[0]}
        levels = tuple(stacked[f"level{i}"] for i in range(len(self.encoder.levels)))
        return VisionFeatures(stacked["patches"], stacked.get("prefix"), levels)

    def _file(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"

    def _read(self, key: str) -> dict[str, Tensor] | None:
        try:
            with safe_open(self._file(key), "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
                intact = (file.metadata() or {}).get("crc") == _checksum(tensors)
        except (OSError, SafetensorError):
            return None
        return tensors if intact and tensors.keys() - {"prefix"} == self.names else None

    def _write(self, key: str, tensors: dict[str, Tensor]) -> None:
        tensors = {name: tensor.cpu().clone() for name, tensor in tensors.items()}  # two may be one layer
        data = save(tensors, metadata={"crc": _checksum(tensors)})
        if len(data) > self.left:
            if self.left >= 0:
                logger.warning(f"{self.root} is full (features.max_gb): other pictures are looked at each time")
            self.left = -1
            return
        file = self._file(key)
        partial = file.with_suffix(f".{os.getpid()}")
        try:
            file.parent.mkdir(exist_ok=True)
            partial.write_bytes(data)
            partial.replace(file)
        except OSError as error:
            logger.warning(f"{file} cannot be written, so nothing more is cached: {error}")
            partial.unlink(missing_ok=True)
            self.left = -1
            return
        self.left -= len(data)


def _tensors(features: VisionFeatures, row: int) -> dict[str, Tensor]:
    tensors = {"patches": features.patches[row]}
    if features.prefix is not None:
        tensors["prefix"] = features.prefix[row]
    return tensors | {f"level{i}": level[row] for i, level in enumerate(features.levels)}


def _checksum(tensors: dict[str, Tensor]) -> str:
    """CRC-32 over names, shapes, dtypes and bytes: a flipped bit in a file's header may change each of them."""
    crc = 0
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        crc = zlib.crc32(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode(), crc)
        crc = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy(), crc)
    return f"{crc:08x}"
