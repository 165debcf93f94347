"""Random access to the records of a JSON or JSONL file; only their byte offsets are held in memory."""

from __future__ import annotations

import json
import re
import stat
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ..errors import first_line
from .file_index import Index, cached_index, read_span, stamp_of, unpacked
from .records import BadSample

LINES = (".jsonl", ".ndjson")
CHUNK = 4 * 2**20
MAX_RECORD = 256 * 2**20
"""Maximum size of one record of a JSON array in bytes."""

_BOM = b"\xef\xbb\xbf"
_SPACE = re.compile(r"[ \t\n\r]*")
_SPACES = np.frombuffer(b" \t\r", np.uint8)


class IndexedJson:
    """A sequence of JSON values: the lines of a .jsonl file, or the elements of the array in any other file.

    A .gz file is unpacked once, into the cache folder.

    Raises ValueError if the file is missing, unreadable or empty, or if its array is broken. A single broken record
    (a line that is not JSON, bytes that are not UTF-8) raises BadSample when it is accessed.
    """

    def __init__(self, file: str | Path):
        self.file, given = Path(file), Path(file)
        is_packed = given.suffix.lower() == ".gz"
        self.has_lines = (given.with_suffix("") if is_packed else given).suffix.lower() in LINES
        build = self._index_lines if self.has_lines else self._index_array
        try:
            if not stat.S_ISREG(self.file.stat().st_mode):
                raise ValueError(f"data file {self.file} cannot be read: it is not a regular file")
            if is_packed:
                self.file = unpacked(given)
            self.stamp = stamp_of(self.file)
            index = cached_index(self.file, "lines" if self.has_lines else "array", build)
        except FileNotFoundError:
            raise ValueError(f"data file {self.file} does not exist") from None
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"data file {self.file} cannot be read: {error}") from None
        self._starts, self._ends, self._lines = index["starts"], index["ends"], index.get("lines")
        if not len(self):
            raise ValueError(f"data file {self.file} is empty: no records")

    def __len__(self) -> int:
        return len(self._starts)

    def name(self, index: int) -> str:
        """Name of a record in messages."""
        return f"{self.file.name} record {index}"

    def __getitem__(self, index: int) -> object:
        start, end = int(self._starts[index]), int(self._ends[index])
        where = self.name(index)
        if self._lines is not None:
            where += f" (line {self._lines[index]})"
        return parse_json(read_span(self.file, start, end - start, self.stamp), where)

    def _index_lines(self) -> Index:
        starts, ends, firsts, position, at_start = [], [], [], 0, True
        with open(self.file, "rb") as file:
            if file.read(len(_BOM)) == _BOM:
                position = len(_BOM)
            file.seek(position)
            while chunk := file.read(CHUNK):
                data = np.frombuffer(chunk, np.uint8)
                breaks = np.flatnonzero(data == ord("\n"))
                begins = np.concatenate([[0] if at_start else [], breaks + 1]).astype(np.int64)
                at_start = len(begins) > 0 and begins[-1] == len(data)
                begins = begins[: len(begins) - at_start]
                starts.append(begins + position)
                firsts.append(data[begins])
                ends.append(breaks + position)
                position += len(chunk)
        starts, ends, firsts = (np.concatenate(parts or [np.zeros(0, np.int64)]) for parts in (starts, ends, firsts))
        if len(ends) < len(starts):
            ends = np.append(ends, position)
        filled = starts < ends
        for line in np.flatnonzero(filled & np.isin(firsts, _SPACES)):
            filled[line] = bool(read_span(self.file, starts[line], ends[line] - starts[line]).strip(b" \t\r"))
        return {"starts": starts[filled], "ends": ends[filled], "lines": np.flatnonzero(filled) + 1}

    def _index_array(self) -> Index:
        with open(self.file, "rb") as file:
            bounds = np.fromiter(_ArrayScanner(self.file, file).elements(), np.dtype((np.int64, 2)))
        return {"starts": bounds[:, 0], "ends": bounds[:, 1]}


class JsonObject:
    """The strings of a JSON object by name; only their offsets and lengths in bytes (`spans`) are held in memory.

    Raises ValueError if the file cannot be read or does not contain such an object.
    """

    def __init__(self, file: str | Path):
        self.file = Path(file)
        try:
            self.stamp = stamp_of(self.file)
            index = cached_index(self.file, "object", self._index)
        except OSError as error:
            raise ValueError(f"data file {self.file} cannot be read: {error}") from None
        names = index["names"].tobytes().decode("utf-8").split("\0")
        self.spans = {name: (start, end - start) for name, (start, end) in zip(names, index["bounds"].tolist())}

    def _index(self) -> Index:
        with open(self.file, "rb") as file:
            found = list(_ObjectScanner(self.file, file).members())
        names = "\0".join(name for name, *_ in found).encode()
        return {"names": np.frombuffer(names, np.uint8), "bounds": np.array([bounds for _, *bounds in found], np.int64)}


