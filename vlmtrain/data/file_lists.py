"""Lists of data files: the YAML mixtures of LLaVA-NeXT, and the meta JSON of InternVL.

YAML::

    datasets:
      - json_path: captions.json            # relative to the folder of the YAML file, or absolute
        sampling_strategy: random:20%       # all (default), or first, end or random with a number or a percentage

Meta JSON::

    {"captions": {"annotation": "captions.jsonl", "root": "images/", "repeat_time": 0.5, "length": 1000}}
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from ..errors import nearest, shown

YAML = (".yaml", ".yml")
MAX_PATH = 4096
MAX_META = 2**20  # bytes of a list of files; larger files are records
_ENTRY_KEYS = ("json_path", "sampling_strategy")
_META_KEYS = ("annotation", "root", "repeat_time", "length", "data_augment")
_STRATEGY = re.compile(r"(first|end|random)\s*:\s*(\d+(?:\.\d+)?%|\d+)")


class ListedFile(NamedTuple):
    """A data file and the records to use: ``all``, or for example ``random:20%``.

    images: its image folder; None for that of the settings. length: its number of records, if the list says so.
    """

    path: Path
    strategy: str
    images: Path | None = None
    length: int | None = None


def read_list(file: str | Path) -> list[ListedFile] | None:
    """The files of a list; None if `file` is not a list but contains records.

    Raises ValueError with the entry that is wrong.
    """
    file = Path(file)
    if file.suffix.lower() in YAML:
        return _read_yaml(file)
    return _read_meta(file) if file.suffix.lower() == ".json" else None


def _meta_of(file: Path) -> dict | None:
    """The entries of a meta JSON; None for any other file, about which opening it as records raises an error."""
    try:
        if not file.is_file() or file.stat().st_size > MAX_META:
            return None
        content = json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError):
        return None
    is_meta = isinstance(content, dict) and any(isinstance(e, dict) and "annotation" in e for e in content.values())
    return content if is_meta else None


def _read_meta(file: Path) -> list[ListedFile] | None:
    meta = _meta_of(file)
    if meta is None:
        return None
    found = []
    for name, entry in meta.items():
        where = f"data file {file}, {shown(name)}"
        if not isinstance(entry, dict) or not isinstance(entry.get("annotation"), str):
            raise ValueError(f"{where}: expected an object with a path as 'annotation', got {shown(entry)}")
        for key in entry:
            if key not in _META_KEYS:
                raise ValueError(f"{where}: unknown key {shown(key)}.{nearest(str(key), _META_KEYS)}")
        if entry.get("data_augment"):
            raise ValueError(f"{where}: data_augment={shown(entry['data_augment'])} is not supported, only false")
        repeat, length, root = entry.get("repeat_time", 1), entry.get("length"), entry.get("root")
        if isinstance(repeat, bool) or not isinstance(repeat, int | float) or not 0 < repeat <= 1000:
            raise ValueError(f"{where}: repeat_time must be a number above 0 and at most 1000, got {shown(repeat)}")
        if not isinstance(root, str | None) or not isinstance(length, int | None):
            raise ValueError(f"{where}: expected a folder as root and a number as length, got {shown(entry)}")
        part = repeat - int(repeat)
        # InternVL takes the first records
        strategies = ["all"] * int(repeat) + ([f"first:{part:.4%}"] if part else [])
        images = None if root is None else _beside(file, root)
        found += [ListedFile(_beside(file, entry["annotation"]), each, images, length) for each in strategies]
    return found


def _beside(file: Path, path: str) -> Path:
    """A path relative to the folder of `file`, or to the working directory, as InternVL's are."""
    return file.parent / path if (file.parent / path).exists() else Path(path)


def _read_yaml(file: Path) -> list[ListedFile]:
    import yaml

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


def _read_entry(entry: object, file: Path, name: str) -> ListedFile:
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
    return ListedFile(file.parent / path, strategy)


def chosen_records(strategy: str, size: int, seed: int) -> np.ndarray | None:
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
