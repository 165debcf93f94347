"""Hugging Face datasets: saved folders, Parquet, Arrow and JSON files, and Hub IDs."""

from __future__ import annotations

import glob
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..errors import first_line, nearest
from .file_index import stamp_of
from .grading import GRADING
from .images import ImageFolder
from .record_keys import FORMS, KEYS
from .record_media import MEDIA
from .record_reader import RecordReader
from .records import BadSample, Conversation

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from pyarrow import Array, Table

COLUMNS = {**KEYS, "image": (*KEYS["image"], "jpg", "png"), **{role: () for role in GRADING}}
"""Roles of columns, and the column names that are recognized for each (none for roles that only evaluation uses)."""
_MAPPED = "Arrow files are read in place without streaming: set streaming=false"
_END = b"\xff\xff\xff\xff\0\0\0\0"
_BUILDERS = {".parquet": "parquet", ".arrow": "arrow", ".json": "json", ".jsonl": "json", ".csv": "csv", ".tsv": "csv"}


class RowReader:
    """Converts rows of a dataset, as Arrow tables, to conversations.

    The other arguments are those of `HFDataset`. columns: the column of each role; features: of all columns that are
    read. Raises ValueError if the columns are ambiguous or have wrong types.
    """

    def __init__(
        self,
        data: Dataset | IterableDataset,
        path: str | Path,
        columns: Mapping[str, str | None] | None,
        images: str | Path | None,
        outside: bool,
        **options,
    ):
        ignored = options.get("ignored", ())
        present = [column for column in data.column_names if column not in ignored]
        self.columns = choose_columns(columns or {}, present, str(path))
        for role in ("question", "caption"):
            kind = _innermost(data.features.get(self.columns.get(role)))
            if role in self.columns and getattr(kind, "dtype", "string") not in ("string", "large_string", "json"):
                raise ValueError(f"columns.{role}={self.columns[role]} of {path} must contain strings, got {kind}")
        for column in set(present) - set(self.columns.values()):
            _refuse_media(data.features[column], column, path)
        folder = ImageFolder(path if images is None and os.path.isdir(path) else images, outside)
        self.features = {column: data.features[column] for column in present}
        self.is_tsv = re.search(r"\.tsv(\.gz)?$", str(path), re.IGNORECASE) is not None
        self._reader = RecordReader(folder, keys=self.columns, **options)

    @property
    def root(self) -> str | None:
        """The real path of the folder of images."""
        return self._reader.images.root

    @property
    def has_caption_lists(self) -> bool:
        """Whether rows have lists of captions."""
        return isinstance(self.features.get(self.columns.get("caption")), _lists())

    def record(self, fetch: Callable[[], Table], where: str) -> dict:
        """The values of the row that `fetch` returns. Raises BadSample, naming the record, if it is damaged."""
        values = _row_values(fetch, self.features, where)
        for column, value in values.items() if self.is_tsv else ():
            if isinstance(value, str) and "\t" in value and "\n" in value:
                reason = f"'{column}' has tabs and line breaks, as after an unclosed quotation mark"
                raise BadSample(f"{where} cannot be read: {reason}")
        return values

    def read(self, record: dict, where: str) -> Conversation:
        """Convert the values of a row. Raises BadSample, naming the record."""
        return self._reader.read(record, where)


class HFDataset:
    """A split of a dataset as a sequence of conversations; memory-mapped, and read row by row.

    path: a folder made by ``save_to_disk``, a folder or glob of .parquet, .arrow, .json, .csv or .tsv files, one such
    file, or a Hub ID. split: of a dataset with several splits. name: the configuration, if there are several.
    columns: the column of each role, e.g. ``{"question": "query", "answer": "label", "image": "img"}``; other roles
    are recognized by the names of columns (`COLUMNS`). images: the folder to which image paths are relative (default:
    `path`, if it is a folder); outside: whether the paths may lead out of it. options: of `RecordReader`.

    A column with lists of captions gives one conversation per caption.

    Raises ValueError if the dataset cannot be loaded or its columns are ambiguous; a broken record raises
    BadSample when it is accessed.
    """

    def __init__(
        self,
        path: str | Path,
        split: str = "train",
        name: str | None = None,
        columns: Mapping[str, str | None] | None = None,
        images: str | Path | None = None,
        outside: bool = False,
        **options,
    ):
        self.name = Path(path).name
        data = load_split(os.fspath(path), split, name)
        files = [entry["filename"] for entry in data.cache_files]
        _check_ends(files, path)
        if not len(data):
            raise ValueError(f"dataset {path} is empty: no records")
        self.reader = RowReader(data, path, columns, images, outside, **options)
        # in Arrow format, so that only the requested row is read and images stay encoded
        self.rows = data.select_columns(list(self.reader.features)).with_format("arrow")
        self._ends = self._caption_ends()
        self.identity = tuple((file, stamp_of(file)) for file in files), self.reader.root

    def _caption_ends(self) -> np.ndarray | None:
        """The number of captions up to the end of each row, if rows have lists of captions."""
        if not self.reader.has_caption_lists:
            return None
        import pyarrow.compute as pc

        column = self.reader.columns["caption"]
        captions = self.rows.select_columns([column])[:][column]
        return np.cumsum(pc.fill_null(pc.list_value_length(captions), 0).to_numpy())

    def __len__(self) -> int:
        return len(self.rows) if self._ends is None else int(self._ends[-1])

    def __getitem__(self, index: int) -> Conversation:
        if not 0 <= index < len(self):
            raise IndexError(index)
        where = f"{self.name} record {index}"
        if self._ends is None:
            return self.reader.read(self._row(index, where), where)
        row = int(np.searchsorted(self._ends, index, side="right"))
        record, column = self._row(row, where), self.reader.columns["caption"]
        captions = record[column]
        caption = captions[index - int(self._ends[row])]  # counted from the end of the row
        conversation = self.reader.read({**record, column: caption}, where)
        *before, said = conversation.turns
        grading = replace(said.grading, captions=tuple(map(str, captions)))
        return replace(conversation, turns=(*before, replace(said, grading=grading)))

    def _row(self, index: int, where: str) -> dict:
        return self.reader.record(lambda: self.rows[index], where)


