"""Finds the records of a mixture that show the same image files, so that they can be drawn together."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Subset

from .llava import LlavaJson
from .mixture import Concatenation, Mixture
from .records import Source


def image_groups(mixture: Mixture) -> Tensor | None:
    """For each record the index of the first record of its source that shows the same image files, ``(N,)``.

    Records without images are alone, and so are those of formats other than LLaVA's JSON, whose images are not files.
    None for a mixture with streams, whose records are not known in advance.
    """
    if mixture.streams:
        return None
    groups, start = np.arange(len(mixture)), 0
    for source in mixture.sources.values():
        keys = _keys(source)
        (shown,) = keys.nonzero()
        _, first, number = np.unique(keys[shown], return_index=True, return_inverse=True)
        groups[start + shown] = start + shown[first[number]]
        start += len(source)
    return torch.from_numpy(groups)


def _keys(source: Source) -> np.ndarray:
    """A number of the image files of each record, 0 for unknown ones."""
    if isinstance(source, Subset):
        return _keys(source.dataset)[source.indices]
    if isinstance(source, Concatenation):
        return np.concatenate([_keys(part) for part in source.parts])
    return source.image_keys() if isinstance(source, LlavaJson) else np.zeros(len(source), np.int64)