def parse_json(data: bytes, where: str) -> object:
    """Parse UTF-8 bytes as JSON; numbers too long for Python become infinite. Raises BadSample, naming `where`."""
    try:
        return _decoder.decode(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise BadSample(f"{where} is not valid UTF-8: {error.reason} at byte {error.start}") from None
    except RecursionError:
        raise BadSample(f"{where} is not valid JSON: nested too deeply") from None
    except ValueError as error:
        raise BadSample(f"{where} is not valid JSON: {first_line(error)}") from None


def _integer(digits: str) -> int | float:
    try:
        return int(digits)
    except ValueError:  # more digits than Python converts to an int
        return float(digits)


_decoder = json.JSONDecoder(parse_int=_integer)
_CUT = 16
"""Number of characters at the end of a chunk that may be part of a longer number, literal or escape."""
_skimmer = json.JSONDecoder(parse_int=len, parse_float=len)
"""Decoder used to find where a value ends; it does not convert numbers."""


class _ArrayScanner:
    """Finds the elements of a JSON array with one chunk of the file in memory at a time.

    The structural characters of JSON are ASCII, so bytes are read as Latin-1, one character per byte, whatever the
    encoding of the text is.
    """

    def __init__(self, path: Path, file: BinaryIO):
        self.path, self.file = path, file
        self.text, self.position = "", 0
        has_mark = file.read(len(_BOM)) == _BOM
        self.base = file.seek(len(_BOM) if has_mark else 0)  # offset in the file of text[0]
        self.at_end = False
        self.count = 0

    def elements(self) -> Iterator[tuple[int, int]]:
        """Start and end of each element, in bytes. Raises ValueError if the array is broken."""
        opening = self._next()
        if opening == "":
            return
        if opening != "[":
            self._refuse_top_level(opening)
        self.position += 1
        if self._next() != "]":
            while True:
                if self._next() == "]":
                    raise self._broken("a comma without a record after it")
                yield self._element()
                self.count += 1
                if self._end_of_element("]"):
                    break
        self.position += 1
        if self._next() != "":
            raise self._broken("unexpected content after the end of the list")

    def _end_of_element(self, closing: str) -> bool:
        """Whether the list or object ends after an element; else, the comma is skipped."""
        behind = self._next()
        if behind not in (closing, ","):
            got = repr(behind) if behind else "the end of the file"
            raise self._broken(f"expected ',' or '{closing}' after the previous record, got {got}")
        self.position += behind == ","
        return behind == closing

    def _element(self) -> tuple[int, int]:
        while True:
            try:
                _, end = _skimmer.raw_decode(self.text, self.position)
                if end + _CUT <= len(self.text) or self.at_end:  # else a number may continue
                    break
            except json.JSONDecodeError as error:
                # a value that is only cut by the chunk fails at the end, or at the opening quote of its last string
                is_cut = error.pos + _CUT > len(self.text) or error.msg.startswith("Unterminated string")
                if self.at_end or not is_cut:
                    raise self._broken(error.msg, error.pos) from None
            except RecursionError:
                raise self._broken("nested too deeply") from None
            if len(self.text) - self.position > MAX_RECORD:
                raise self._broken(f"it does not end within {MAX_RECORD // 2**20} MiB")
            self._fill()
        start, self.position = self.position, end
        return self.base + start, self.base + end

    def _next(self) -> str:
        """Peek at the next character that is not white space; empty at the end of the file."""
        while True:
            self.position = _SPACE.match(self.text, self.position).end()
            if self.position < len(self.text) or self.at_end:
                return self.text[self.position : self.position + 1]
            self._fill()

    def _fill(self) -> None:
        rest = self.text[self.position :]
        chunk = self.file.read(max(CHUNK, len(rest)))  # doubling limits how often a long record is rescanned
        self.text, self.base, self.position = rest + chunk.decode("latin-1"), self.base + self.position, 0
        self.at_end = not chunk

    def _broken(self, reason: str, position: int | None = None) -> ValueError:
        byte = self.base + (self.position if position is None else position)
        return ValueError(f"data file {self.path} is not valid JSON: record {self.count}, byte {byte}: {reason}")

    def _refuse_top_level(self, opening: str) -> None:
        kinds = {"{": "an object", '"': "a string", "n": "null"}
        hint = f"; if each line is a record, rename the file to {self.path.stem}.jsonl" if opening == "{" else ""
        raise ValueError(
            f"data file {self.path} must contain a list of records, got {kinds.get(opening, repr(opening))} "
            f"at byte {self.base + self.position}{hint}"
        )


class _ObjectScanner(_ArrayScanner):
    """Finds the members of a JSON object whose values are strings, in the same way."""

    def members(self) -> Iterator[tuple[str, int, int]]:
        """Name, and start and end of the value in bytes. Raises ValueError if the object is broken."""
        if self._next() != "{":
            raise ValueError(f"data file {self.path} must be a JSON object that maps image IDs to base64 strings")
        self.position += 1
        while self._next() != "}":
            name = self._string()
            if self._next() != ":":
                raise self._broken("expected ':' after a name")
            self.position += 1
            self._next()
            start = self.base + self.position
            self._string()
            yield name, start, self.base + self.position
            self.count += 1
            if self._end_of_element("}"):
                return

    def _string(self) -> str:
        if self._next() != '"':
            raise self._broken(f"expected a string, got {self._next()!r}")
        start, end = self._element()
        return json.loads(self.text[start - self.base : end - self.base].encode("latin-1"))
