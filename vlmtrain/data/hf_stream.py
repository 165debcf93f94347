"""Hugging Face datasets that are streamed: their files are read in order, as they are needed, and not stored."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..errors import first_line
from .hf_dataset import RowReader, load_split
from .records import Conversation, Stream, StreamError

if TYPE_CHECKING:
    from pyarrow import Table

BUFFER = 1000  # records that are shuffled with each other unless `shuffle_buffer` is set, as in the library
CHUNK = 64  # records per table


class HFStream(Stream):
    """A split of a dataset as an endless stream of conversations: one pass over the split after the other.

    In each pass, the order of the files and the records within a buffer of `buffer` records are shuffled by `seed`.
    Record i is the i-th record of this order, in every process. To read it, all records before it are read and
    discarded; reading an earlier one than before starts again from the front.

    samples: number of records per epoch; the next epoch continues where the last one stopped. The other arguments are
    those of `HFDataset`, but saved folders, Arrow files, slices of a split and lists of captions are not supported.

    Raises ValueError if the dataset cannot be streamed or its columns are ambiguous. A broken record raises BadSample
    when it is accessed; an unreadable file and a buffer of more than 2 GiB raise StreamError.
    """

    def __init__(
        self,
        path: str | Path,
        split: str,
        name: str | None,
        columns: Mapping[str, str | None] | None,
        images: str | Path | None,
        outside: bool,
        samples: int,
        buffer: int,
        seed: int,
        **options,
    ):
        self.path, self.name, self.samples, self.buffer, self.seed = str(path), Path(path).name, samples, buffer, seed
        data = load_split(os.fspath(path), split, name, streaming=True)
        if data.features is None:
            raise ValueError(f"dataset {path} cannot be streamed: the types of its columns are not known in advance")
        self.reader = RowReader(data, path, columns, images, outside, **options)
        if self.reader.has_caption_lists:
            raise ValueError(
                f"columns.caption={self.reader.columns['caption']} of {path} contains lists of captions, which "
                "streaming=true does not support"
            )
        # in Arrow format, so that skipped records are not converted and images stay encoded
        self._data = data.select_columns(list(self.reader.features)).with_format("arrow")
        try:
            first = next(self._data.iter(batch_size=1), None)
        except Exception as error:  # the library, the network and broken files can raise any exception
            raise ValueError(f"dataset {path} cannot be loaded: {first_line(error)}") from None
        if first is None:
            raise ValueError(f"dataset {path} is empty: no records")
        # by process: a forked worker can neither use nor close the iterator of its parent, which has threads
        self._cursors: dict[int, _Cursor] = {}

    @property
    def note(self) -> str:
        return (
            f"{self.path} is streamed: records are shuffled only within a buffer of {self.buffer:,}, and an epoch is "
            f"the next {self.samples:,} records. Every data worker of every rank reads the whole stream. A resumed run "
            "reads it again from the front, and continues exactly if the files and the version of datasets are the same"
        )

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_cursors": {}}

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> Conversation:
        if index < 0:
            raise IndexError(index)
        cursor = self._cursors.get(os.getpid())
        if cursor is None or index < cursor.start:
            cursor = self._cursors[os.getpid()] = _Cursor(self._tables())
        try:
            table = cursor.advance(index)
        except Exception as error:  # the library, the network and broken files can raise any exception
            del self._cursors[os.getpid()]  # an iterator ends with its first exception
            if "offset overflow" in str(error):
                raise StreamError(
                    f"shuffle_buffer={self.buffer}: so many records of {self.path} are more than the 2 GiB that the "
                    "library shuffles at once: set a smaller one"
                ) from None
            if "Couldn't cast" in str(error):
                raise StreamError(
                    f"dataset {self.path} cannot be read beyond record {cursor.end} of its stream: the files have "
                    "different columns, or different types in one column"
                ) from None
            raise StreamError(
                f"dataset {self.path} cannot be read beyond record {cursor.end} of its stream: {first_line(error)}; if "
                "the cause was temporary, run the same command again"
            ) from None
        where = f"{self.name} record {index} of the stream"
        return self.reader.read(self.reader.record(lambda: table, where), where)

    def close(self) -> None:
        self._cursors.pop(os.getpid(), None)

    def _tables(self) -> Iterator[Table]:
        for number in count():
            # not set_epoch: the library shares its value with all worker processes
            generator = np.random.default_rng([self.seed, number])
            # not iter(): in a worker process, the library would read only a share of the files
            yield from self._data.shuffle(generator=generator, buffer_size=self.buffer).iter(batch_size=CHUNK)


class _Cursor:
    """A position in a stream: the table with the records from `start` to ``end - 1``."""

    def __init__(self, tables: Iterator[Table]):
        self._tables, self._table = tables, None
        self.start = self.end = 0

    def advance(self, index: int) -> Table:
        """The row of a record that is not before `start`."""
        while index >= self.end:
            self._table = next(self._tables)
            self.start, self.end = self.end, self.end + len(self._table)
        return self._table.slice(index - self.start, 1)
