"""WebDataset: shards are tar files, in which the members with the same name form a record.

    shard-000.tar:  0001.jpg 0001.json | 0002.0.png 0002.1.png 0002.txt | ...

Headers are read once; records are then read at their offsets, so that any order and exact resuming are possible.
"""

from __future__ import annotations

import glob
import itertools
import os
import re
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..errors import first_line, printable
from .encoded import in_natural_order
from .file_index import Index, cached_index, read_span, stamp_of
from .images import ImageFolder, ImageInFile
from .indexed_json import parse_json
from .mixture import Concatenation
from .record_keys import KEYS
from .record_reader import RecordReader, record_name
from .records import BadSample, Conversation
from .video import VideoInFile

IMAGES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "jp2", "avif")
VIDEOS = ("mp4", "avi", "mov", "mkv", "webm")
UNSUPPORTED = ("mp3", "wav", "flac", "ogg", "heic")
WORDS = ("json", "txt", "caption")
MAX_IMAGE = 2**30
MAX_VIDEO = 2**36
MAX_WORDS = 16 * 2**20
"""Maximum sizes of a member in bytes."""
MAX_SHARDS = 100_000

_COMPRESSED = {b"\x1f\x8b": "gunzip", b"BZh": "bunzip2", b"\xfd7zXZ": "unxz", b"\x28\xb5\x2f\xfd": "unzstd"}
_PLAIN, _LINK, _SPECIAL, _SPARSE = range(4)
_KINDS = ("a file", "a link", "a device or other special file", "a sparse file")


class WebDataset(Concatenation):
    """Shards on a local disk, in the order of their names, as a sequence of conversations.

    path: a .tar file, a folder of .tar files, a glob, or brace notation (``shard-{000..012}.tar``).

    The members of a record share their path up to the first dot of the file name. Its images and videos are the members
    with an extension of theirs (``0001.0.jpg 0001.1.jpg 0001.mp4``, in that order). Its text is a ``.json`` with one of
    the forms of `record_reader`, a ``.txt`` or a ``.caption``. If the user's text has no mark, the images and videos
    come first.

    options: of `RecordReader`.

    Raises ValueError if a shard is missing, compressed or unreadable, or if there are no records; a broken
    record raises BadSample when it is accessed.
    """

    def __init__(self, path: str | Path, **options):
        reader = RecordReader(ImageFolder(None), **{**options, "images_first": True})
        super().__init__([_Shard(shard, reader) for shard in shard_paths(path)])
        if not len(self):
            raise ValueError(f"{path} is empty: no records")


class _Member(NamedTuple):
    name: str
    extension: str
    offset: int
    size: int
    kind: int

    @property
    def format(self) -> str:
        """The last part of the extension."""
        return self.extension.rpartition(".")[2]


