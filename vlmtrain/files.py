"""Files and folders that are written whole or not at all, and JSON that is read back."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .errors import first_line


def make_folder(folder: Path, named: str) -> None:
    """Make a folder unless it is there. Raises ValueError, saying how the line named it, if it cannot be written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
    except OSError as error:
        raise ValueError(f"{named} is no folder that can be written to: {error}") from None


def check_new_folder(folder: Path, named: str) -> None:
    """Raise ValueError unless `folder` can be written: it is empty or not there, and what it stands in can be."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists already: choose another folder")
    make_folder(folder.parent, f"{named} {folder}: {folder.parent}")


def replace_text(file: Path, text: str) -> None:
    """Write a whole file or nothing of it, on the disk when this returns."""
    partial = file.with_name(file.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    sync(partial)
    partial.replace(file)
    sync(file.parent)


def write_json(file: Path, value: Mapping | list) -> None:
    """Write a whole JSON file or nothing of it."""
    replace_text(file, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(file: Path) -> Any:
    """The content of a JSON file that vlmtrain wrote. Raises ValueError if it is missing or broken."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{file} is missing: the folder is not complete") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} is not valid JSON: {first_line(error)}") from None


def sync(*paths: Path) -> None:
    """Have what was written to files and folders on the disk."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def link_or_copy(source: str, target: str) -> None:
    """The same file under another name, where the file system allows; otherwise a copy."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def replace_folder(partial: Path, target: Path) -> None:
    """Put the folder `partial` in the place of `target`, which is there whole, old or new, whatever happens.

    `restore_folder` mends what a kill between the two renames leaves.
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
    """Give `target` its place back if a kill came just as it was being replaced."""
    if _aside(target).exists() and not target.exists():
        _aside(target).rename(target)
        sync(target.parent)


def _aside(target: Path) -> Path:
    return target.with_name(f"{target.name}.old")