class Rows:
    """The rows of a dataset with their names, for documents, whose columns are not those of conversations.

    path: see `HFDataset`; of several splits, ``train`` is read. Raises ValueError if it cannot be loaded.
    """

    def __init__(self, path: str):
        self.name = Path(path).name
        data = load_split(path, "train", None)
        files = [entry["filename"] for entry in data.cache_files]
        _check_ends(files, path)
        if not len(data):
            raise ValueError(f"dataset {path} is empty: no records")
        self.features, self.rows = data.features, data.with_format("arrow")
        self.identity = tuple((file, stamp_of(file)) for file in files)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[str, dict]:
        where = f"{self.name} record {index}"
        return where, _row_values(lambda: self.rows[index], self.features, where)


def _row_values(fetch: Callable[[], Table], features: Mapping[str, object], where: str) -> dict:
    """The values of the row that `fetch` returns. Raises BadSample, naming the record, if it is damaged."""
    try:
        table = fetch()
        table.validate()
        for column in table.columns:
            for chunk in column.chunks:
                _check_contents(chunk)
        (row,) = table.to_pylist()
        return {column: _decoded(value, features[column]) for column, value in row.items()}
    except Exception as error:  # damaged columns can raise any exception
        raise BadSample(f"{where} cannot be read: {first_line(error)}") from None


def _lists() -> tuple[type, ...]:
    import datasets

    return datasets.List, datasets.LargeList, list


def _innermost(feature: object) -> object:
    while isinstance(feature, _lists()):
        feature = feature[0] if isinstance(feature, list) else feature.feature
    return feature


def _decoded(value: object, feature: object) -> object:
    """A value with the names of class labels, and with the values that the library stores as JSON text."""
    import datasets

    if value is None:
        return None
    if isinstance(feature, datasets.Json):
        return json.loads(value) if isinstance(value, str | bytes) else value
    if isinstance(feature, datasets.ClassLabel):
        return feature.int2str(value) if value >= 0 else None
    if isinstance(feature, dict):
        return {key: _decoded(value[key], inner) for key, inner in feature.items()}
    if isinstance(feature, _lists()) and isinstance(value, list):
        inner = feature[0] if isinstance(feature, list) else feature.feature
        return [_decoded(item, inner) for item in value]
    return value


def _refuse_media(feature: object, column: str, path: str | Path) -> None:
    """Raise ValueError for an unused column of images, videos or other binary data."""
    import datasets

    feature = _innermost(feature)
    kind = type(feature).__name__
    is_binary = getattr(feature, "dtype", None) in ("binary", "large_binary") and isinstance(feature, datasets.Value)
    if is_binary or isinstance(feature, datasets.Image | datasets.Video | datasets.Audio):
        use = (
            f"set data.columns.{'video' if kind == 'Video' else 'image'}={column}, or "
            if is_binary or kind != "Audio"
            else "audio is not supported; "
        )
        raise ValueError(
            f"dataset {path}: nothing reads the column {column} ({'binary' if is_binary else kind}): {use}ignore it "
            f"with data.ignore=[{column}]"
        )


def _check_contents(array: Array) -> None:
    """Raise ValueError if offsets point outside their buffer, which Arrow does not check, or text is not UTF-8."""
    from pyarrow import types

    if types.is_struct(array.type):
        for i in range(array.type.num_fields):
            _check_contents(array.field(i))
    elif types.is_list(array.type) or types.is_large_list(array.type):
        bounds = [0, *array.offsets.to_pylist(), len(array.values)]
        if bounds != sorted(bounds):
            raise ValueError("the offsets of a list point outside its column")
        _check_contents(array.values.slice(bounds[1], bounds[-2] - bounds[1]))
    else:
        array.validate(full=True)