class _Shard:
    """The records of one tar file."""

    def __init__(self, path: Path, reader: RecordReader):
        self.path, self.reader = path, reader
        try:
            self.stamp = stamp_of(path)
            self.index = cached_index(path, "tar", lambda: _index_shard(path))
        except OSError as error:
            raise ValueError(f"shard {path} cannot be read: {error}") from None

    def __len__(self) -> int:
        return len(self.index["records"]) - 1

    @property
    def identity(self) -> tuple:
        return str(self.path.resolve()), self.stamp

    def __getitem__(self, index: int) -> Conversation:
        members = self._members(index)
        where, id = f"{self.path.name} record {index}", _key(members[0].name)[0]
        name = record_name(where, id)
        self._check(members, name)
        image_members, video_members = (
            sorted((m for m in members if m.format in formats), key=lambda m: in_natural_order(m.extension))
            for formats in (IMAGES, VIDEOS)
        )
        words = {member.extension: member for member in members if member.extension in WORDS}
        record = self._json(words["json"], name) if "json" in words else {}
        captions = [key for key in ("txt", "caption") if key in words]
        if captions and not self.reader.has_turns(record):
            if len(captions) > 1:
                raise BadSample(f"{name}: expected one .txt or .caption, got both")
            others = {key: value for key, value in record.items() if key not in KEYS["caption"]}
            record = {**others, "caption": self._text(words[captions[0]], name)}
        if not record:
            raise BadSample(f"{name}: expected a .txt, a .caption or a .json, got none of these")
        images = tuple(ImageInFile(self.path, m.offset, m.size, m.name) for m in image_members)
        videos = tuple(VideoInFile(self.path, m.offset, m.size, m.name) for m in video_members)
        conversation = self.reader.read(record, where, id, images, videos)
        read = (*image_members, *video_members)
        others = [f".{m.extension}" for m in members if m.extension not in WORDS and m not in read]
        return replace(conversation, unused=(*conversation.unused, *others))

    def _members(self, index: int) -> list[_Member]:
        columns, members = self.index, []
        for i in range(columns["records"][index], columns["records"][index + 1]):
            start = columns["name_ends"][i - 1] if i else 0
            name = columns["names"][start : columns["name_ends"][i]].tobytes().decode("utf-8", "surrogateescape")
            place = (int(columns[key][i]) for key in ("offsets", "sizes", "kinds"))
            members.append(_Member(name, _key(name)[1], *place))
        return members

    def _check(self, members: list[_Member], name: str) -> None:
        for member in members:
            what = f"{name}: member {printable(member.name)}"
            if member.name.startswith("/") or ".." in member.name.split("/"):
                raise BadSample(f"{what} has a path that leads out of the shard")
            if member.kind != _PLAIN:
                raise BadSample(f"{what} is {_KINDS[member.kind]}")
            if member.offset + member.size > self.stamp[0]:
                raise BadSample(f"{what} is truncated: it has {member.size} bytes, but the shard ends before them")
            if member.format in UNSUPPORTED:
                raise BadSample(f"{what} is not supported: only images and videos are")
            most = MAX_WORDS if member.extension in WORDS else MAX_VIDEO if member.format in VIDEOS else MAX_IMAGE
            if member.size > most:
                raise BadSample(f"{what} has {member.size} bytes: too many")
        if len({member.extension for member in members}) < len(members):
            raise BadSample(f"{name}: two members with the same name: {printable(', '.join(m.name for m in members))}")

    def _json(self, member: _Member, name: str) -> dict:
        record = parse_json(self._bytes(member), f"{name}: member {printable(member.name)}")
        if not isinstance(record, dict):
            raise BadSample(
                f"{name}: member {printable(member.name)} must contain an object, got {type(record).__name__}"
            )
        return record

    def _text(self, member: _Member, name: str) -> str:
        try:
            return self._bytes(member).decode("utf-8")
        except UnicodeDecodeError as error:
            raise BadSample(f"{name}: member {printable(member.name)} is not valid UTF-8: {error.reason}") from None

    def _bytes(self, member: _Member) -> bytes:
        data = read_span(self.path, member.offset, member.size, self.stamp)
        return data.removeprefix(b"\xef\xbb\xbf")


class JsonShard(_Shard):
    """The ``.json`` of each record of one tar file, with the name of the record."""

    def __init__(self, path: Path):
        super().__init__(path, RecordReader(ImageFolder(None)))

    def __getitem__(self, index: int) -> tuple[str, dict]:
        members = self._members(index)
        name = record_name(f"{self.path.name} record {index}", _key(members[0].name)[0])
        self._check(members, name)
        found = next((member for member in members if member.extension == "json"), None)
        if found is None:
            raise BadSample(f"{name}: expected a .json, got {', '.join(printable(m.name) for m in members)}")
        return name, self._json(found, name)


def _key(name: str) -> tuple[str, str]:
    """The record of a member and its extension in lower case; the extension is empty if there is no record."""
    folder, _, file = name.removeprefix("./").rpartition("/")
    stem, _, extension = file.partition(".")
    return (f"{folder}/{stem}" if folder else stem), extension.lower() if stem else ""


