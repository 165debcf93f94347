"""LLaVA's JSON format: ``[{"id", "image", "conversations": [{"from": "human"|"gpt", "value"}]}]``.

A mixture of such files is a YAML file, as in LLaVA-NeXT::

    datasets:
      - json_path: captions.json            # relative to the folder of the YAML file, or absolute
        sampling_strategy: random:20%       # all (default), or first, end or random with a number or a percentage
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Subset

from ..errors import nearest, shown
from .images import ImageFolder
from .indexed_json import IndexedJson
from .mixture import Concatenation
from .record_reader import RecordReader
from .records import Conversation, Source

MIXTURES = (".yaml", ".yml")
MAX_PATH = 4096
_ENTRY_KEYS = ("json_path", "sampling_strategy")
_STRATEGY = re.compile(r"(first|end|random)\s*:\s*(\d+(?:\.\d+)?%|\d+)")


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

    def __getitem__(self, index: int) -> Conversation:
        return self.reader.read(self.records[index], self.records.name(index))


class MixturePart(NamedTuple):
    """A file of a mixture, and the records to use: ``all``, or for example ``random:20%``."""

    path: Path
    strategy: str


def open_llava(file: str | Path, images: str | Path | None, seed: int = 0, outside: bool = False, **options) -> Source:
    """Open a LLaVA file, or the concatenated files of a YAML mixture.

    seed: of the selection by ``random``, which is the same for every rank, epoch and run. options: of `RecordReader`.
    Raises ValueError.
    """
    if Path(file).suffix.lower() not in MIXTURES:
        return LlavaJson(file, images, outside, **options)
    sources = []
    for number, part in enumerate(read_mixture(file)):
        source = LlavaJson(part.path, images, outside, **options)
        numbers = _chosen(part.strategy, len(source), seed * 1_000_003 + number)
        sources.append(source if numbers is None else Subset(source, numbers))
    return Concatenation(sources)


def read_mixture(file: str | Path) -> list[MixturePart]:
    """Read the files of a YAML mixture. Raises ValueError with the entry that is wrong."""
    import yaml

    file = Path(file)
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise ValueError(f"data file {file} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"data file {file} cannot be read: {error}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"data file {file} is not valid YAML: {' '.join(str(error).split())}") from None
    entries = content.get("datasets") if isinstance(content, dict) else None
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"data file {file} must contain a non-empty list 'datasets', got {shown(content)}")
    return [_read_entry(entry, file, f"data file {file}, datasets[{i}]") for i, entry in enumerate(entries)]


def _read_entry(entry: object, file: Path, name: str) -> MixturePart:
    if not isinstance(entry, dict):
        raise ValueError(f"{name}: expected an object with 'json_path', got {shown(entry)}")
    for key in entry:
        if key not in _ENTRY_KEYS:
            raise ValueError(f"{name}: unknown key {shown(key)}.{nearest(str(key), _ENTRY_KEYS)}")
    path, strategy = entry.get("json_path"), entry.get("sampling_strategy", "all")
    if not isinstance(path, str) or not 0 < len(path) <= MAX_PATH or not path.isprintable():
        raise ValueError(f"{name}: 'json_path' must be a path, got {shown(path)}")
    if not isinstance(strategy, str) or (strategy != "all" and not _STRATEGY.fullmatch(strategy)):
        raise ValueError(
            f"{name}: sampling_strategy must be all, or first:N, end:N or random:N with a number or a "
            f"percentage (first:10%), got {shown(strategy)}"
        )
    amount = strategy.partition(":")[2].strip()
    if amount and not 0 < float(amount.rstrip("%")) <= (100 if amount.endswith("%") else math.inf):
        raise ValueError(f"{name}: sampling_strategy={strategy} selects no records, or more than there are")
    return MixturePart(file.parent / path, strategy)


def _chosen(strategy: str, size: int, seed: int) -> np.ndarray | None:
    """Indices of the records that a strategy selects from `size`; None for all of them."""
    if strategy == "all":
        return None
    kind, amount = _STRATEGY.fullmatch(strategy).groups()
    # as in LLaVA-NeXT, percentages are rounded up, and a number above the file's size selects all records
    count = math.ceil(float(amount[:-1]) * size / 100) if amount.endswith("%") else int(amount)
    count = min(count, size)
    if kind == "random":
        order = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
        return np.sort(order[:count].numpy())
    return np.arange(count) if kind == "first" else np.arange(size - count, size)
