"""Fingerprints of the files and folders that a run reads, for the run's record and the model cards."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

HASHED_WHOLE = 2**26  # maximum size in bytes of a file that is hashed completely
END = 2**20  # number of bytes read at each end of a larger file, or of a file in a folder
FEW_FILES = 10_000  # maximum number of files in a folder whose ends are read: shards, but not a million images
MOST_FILES = 100_000  # maximum number of files in a folder that are included


def fingerprint(path: Path) -> dict:
    """Size, modification time and hash of a file or folder.

    The hash of a file covers its bytes, ``sha256``, or both ends of a large file, ``ends_sha256``. The hash of a folder
    covers the names and sizes of its files, and if there are few files, also both ends of each. Of links in a folder,
    it covers the target's path; the number of files that cannot be read is noted as ``unreadable``.
    """
    if path.is_file():
        facts = path.stat()
        found = {"bytes": facts.st_size, "modified": facts.st_mtime}
        if facts.st_size <= HASHED_WHOLE:
            return {**found, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        return {**found, "ends_sha256": hashlib.sha256(b"".join(_ends(path, facts.st_size))).hexdigest()}
    digest, count, size, modified, unreadable = hashlib.sha256(), 0, 0, 0.0, 0
    few: list[tuple[Path, int]] = []
    for file, facts in _files(path):
        digest.update(f"{file.relative_to(path)} {facts.st_size}\n".encode(errors="replace"))
        count, size, modified = count + 1, size + facts.st_size, max(modified, facts.st_mtime)
        if stat.S_ISLNK(facts.st_mode):
            digest.update(os.fsencode(os.readlink(file)))
        elif count <= FEW_FILES:
            few.append((file, facts.st_size))
        if count == MOST_FILES:
            break
    for file, bytes_in_it in few if count <= FEW_FILES else ():
        try:
            for end in _ends(file, bytes_in_it):
                digest.update(end)
        except OSError:
            unreadable += 1
    found = {"files": count, "bytes": size, "modified": modified, "sha256": digest.hexdigest()}
    return {**found, **({"unreadable": unreadable} if unreadable else {})}


def same_content(before: Mapping, now: Mapping) -> bool:
    """Whether two fingerprints are of equal files or folders, whatever their paths and modification times are."""
    return {**before, "modified": 0} == {**now, "modified": 0}


def short_hash(record: Mapping) -> str:
    """The first digits of a record's hash."""
    return (record.get("sha256") or record["ends_sha256"])[:16]


def _ends(file: Path, size: int) -> Iterator[bytes]:
    with open(file, "rb") as data:
        yield data.read(END)
        data.seek(max(END, size - END))
        yield data.read(END)


def _files(folder: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """The regular files and the links in a folder, in the order of their names; links are not followed."""
    for parent, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            file = Path(parent, name)
            with suppress(OSError):  # the file was removed meanwhile
                facts = file.lstat()
                if stat.S_ISREG(facts.st_mode) or stat.S_ISLNK(facts.st_mode):
                    yield file, facts
