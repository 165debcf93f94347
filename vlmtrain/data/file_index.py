"""Reading large data files by byte offset; what is computed once per file, such as its index, is cached on disk."""

from __future__ import annotations

import contextlib
import fcntl
import gzip
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

Index = dict[str, np.ndarray]

WORTHWHILE = 16 * 2**20
"""Minimum size in bytes of a file whose index is cached."""
_VERSION = 1


def stamp_of(path: str | Path | int) -> tuple[int, int]:
    """Size and modification time of a file, given by its path or descriptor: they change if it is written."""
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns


def read_span(path: str | Path, offset: int, size: int, stamp: tuple[int, int] | None = None) -> bytes:
    """Read `size` bytes of a file from `offset`; fewer at the end of the file.

    The file is opened for each call, so nothing is shared between processes and the number of files is not limited.
    Raises ValueError if the file has changed since its `stamp` was taken: offsets into it are then wrong.
    """
    with open(path, "rb", buffering=0) as file:
        if stamp is not None and stamp_of(file.fileno()) != stamp:
            raise ValueError(f"data file {path} has changed since it was opened: run the same command again")
        parts = []
        while size > 0 and (part := os.pread(file.fileno(), size, offset)):
            parts.append(part)
            offset += len(part)
            size -= len(part)
    return b"".join(parts)


def cached_index(path: Path, kind: str, build: Callable[[], Index], least: int | None = None) -> Index:
    """Return the index that `build` makes of a file, or read it from ``$XDG_CACHE_HOME/vlmtrain/index``.

    kind: kind of index. least: indexes of files with fewer bytes are not cached (default: `WORTHWHILE`). Concurrent
    processes wait until one of them has scanned the file. A stale or broken cache is replaced; a cache that cannot be
    written is not used.
    """
    stamp = _stamp(path)
    if stamp[0] < (WORTHWHILE if least is None else least):
        return build()
    name = hashlib.sha256(os.fsencode(f"{kind}\0{path.resolve()}")).hexdigest()[:40]
    folder = cache_folder("index")
    file = folder / f"{name}.npz"
    found = _read(file, stamp)
    if found is not None:
        return found
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / f"{name[:2]}.lock", os.O_WRONLY | os.O_CREAT, 0o644)
    except OSError:
        return build()
    try:
        with contextlib.suppress(OSError):  # without locks (some network file systems), each process scans the file
            fcntl.flock(lock, fcntl.LOCK_EX)
        found = _read(file, stamp)
        if found is None:
            found = build()
            if _stamp(path) == stamp:
                _write(file, stamp, found)
        return found
    finally:
        os.close(lock)


def unpacked(path: Path) -> Path:
    """The content of a .gz file, in ``$XDG_CACHE_HOME/vlmtrain/unpacked``. Raises OSError, EOFError or zlib.error."""
    stamp = "-".join(map(str, [path.resolve(), *_stamp(path)]))
    folder = cache_folder("unpacked")
    file = folder / f"{hashlib.sha256(os.fsencode(stamp)).hexdigest()[:16]}-{path.stem}"
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        descriptor, partial = tempfile.mkstemp(dir=folder, prefix=file.stem)
        try:
            with open(descriptor, "wb") as out, gzip.open(path) as data:
                shutil.copyfileobj(data, out, 2**20)
            os.replace(partial, file)
        except BaseException:
            os.unlink(partial)
            raise
    return file


def cache_folder(name: str) -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "vlmtrain", name)


def _stamp(path: Path) -> list[int]:
    return [*stamp_of(path), _VERSION]


def _read(file: Path, stamp: list[int]) -> Index | None:
    try:
        with np.load(file, allow_pickle=False) as arrays:
            index = dict(arrays)
        return index if index.pop("stamp").tolist() == stamp else None
    except Exception:  # a damaged archive can raise any exception; the index is then built again
        return None


def _write(file: Path, stamp: list[int], index: Index) -> None:
    with contextlib.suppress(OSError):
        descriptor, temporary = tempfile.mkstemp(dir=file.parent, prefix=file.stem)
        try:
            with open(descriptor, "wb") as out:
                np.savez(out, stamp=np.array(stamp), **index)
            os.replace(temporary, file)
        except BaseException:
            os.unlink(temporary)
            raise
