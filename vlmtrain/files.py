"""Atomic writes of files and folders, and reading and writing of JSON."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import first_line


def make_folder(folder: Path, named: str) -> None:
    """Create a folder unless it exists. Raises ValueError, starting with `named`, if it is not writable."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
    except OSError as error:
        raise ValueError(f"{named} is not a writable folder: {error}") from None


def check_new_folder(folder: Path, named: str) -> None:
    """Raise ValueError unless `folder` can be created: it must be empty or absent, and its parent must be writable."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} already exists: choose another folder")
    make_folder(folder.parent, f"{named} {folder}: {folder.parent}")


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yield a path next to `folder`; what is written there becomes `folder`, unless an error is raised."""
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    yield partial
    if folder.exists():
        folder.rmdir()
    partial.rename(folder)


def replace_text(file: Path, text: str) -> None:
    """Write a text file atomically. The file is synced to disk when this returns."""
    partial = file.with_name(file.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    sync(partial)
    partial.replace(file)
    sync(file.parent)


def write_json(file: Path, value: Mapping | list) -> None:
    """Write a JSON file atomically."""
    replace_text(file, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def check_regular(file: Path) -> None:
    """Raise ValueError if `file` is a pipe, a device or another special file, whose reading may not end."""
    if file.exists() and not file.is_file() and not file.is_dir():
        raise ValueError(f"{file} is not a regular file")


def read_json(file: Path) -> Any:
    """Read a JSON file written by vlmtrain. Raises ValueError if it is missing or invalid."""
    check_regular(file)
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{file} is missing: the folder is incomplete") from None
    except RecursionError:
        raise ValueError(f"{file} is not valid JSON: nested too deeply") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} is not valid JSON: {first_line(error)}") from None


def read_object(file: Path) -> dict[str, Any]:
    """Read a JSON file that contains an object. Raises ValueError as `read_json` does, or if it is something else."""
    value = read_json(file)
    if not isinstance(value, dict):
        raise ValueError(f"{file} must contain an object, got {type(value).__name__}")
    return value


def sync(*paths: Path) -> None:
    """Flush files and folders to disk."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def link_or_copy(source: str, target: str) -> None:
    """Hard-link a file where the file system supports it; otherwise copy it."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def replace_folder(partial: Path, target: Path) -> None:
    """Replace `target` with the folder `partial`. The old or the new folder is always complete on disk.

    If the process is killed between the two renames, `restore_folder` recovers the old one.
    """
    old = _aside(target)
    restore_folder(target)
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    partial.rename(target)
    sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def restore_folder(target: Path) -> None:
    """Recover the old `target` if the process was killed while replacing it."""
    if _aside(target).exists() and not target.exists():
        _aside(target).rename(target)
        sync(target.parent)


def _aside(target: Path) -> Path:
    return target.with_name(f"{target.name}.old")