def _index_shard(path: Path) -> Index:
    """Names, offsets and kinds of a shard's members, in the order of their records. Raises ValueError."""
    head = read_span(path, 0, 6)
    for magic, program in _COMPRESSED.items():
        if head.startswith(magic):
            raise ValueError(
                f"shard {path} is compressed, so records cannot be read by offset: unpack it with {program}"
            )
    members = _read_headers(path)
    records: dict[str, list[int]] = {}
    for i, member in enumerate(members):
        records.setdefault(_key(member.name)[0], []).append(i)
    ordered = [members[i] for i in itertools.chain.from_iterable(records.values())]
    names = [member.name.encode("utf-8", "surrogateescape") for member in ordered]
    return {
        "records": np.cumsum([0, *(len(own) for own in records.values())], dtype=np.int64),
        "names": np.frombuffer(b"".join(names), np.uint8),
        "name_ends": np.cumsum([len(name) for name in names], dtype=np.int64),
        "offsets": np.array([member.offset for member in ordered], np.int64),
        "sizes": np.array([member.size for member in ordered], np.int64),
        "kinds": np.array([member.kind for member in ordered], np.uint8),
    }


def _read_headers(path: Path) -> list[_Member]:
    size, end, members = path.stat().st_size, 0, []
    try:
        with tarfile.open(path, "r:", encoding="utf-8", errors="surrogateescape") as tar:
            while (header := tar.next()) is not None:
                tar.members.clear()  # otherwise all headers stay in memory
                if header.size < 0 or tar.offset <= end:
                    raise ValueError("a negative size")
                end = tar.offset
                extension = _key(header.name)[1]
                if not header.isdir() and extension:
                    members.append(
                        _Member(header.name, extension, header.offset_data, min(header.size, 2**62), _kind(header))
                    )
                if end > size:
                    return members  # truncated; accessing the last record raises an error
            end = tar.offset
    except Exception as error:  # malformed headers can raise any exception
        raise ValueError(f"shard {path} has no readable tar header at byte {end}: {first_line(error)}") from None
    if read_span(path, end, tarfile.BLOCKSIZE).strip(b"\0"):
        raise ValueError(f"shard {path} has no readable tar header at byte {end}")
    return members


def _kind(header: tarfile.TarInfo) -> int:
    if header.issparse():
        return _SPARSE
    if header.isreg():
        return _PLAIN
    return _LINK if header.islnk() or header.issym() else _SPECIAL


def shard_paths(path: str | Path) -> list[Path]:
    """The sorted shards of a file, folder, glob or brace notation. Raises ValueError if one is missing."""
    text = os.fspath(path)
    if re.match(r"pipe:|[a-z][a-z0-9+.-]*://", text, re.IGNORECASE):
        raise ValueError(f"{text}: shards must be on a local disk; copy them there and set the path of the folder")
    if os.path.isdir(text):
        shards = sorted(Path(text).rglob("*.tar"))
        if not shards:
            raise ValueError(f"{text} contains no .tar files; unpack compressed files to .tar first")
        return shards
    if os.path.isfile(text):
        return [Path(text)]
    shards = []
    for name in expand_braces(text):
        found = [name] if os.path.isfile(name) else sorted(glob.glob(name, recursive=True))
        if not found:
            raise ValueError(f"shard {name} does not exist" + (f" (of {text})" if name != text else ""))
        shards += found
    return [Path(shard) for shard in shards]


def expand_braces(text: str) -> list[str]:
    """Expand ``a-{08..10}`` and ``{train,extra}`` like a shell."""
    pieces = re.split(r"\{([^{}]*)\}", text)
    choices = [[piece] if i % 2 == 0 else _expand_brace(piece, text) for i, piece in enumerate(pieces)]
    if np.prod([float(len(choice)) for choice in choices]) > MAX_SHARDS:
        raise ValueError(f"{text} expands to more than {MAX_SHARDS} shards")
    return ["".join(choice) for choice in itertools.product(*choices)]


def _expand_brace(inside: str, text: str) -> list[str]:
    if bounds := re.fullmatch(r"(\d+)\.\.(\d+)", inside):
        first, last = bounds.groups()
        width = max(len(first), len(last)) if "0" in (first[0] * (len(first) > 1), last[0] * (len(last) > 1)) else 0
        if not 0 <= int(last) - int(first) < MAX_SHARDS:
            raise ValueError(f"{text}: {{{inside}}} must count upwards and give at most {MAX_SHARDS} shards")
        return [f"{number:0{width}d}" for number in range(int(first), int(last) + 1)]
    if "," not in inside:
        raise ValueError(f"{text}: expected {{first..last}} or {{one,other}}, got {{{inside}}}")
    return inside.split(",")
