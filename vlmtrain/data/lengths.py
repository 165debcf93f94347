"""Lengths of samples that are known without rendering them: tables on disk, shared by all processes and runs.

    $XDG_CACHE_HOME/vlmtrain/lengths/<records and rendering>.i32    one row of integers per record of a large source

Any process that renders a record writes its row, and a background process fills the rows of the records that come next.
All processes compute the same values, so they need no locks: a row of zeros is not known yet, and a row that is only
partly written does not match its checksum. Bad records have no row, so each run reads them again.
"""

from __future__ import annotations

import fcntl
import hashlib
import mmap
import os
import zlib
from collections.abc import Iterable, Sequence
from contextlib import suppress
from itertools import accumulate, islice
from multiprocessing import Process
from pathlib import Path

import numpy as np

from ..distributed.processes import die_with, ignore_stop_signals
from .file_index import cache_folder
from .mixture import Mixture
from .processor import Processor
from .records import BadSample, Conversation
from .rendered import SampleLength

SIZES = 8
"""Largest number of different image sizes of a sample in a table."""
WORTHWHILE = 4096
"""Minimum number of records of a source whose lengths are stored."""
CHUNK = 256
"""Number of samples whose texts are tokenized together."""
_MAX_SIDE = 2**15
_COLUMNS = 5 + SIZES
_VERSION = 2


class LengthTable:
    """The lengths of the records of one source.

    file: shared by all processes; None for memory that is shared with forked processes only, which is also used if the
    file cannot be written.
    """

    def __init__(self, file: Path | None, records: int):
        self.file, self.records = file, records
        self._open()

    def _open(self) -> None:
        size, memory = self.records * _COLUMNS * 4, None
        if self.file is not None:
            try:
                self.file.parent.mkdir(parents=True, exist_ok=True)
                with open(os.open(self.file, os.O_RDWR | os.O_CREAT, 0o644), "r+b") as file:
                    if os.fstat(file.fileno()).st_size != size:
                        file.truncate(size)
                        if hasattr(os, "posix_fallocate"):  # a full disk would otherwise end the process later
                            os.posix_fallocate(file.fileno(), 0, size)
                    memory = mmap.mmap(file.fileno(), size)
            except OSError:
                self.file = None
        self._rows = np.frombuffer(memory or mmap.mmap(-1, size), np.int32).reshape(self.records, _COLUMNS)

    def __getstate__(self) -> dict:
        return {"file": self.file, "records": self.records}

    def __setstate__(self, state: dict) -> None:
        self.__init__(**state)

    def __getitem__(self, index: int) -> SampleLength | None:
        row = self._rows[index].copy()
        if not row[0] or row[0] != _checksum(row):
            return None
        _, tokens, image_tokens, images, items, *sizes = row.tolist()
        return SampleLength(
            tokens, image_tokens, images, items, frozenset(divmod(size, 2**16) for size in sizes if size)
        )

    def __setitem__(self, index: int, length: SampleLength) -> None:
        """Store a length, unless it has too many or too large sizes."""
        if len(length.sizes) > SIZES or any(max(size) >= _MAX_SIDE for size in length.sizes):
            return
        row = np.zeros(_COLUMNS, np.int32)
        sizes = sorted(height * 2**16 + width for height, width in length.sizes)
        row[1 : 5 + len(sizes)] = [*length[:-1], *sizes]
        row[0] = _checksum(row)
        self._rows[index] = row

    def clear(self) -> None:
        """Remove all lengths."""
        self._rows[:] = 0


def _checksum(row: np.ndarray) -> int:
    return zlib.crc32(row[1:]) >> 1 | 1


class Lengths:
    """The tables of the sources of a mixture, by the index of a record in the mixture."""

    def __init__(self, mixture: Mixture, tables: Sequence[LengthTable]):
        assert not mixture.streams, "the number of records of a stream is not known"
        self.mixture, self.tables = mixture, tables
        self._starts = [0, *accumulate(table.records for table in tables)]

    @property
    def are_stored(self) -> bool:
        """Whether some of the tables are files, which other processes and runs share."""
        return any(table.file is not None for table in self.tables)

    def __getitem__(self, index: int) -> SampleLength | None:
        number = self.mixture.source_number(index)
        return self.tables[number][index - self._starts[number]]

    def __setitem__(self, index: int, length: SampleLength) -> None:
        number = self.mixture.source_number(index)
        self.tables[number][index - self._starts[number]] = length

    def clear(self, index: int) -> None:
        """Remove the lengths of all records of the source that a record belongs to."""
        self.tables[self.mixture.source_number(index)].clear()

    def fill(self, processor: Processor, positions: Iterable[int]) -> None:
        """Find the lengths of the samples at these positions of the stream that are not known yet."""
        positions = iter(positions)
        while chunk := list(islice(positions, CHUNK)):
            read: dict[int, Conversation] = {}
            for index in map(self.mixture.draw, chunk):
                if self[index] is None:
                    with suppress(BadSample):
                        read[index] = self.mixture[index]
            for (index, conversation), length in zip(read.items(), processor.lengths(list(read.values()))):
                with suppress(BadSample):
                    self[index] = length or processor.render(conversation).length

    def fill_in_background(self, processor: Processor, positions: Iterable[int]) -> Process:
        """Run `fill` in a process that ends with this one or when it is done, and return it."""
        filling = Process(target=self._fill_alone, args=(processor, positions, os.getpid()), daemon=True)
        filling.start()
        return filling

    def _fill_alone(self, processor: Processor, positions: Iterable[int], parent: int) -> None:
        """Fill the tables in a separate process, one run after the other."""
        die_with(parent)
        ignore_stop_signals()
        os.nice(19)
        files = sorted({table.file for table in self.tables if table.file is not None})
        opened = [open(file) for file in files]  # noqa: SIM115 - the locks last as long as the process
        for file in opened:
            with suppress(OSError):  # some network file systems do not support locks
                fcntl.flock(file, fcntl.LOCK_EX)
        self.fill(processor, positions)


def open_lengths(mixture: Mixture, processor: Processor) -> Lengths | None:
    """The tables of a mixture whose records `processor` renders; None for a mixture with streams."""
    if mixture.streams:
        return None
    tables, rendering = [], None
    for name, source in mixture.sources.items():
        identity, file = mixture.identities.get(name), None
        if identity is not None and len(source) >= WORTHWHILE:
            rendering = rendering or processor.rendering_identity
            digest = hashlib.sha256(repr((_VERSION, identity, rendering)).encode()).hexdigest()
            file = cache_folder("lengths") / f"{digest[:40]}.i32"
        tables.append(LengthTable(file, len(source)))
    return Lengths(mixture, tables)
