"""MIMIC-IT (Li et al., 2023): instructions about images, each after related ones as examples.

instructions  {"data": {id: {"instruction", "answer", "image_ids": [id], "rel_ins_ids": [id]}}}
images        {id: base64} in JSON, Parquet with the columns of an id and `base64`, or a folder of files named by id
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

from ..errors import shown
from ..files import read_object
from .encoded import Encoded
from .file_index import read_span, stamp_of
from .images import EncodedImage, ImageFolder, ImageInFile
from .indexed_json import JsonObject
from .record_reader import record_name
from .records import IMAGE_MARK, BadSample, Conversation, Turn

_EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", "")
_URL_SAFE = str.maketrans("-_", "+/")


@dataclass(frozen=True)
class _InJson(ImageInFile):
    """An image in base64, within a JSON file."""

    def open(self) -> BinaryIO:
        text = json.loads(read_span(self.file, self.offset, self.length))
        return BytesIO(base64.b64decode(text.translate(_URL_SAFE), validate=True))

    ends = Encoded.ends


class MimicIT:
    """The instructions of a file as a sequence of conversations, with the related instructions as the first exchanges.

    images: the file or folder of the images. related: a JSON file that lists, for each instruction to train on, those
    before it; None for all instructions and their ``rel_ins_ids``. examples: maximum number of related instructions,
    of which the last ones are kept; None for all.

    An exchange shows its images unless they are those of the exchange before it. The instructions are kept in memory.
    Raises ValueError if the files cannot be read; a broken instruction raises BadSample when it is accessed.
    """

    def __init__(self, path: str | Path, images: str | Path | None, related: str | Path | None, examples: int | None):
        self.name, self.examples = Path(path).name, examples
        self.instructions = _object(read_object(Path(path)).get("data"), path, "'data'", "instructions")
        self.related = (
            None if related is None else _object(read_object(Path(related)), related, "the file", "related IDs")
        )
        self.ids = list(self.instructions if self.related is None else self.related)
        if not self.ids:
            raise ValueError(f"{path if related is None else related} is empty: no instructions")
        self.images = _open_images(images)
        given = [Path(file) for file in (path, related, *self.images.files) if file is not None]
        self.identity = tuple((str(file.resolve()), stamp_of(file)) for file in given)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Conversation:
        id = self.ids[index]
        name = record_name(f"{self.name} instruction {index}", id)
        before = self._value(id, "rel_ins_ids", list, name) if self.related is None else self.related[id]
        if not isinstance(before, list):
            raise BadSample(f"{name}: the related instructions must be a list of ids, got {shown(before)}")
        if self.examples is not None:
            before = before[max(0, len(before) - self.examples) :]
        turns, media, last = [], [], []
        for each in (*before, id):
            own = self._value(each, "image_ids", list, name)
            new = [] if own == last else own
            if not all(isinstance(image, str) for image in own):
                what = f"'image_ids' of the instruction {shown(each)}"
                raise BadSample(f"{name}: {what} must be strings, got {shown(own)}")
            media += [self.images.read(image, name) for image in new]
            question = self._value(each, "instruction", str, name).replace(IMAGE_MARK, "").strip()
            turns.append(Turn("user", IMAGE_MARK * len(new) + question))
            turns.append(Turn("assistant", self._value(each, "answer", str, name)))
            last = own
        return Conversation(name, tuple(turns), media)

    def _value(self, id: object, key: str, kind: type, name: str) -> list | str:
        entry = self.instructions.get(id) if isinstance(id, str) else None
        if not isinstance(entry, Mapping):
            raise BadSample(f"{name}: the data has no instruction {shown(id)}")
        value = entry.get(key)
        if value is None and kind is list:
            return []
        if not isinstance(value, kind):
            what = "a list" if kind is list else "a string"
            raise BadSample(f"{name}: '{key}' of the instruction {shown(id)} must be {what}, got {shown(value)}")
        return value


def _object(value: object, file: str | Path, what: str, values: str) -> Mapping:
    if not isinstance(value, Mapping):
        raise ValueError(f"data file {file}: {what} must map instruction IDs to {values}, got {shown(value)}")
    return value


class _Folder:
    """Images in a folder, in files that are named by their ids."""

    def __init__(self, folder: str | Path | None):
        self.folder, self.files = ImageFolder(folder), ()

    def read(self, id: str, name: str) -> EncodedImage:
        images = [self.folder.read(f"{id}{extension}", f"'{id}'", name) for extension in _EXTENSIONS]
        return next((image for image in images if image.path.is_file()), images[0])


class _Json:
    """Images in a JSON file, in base64 by their ids."""

    def __init__(self, file: str | Path):
        self.table, self.files = JsonObject(file), (Path(file),)

    def read(self, id: str, name: str) -> EncodedImage:
        return _InJson(self.table.file, *self.table.spans[_known(id, self.table.spans, name)], id)


class _Parquet:
    """Images in a Parquet file, in base64 in the column ``base64``."""

    def __init__(self, file: str | Path):
        from .hf_dataset import Rows

        self.rows, self.files, self.folder = Rows(str(file)), (Path(file),), ImageFolder()
        names = self.rows.features
        column = next((key for key in ("__index_level_0__", "index", "image_id", "id") if key in names), None)
        if column is None or "base64" not in names:
            raise ValueError(f"data.images={file}: expected the columns 'id' and 'base64', got {', '.join(names)}")
        ids = self.rows.rows.select_columns([column])[:][column].to_pylist()
        self.numbers = {id: number for number, id in enumerate(ids)}

    def read(self, id: str, name: str) -> EncodedImage:
        _, row = self.rows[self.numbers[_known(id, self.numbers, name)]]
        return self.folder.read(f"data:;base64,{row['base64'].translate(_URL_SAFE)}", f"'{id}'", name)


def _open_images(place: str | Path | None) -> _Folder | _Json | _Parquet:
    if place is None or Path(place).is_dir():
        return _Folder(place)
    return _Json(place) if Path(place).suffix.lower() == ".json" else _Parquet(place)


def _known(id: str, ids: Mapping, name: str) -> str:
    if id not in ids:
        raise BadSample(f"{name}: data.images has no image {shown(id)}")
    return id
