"""Hugging Face datasets: saved folders, Parquet, Arrow and JSON files, and hub ids."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import first_line, nearest, shown
from .images import EncodedImage, ImageInMemory, PictureFolder
from .records import IMAGE_MARK, BadSample, Conversation, Turn
from .turns import (
    GRADING,
    answer_turns,
    caption_turns,
    filled_list,
    graded,
    llava_turns,
    pictures_in_front,
    record_name,
    role_of,
)

if TYPE_CHECKING:
    from datasets import Dataset
    from pyarrow import Array

COLUMNS = {
    "messages": ("messages", "conversations", "texts"),
    "question": ("question",),
    "answer": ("answer",),
    "caption": ("caption", "text"),
    "image": ("image", "images", "jpg", "png"),
    "id": ("id",),
    **{role: () for role in GRADING},
}
"""Roles of columns, and the column names that are recognised for each (none for roles that only evaluation uses)."""
FORMS = (("messages",), ("question", "answer"), ("caption",))
"""Combinations of roles that provide a record's text; a dataset has one of them."""
_END = b"\xff\xff\xff\xff\0\0\0\0"
_BUILDERS = {".parquet": "parquet", ".arrow": "arrow", ".json": "json", ".jsonl": "json"}


class HFDataset:
    """A split of a dataset as a sequence of conversations; memory-mapped, and read row by row.

    path: a folder made by ``save_to_disk``, a folder or glob of .parquet, .arrow or .json files, one such file,
    or a hub id. split: of a dataset with several splits. name: the configuration, if there are several.
    columns: the column of each role, e.g. ``{"question": "query", "answer": "label", "image": "img"}``; other roles
    are recognised by the names of columns (`COLUMNS`).
    images: the folder to which image paths are relative (default: `path`, if it is a folder); outside: whether the
    paths may lead out of it.

    messages are ``{"from", "value"}``, ``{"role", "content"}`` with a string or typed items, or
    ``{"user", "assistant"}``. Images are encoded bytes, paths or both, one or a list. In forms without image marks
    (questions, captions, user/assistant pairs), images come first.

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
    ):
        self.name = Path(path).name
        data = _load(os.fspath(path), split, name)
        _check_ends([entry["filename"] for entry in data.cache_files], path)
        if not len(data):
            raise ValueError(f"dataset {path} is empty: no records")
        self.columns = choose_columns(columns or {}, data.column_names, str(path))
        for role in ("question", "answer", "caption"):
            kind = data.features[self.columns[role]] if role in self.columns else None
            if kind is not None and getattr(kind, "dtype", None) not in ("string", "large_string"):
                raise ValueError(f"columns.{role}={self.columns[role]} of {path} must contain strings, got {kind}")
        self.images = PictureFolder(path if images is None and os.path.isdir(path) else images, outside)
        # in Arrow format, so that only the requested row is read and images stay encoded
        self.rows = data.select_columns(sorted(set(self.columns.values()))).with_format("arrow")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Conversation:
        if not 0 <= index < len(self):
            raise IndexError(index)
        where = f"{self.name} record {index}"
        row = self._row(index, where)
        record = {role: row[column] for role, column in self.columns.items()}
        name = record_name(where, record.get("id"))
        images = self._pictures(record.get("image"), name)
        turns = graded(self._turns(record, len(images), name), record, name)
        return Conversation(name, turns, images)

    def _row(self, index: int, where: str) -> dict:
        try:
            table = self.rows[index]
            table.validate()
            for column in table.columns:
                for chunk in column.chunks:
                    _check_contents(chunk)
            (row,) = table.to_pylist()
            return row
        except Exception as error:  # damaged columns can raise any exception
            raise BadSample(f"{where} cannot be read: {first_line(error)}") from None

    def _turns(self, record: dict, pictures: int, name: str) -> tuple[Turn, ...]:
        if "caption" in record:
            return caption_turns(record["caption"], pictures, name)
        if "question" in record:
            return pictures_in_front(answer_turns(record["question"], record["answer"], name), pictures)
        key, messages = self.columns["messages"], _rows(record["messages"])
        keys = filled_list(messages, key, name)[0]
        if isinstance(keys, dict) and {"user", "assistant"} <= keys.keys():
            pairs = [answer_turns(pair["user"], pair["assistant"], name) for pair in messages]
            return pictures_in_front(tuple(turn for pair in pairs for turn in pair), pictures)
        if isinstance(keys, dict) and {"role", "content"} <= keys.keys():
            return tuple(
                Turn(role_of(message["role"], "role", name), _content(message["content"], name)) for message in messages
            )
        return llava_turns(messages, key, name)

    def _pictures(self, value: object, name: str) -> tuple[EncodedImage, ...]:
        if value is None or value == "":
            return ()
        values = value if isinstance(value, list) else [value]
        return tuple(
            self._picture(one, f"{i} of column '{self.columns['image']}'", name) for i, one in enumerate(values)
        )

    def _picture(self, value: object, label: str, name: str) -> EncodedImage:
        data, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, value)
        if isinstance(data, bytes):
            return ImageInMemory(data, label)
        if isinstance(path, str) and path:
            return self.images.picture(path, name)
        raise BadSample(f"{name}: image {label} must be bytes or a path, got {shown(value)}")


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
    named = [form for form in FORMS if any(role in chosen for role in form)]
    forms = named or [form for form in FORMS if all(known[role] for role in form)]
    if len(forms) != 1 or any(len(known[role]) != 1 for role in forms[0]):
        raise ValueError(
            f"cannot determine which columns of {path} contain the text; it has {', '.join(present)}: set "
            "columns.messages=…, or columns.question=… and columns.answer=…, or columns.caption=…"
        )
    if len(known["image"]) > 1:
        raise ValueError(
            f"cannot determine which column of {path} contains the images; set columns.image to one of "
            f"{', '.join(known['image'])}"
        )
    return {role: known[role][0] for role in (*forms[0], "image", "id", *GRADING) if known[role]}


def _rows(messages: object) -> object:
    """Messages as a list of objects, also if the dataset stores them as an object of lists."""
    if isinstance(messages, dict) and all(isinstance(column, list) for column in messages.values()):
        return [dict(zip(messages, row)) for row in zip(*messages.values())]
    return messages


def _content(content: object, name: str) -> str:
    """Text of a message, with a mark for each typed item that is an image."""
    if isinstance(content, str):
        return content
    parts = []
    for item in filled_list(content, "content", name):
        kind = item.get("type") if isinstance(item, dict) else None
        if kind == "image":
            parts.append(IMAGE_MARK)
        elif kind == "text" and isinstance(item.get("text"), str):
            parts.append(item["text"])
        else:
            raise BadSample(f"{name}: an item of 'content' must be of type text or image, got {shown(item)}")
    return "".join(parts)


def _load(path: str, split: str, name: str | None) -> Dataset:
    import datasets

    try:
        if os.path.isdir(path):
            if not any(os.path.isfile(os.path.join(path, file)) for file in ("state.json", "dataset_dict.json")):
                return datasets.load_dataset(path, name, split=split)
            data = datasets.load_from_disk(path)
            if isinstance(data, datasets.DatasetDict) and split not in data:
                raise ValueError(f"there is no split '{split}'; it has {', '.join(data)}")
            return data[split] if isinstance(data, datasets.DatasetDict) else data
        files = [path] if os.path.isfile(path) else sorted(glob.glob(path, recursive=True))
        if files:
            return _load_files(files, split)
        if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path) and Path(path).suffix not in _BUILDERS:
            return datasets.load_dataset(path, name, split=split)
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


def _load_files(files: list[str], split: str) -> Dataset:
    import datasets
    from pyarrow import ArrowInvalid

    builders = {_BUILDERS.get(Path(file).suffix.lower()) for file in files}
    if len(builders) > 1 or None in builders:
        raise ValueError(f"expected files of one kind, {', '.join(_BUILDERS)}; got {', '.join(files[:4])}")
    (builder,) = builders
    if builder == "arrow":
        try:
            return datasets.concatenate_datasets([datasets.Dataset.from_file(file) for file in files])
        except ArrowInvalid:
            pass  # Arrow's file format instead of its stream format; it is converted below
    base = re.match(r"\w*", split).group() or "train"
    return datasets.load_dataset(builder, data_files={base: files}, split=split)