def choose_columns(given: Mapping[str, str | None], present: list[str], path: str) -> dict[str, str]:
    """Choose the column of each role. Raises ValueError with the keys to set if the choice is ambiguous."""
    chosen = {role: column for role, column in given.items() if column is not None}
    for role, column in chosen.items():
        if role not in COLUMNS:
            raise ValueError(f"columns.{role}: expected one of {', '.join(COLUMNS)}.{nearest(role, COLUMNS)}")
        if column not in present:
            raise ValueError(f"columns.{role}={column}: {path} has the columns {', '.join(present)}")
    known = {
        role: [chosen[role]] if role in chosen else [c for c in names if c in present]
        for role, names in COLUMNS.items()
    }
    known["answer"] = known["answer"] or known["actions"]
    for role in ("question", "answer"):
        known[role] = known[role][:1]
    named = [form for form in FORMS if any(role in chosen for role in form)]
    forms = named or [form for form in FORMS if all(known[role] for role in form)]
    if len(forms) != 1 or any(len(known[role]) != 1 for role in forms[0]):
        raise ValueError(
            f"cannot determine which columns of {path} contain the text; it has {', '.join(present)}: set "
            "columns.messages=…, or columns.question=… and columns.answer=…, or columns.caption=…"
        )
    for role in ("image", "video"):
        if len(known[role]) > 1:
            raise ValueError(
                f"cannot determine which column of {path} contains the {role}s; set columns.{role} to one of "
                f"{', '.join(known[role])}"
            )
    return {role: known[role][0] for role in (*forms[0], *MEDIA, "actions", "system", "id", *GRADING) if known[role]}


def load_split(path: str, split: str, name: str | None, streaming: bool = False) -> Dataset | IterableDataset:
    """Load a split of a dataset, as described for `HFDataset`.

    streaming: read the files as they are needed. Raises ValueError if the dataset cannot be loaded or streamed.
    """
    import datasets

    try:
        if os.path.isdir(path):
            if streaming and next(Path(path).rglob("*.arrow"), None):
                raise ValueError(_MAPPED)
            if not any(os.path.isfile(os.path.join(path, file)) for file in ("state.json", "dataset_dict.json")):
                return datasets.load_dataset(path, name, split=split, streaming=streaming)
            data = datasets.load_from_disk(path)
            if isinstance(data, datasets.DatasetDict) and split not in data:
                raise ValueError(f"there is no split '{split}'; it has {', '.join(data)}")
            return data[split] if isinstance(data, datasets.DatasetDict) else data
        files = [path] if os.path.isfile(path) else sorted(glob.glob(path, recursive=True))
        if files and name is not None:
            raise ValueError(f"name={name} selects a configuration of a Hub ID or a folder, not of files")
        if files:
            return _load_files(files, split, streaming)
        if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path) and Path(path).suffix not in _BUILDERS:
            return datasets.load_dataset(path, name, split=split, streaming=streaming)
    except Exception as error:  # the library, the network and broken files can raise any exception
        reason = first_line(error)
        if isinstance(error, datasets.exceptions.DatasetGenerationError) and error.__cause__:
            reason = first_line(error.__cause__)
        raise ValueError(f"dataset {path} cannot be loaded: {reason}") from None
    raise ValueError(f"dataset {path} does not exist")


def _check_ends(files: Sequence[str], path: str | Path) -> None:
    """Raise ValueError if an Arrow file was truncated between two batches, which Arrow does not detect."""
    for file in files:
        with open(file, "rb") as stream:
            stream.seek(-len(_END), os.SEEK_END)
            if stream.read() != _END:
                raise ValueError(f"dataset {path} cannot be loaded: {file} has no end marker, so it was truncated")


def _load_files(files: list[str], split: str, streaming: bool) -> Dataset | IterableDataset:
    import datasets
    from pyarrow import ArrowInvalid

    kinds = {Path(file.removesuffix(".gz")).suffix.lower() for file in files}
    builders = {_BUILDERS.get(kind) for kind in kinds}
    if len(builders) > 1 or None in builders:
        raise ValueError(f"expected files of one kind, {', '.join(_BUILDERS)}; got {', '.join(files[:4])}")
    (builder,) = builders
    if builder == "arrow":
        if streaming:
            raise ValueError(_MAPPED)
        try:
            return datasets.concatenate_datasets([datasets.Dataset.from_file(file) for file in files])
        except ArrowInvalid:
            pass  # Arrow's file format instead of its stream format; it is converted below
    base = re.match(r"\w*", split).group() or "train"
    more = _as_strings(files, "\t" if kinds == {".tsv"} else ",") if builder == "csv" else {}
    return datasets.load_dataset(builder, data_files={base: files}, split=split, streaming=streaming, **more)


def _as_strings(files: Sequence[str], separator: str) -> dict:
    """Options that read all columns of CSV files as strings, which would otherwise become numbers, dates or null.

    Raises ValueError if the files have different columns.
    """
    import pandas
    from datasets import Features, Value

    options = {"sep": separator, "keep_default_na": False, "na_values": [""]}
    columns = {file: list(pandas.read_csv(file, nrows=0, **options).columns) for file in files}
    for file, found in columns.items():
        if found != columns[files[0]]:
            first = ", ".join(columns[files[0]])
            raise ValueError(f"{file} has the columns {', '.join(found)}, but {files[0]} has {first}")
    return {**options, "features": Features({column: Value("string") for column in columns[files[0]]})}
