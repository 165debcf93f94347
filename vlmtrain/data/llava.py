"""LLaVA's JSON format: ``[{"id", "image", "conversations": [{"from": "human"|"gpt", "value"}]}]``."""

from __future__ import annotations

import json
from pathlib import Path

from .images import ImageOnDisk
from .records import BadSample, Conversation, Turn

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


class LlavaJson:
    """A LLaVA file (JSON, or JSONL with one record a line) as a sequence of conversations.

    images: the folder that the records' ``image`` paths start from; None if no record has a picture.
    Records without ``image`` are text-only; a list of images serves several marks.

    Raises ValueError if the file or the folder is missing, unreadable or empty; a single broken record
    raises BadSample when it is asked for.
    """

    def __init__(self, file: str | Path, images: str | Path | None):
        self.file = Path(file)
        self.images = Path(images) if images is not None else None
        if self.images is not None and not self.images.is_dir():
            raise ValueError(f"data.images={images} is not a folder")
        self.records = _read_records(self.file)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Conversation:
        record = self.records[index]
        where = f"{self.file.name} record {index}"
        if not isinstance(record, dict):
            raise BadSample(f"{where}: expected an object, got {type(record).__name__}")
        name = f"{where} (id {record['id']})" if "id" in record else where
        turns = tuple(self._turn(turn, name) for turn in self._list(record, "conversations", name))
        return Conversation(name, turns, self._pictures(record, name))

    @staticmethod
    def _list(record: dict, key: str, name: str) -> list:
        value = record.get(key)
        if not isinstance(value, list) or not value:
            raise BadSample(f"{name}: '{key}' must be a list that is not empty, got {value!r:.60}")
        return value

    @staticmethod
    def _turn(turn: object, name: str) -> Turn:
        if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
            raise BadSample(f"{name}: a turn must be an object with 'from' and a 'value' text, got {turn!r:.60}")
        role = ROLES.get(turn.get("from")) if isinstance(turn.get("from"), str) else None
        if role is None:
            raise BadSample(f"{name}: 'from' must be one of {', '.join(ROLES)}, got {turn.get('from')!r:.60}")
        return Turn(role, turn["value"])

    def _pictures(self, record: dict, name: str) -> tuple[ImageOnDisk, ...]:
        paths = record.get("image")
        if paths is None:
            return ()
        paths = paths if isinstance(paths, list) else [paths]
        if not all(isinstance(path, str) and path for path in paths):
            raise BadSample(f"{name}: 'image' must be a path or a list of paths, got {record['image']!r:.60}")
        if self.images is None:
            raise BadSample(f"{name}: the record has a picture, but data.images is not set")
        return tuple(self._picture(path, name) for path in paths)

    def _picture(self, path: str, name: str) -> ImageOnDisk:
        if Path(path).is_absolute() or ".." in Path(path).parts:
            raise BadSample(f"{name}: image path {path!r} leads out of data.images")
        return ImageOnDisk(self.images / path)


def _read_records(file: Path) -> list:
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ValueError(f"data file {file} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"data file {file} cannot be read: {error}") from None
    if file.suffix == ".jsonl":
        records = [_read_line(file, i, line) for i, line in enumerate(text.split("\n")) if line.strip()]
    else:
        try:
            records = json.loads(text) if text.strip() else []
        except json.JSONDecodeError as error:
            raise ValueError(f"data file {file} is not valid JSON: {error}") from None
    if not isinstance(records, list):
        raise ValueError(f"data file {file} must hold a list of records, got {type(records).__name__}")
    if not records:
        raise ValueError(f"data file {file} is empty: no records")
    return records


def _read_line(file: Path, number: int, line: str) -> object:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"data file {file} line {number + 1} is not valid JSON: {error}") from None
