"""Finds the records of a mixture that show the same image files, so that they can be drawn together."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Subset

from .llava import LlavaJson
from .mixture import Concatenation, Mixture
from .records import Source


def image_groups(mixture: Mixture, tell: Callable[[int, int], None] = lambda read, total: None) -> Tensor | None:
    """For each record the index of the first record of its source that shows the same image files, ``(N,)``.

    Records without images are alone, and so are those of formats other than LLaVA's JSON, whose images are not files.
    None for a mixture with streams, whose records are not known in advance. tell: is told how many records of how many
    have been read.
    """
    if mixture.streams:
        return None
    files = [file for source in mixture.sources.values() for file in _files(source)]
    keys: dict[int, np.ndarray] = {}
    read, total = 0, sum(map(len, files))
    for file in files:
        keys[id(file)] = file.image_keys(lambda number, before=read: tell(before + number, total))
        read += len(file)
        tell(read, total)
    groups, start = np.arange(len(mixture)), 0
    for source in mixture.sources.values():
        own = _keys(source, keys)
        (shown,) = own.nonzero()
        _, first, number = np.unique(own[shown], return_index=True, return_inverse=True)
        groups[start + shown] = start + shown[first[number]]
        start += len(source)
    return torch.from_numpy(groups)


def _files(source: Source) -> Iterator[LlavaJson]:
    if isinstance(source, Subset):
        yield from _files(source.dataset)
    elif isinstance(source, Concatenation):
        for part in source.parts:
            yield from _files(part)
    elif isinstance(source, LlavaJson):
        yield source


def _keys(source: Source, of_files: dict[int, np.ndarray]) -> np.ndarray:
    """A number of the image files of each record, 0 for unknown ones. of_files: those of a file, by its `id`."""
    if isinstance(source, Subset):
        return _keys(source.dataset, of_files)[source.indices]
    if isinstance(source, Concatenation):
        return np.concatenate([_keys(part, of_files) for part in source.parts])
    return of_files[id(source)] if isinstance(source, LlavaJson) else np.zeros(len(source), np.int64)
