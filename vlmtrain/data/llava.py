"""LLaVA's JSON format: ``[{"id", "image", "conversations": [{"from": "human"|"gpt", "value"}]}]``."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
from torch.utils.data import Subset

from .file_index import Index, cached_index
from .file_lists import chosen_records, read_list
from .images import ImageFolder
from .indexed_json import IndexedJson
from .mixture import Concatenation
from .record_reader import RecordReader
from .records import BadSample, Conversation, Source

TOLD_EVERY = 1000  # records after which progress is told


class LlavaJson:
    """A LLaVA file (JSON, or JSONL with one record per line) as a sequence of conversations.

    images: the folder to which image paths are relative; None if no record has a path. outside: whether those paths
    may lead out of that folder. options: of `RecordReader`, which describes the records.

    Raises ValueError if the file is missing, unreadable or empty; a single broken record raises BadSample when it is
    accessed.
    """

    def __init__(self, file: str | Path, images: str | Path | None, outside: bool = False, **options):
        self.reader = RecordReader(ImageFolder(images, outside), **options)
        self.records = IndexedJson(file)

    def __len__(self) -> int:
        return len(self.records)

    @property
    def identity(self) -> tuple:
        return str(self.records.file.resolve()), self.records.stamp, self.reader.images.root

    def __getitem__(self, index: int) -> Conversation:
        return self.reader.read(self.records[index], self.records.name(index))

    def image_keys(self, tell: Callable[[int], None]) -> np.ndarray:
        """A number of the image files of each record, ``(N,)``; 0 for records without images, encoded and bad ones.

        tell: is told now and then how many records have been read, unless the numbers are stored already.
        """
        reader = self.reader
        kind = repr(("images", reader.images.root, reader.ignored, reader.images_first, reader.repair))
        return cached_index(self.records.file, kind, lambda: self._find_image_keys(tell))["keys"]

    def _find_image_keys(self, tell: Callable[[int], None]) -> Index:
        keys = np.zeros(len(self), np.int64)
        for index in range(len(self)):
            if index % TOLD_EVERY == 0:
                tell(index)
            with suppress(BadSample):
                paths = [getattr(medium, "relative", None) for medium in self[index].media]
                if paths and None not in paths:
                    digest = hashlib.blake2b("\0".join(paths).encode("utf-8", "surrogateescape"), digest_size=8)
                    keys[index] = int.from_bytes(digest.digest(), "little", signed=True)
        return {"keys": keys}


def open_llava(file: str | Path, images: str | Path | None, seed: int = 0, outside: bool = False, **options) -> Source:
    """Open a LLaVA file, or the concatenated files of a list (see `file_lists`).

    seed: of the selection by ``random``, which is the same for every rank, epoch and run. options: of `RecordReader`.
    Raises ValueError.
    """
    listed = read_list(file)
    if listed is None:
        return LlavaJson(file, images, outside, **options)
    sources = []
    for number, part in enumerate(listed):
        source = LlavaJson(part.path, part.images or images, outside, **options)
        if part.length not in (None, len(source)):
            raise ValueError(f"data file {file}: {part.path} has {len(source)} records, not length={part.length}")
        numbers = chosen_records(part.strategy, len(source), seed * 1_000_003 + number)
        sources.append(source if numbers is None else Subset(source, numbers))
    return Concatenation(sources)
