"""The records of files of documents, each with its name in messages."""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from .indexed_json import LINES, IndexedJson
from .webdataset import JsonShard, expand_braces

_JSON = (".json", *LINES)
_PICKLED = {".pkl", ".pickle"}
_KNOWN = (*_JSON, ".tar", ".parquet", ".arrow")


class Records(Protocol):
    """A sequence of records. identity: changes with the files."""

    identity: tuple

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[str, object]:
        """The name of a record in messages, and its content. Raises BadSample if it is broken."""


class JsonRecords:
    """The records of a JSON or JSONL file."""

    def __init__(self, file: Path):
        self.file = IndexedJson(file)
        self.identity = str(self.file.file.resolve()), self.file.stamp

    def __len__(self) -> int:
        return len(self.file)

    def __getitem__(self, index: int) -> tuple[str, object]:
        return self.file.name(index), self.file[index]


def open_records(path: str | Path) -> Sequence[Records]:
    """Open the files at a path, in the order of their names.

    path: a file, a folder, a glob or brace notation (``docs_{00..22}.jsonl.gz``), for JSON or JSONL, which may be
    packed by gzip, and for tar shards with a ``.json`` for each record; or a Hugging Face dataset, as in `load_split`.
    Raises ValueError if they cannot be read.
    """
    text = os.fspath(path)
    if os.path.isdir(text):
        found = [file for file in sorted(map(str, Path(text).iterdir())) if _kind(file) in _KNOWN]
    else:
        found = [file for name in expand_braces(text) for file in sorted(glob.glob(name, recursive=True)) or [name]]
    kinds = {_kind(file) for file in found}
    if kinds & _PICKLED:
        raise ValueError(f"{text}: pickled files are not read: convert them to JSON (docs/data.md)")
    if found and kinds <= set(_JSON):
        return [JsonRecords(Path(file)) for file in found]
    if kinds == {".tar"}:
        return [JsonShard(Path(file)) for file in found]
    from .hf_dataset import Rows

    return [Rows(text)]


def _kind(file: str) -> str:
    return Path(file.lower().removesuffix(".gz")).suffix
