"""The package's own YAML files, parsed once per process: composing a command reads some seventy of them."""

from __future__ import annotations

import functools
import os
import pickle
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from vlmtrain.settings.locations import CONFIGS, RECIPES

FOLDERS = tuple(f"{Path(folder).resolve()}{os.sep}" for folder in (CONFIGS, RECIPES))
_load = OmegaConf.load


@functools.cache
def _parsed(path: str, changed: int, size: int) -> bytes:
    return pickle.dumps(_load(path))


def load(file: Any) -> Any:
    """`OmegaConf.load`, which returns a separate copy to each caller."""
    path = os.path.realpath(file if isinstance(file, str | Path) else getattr(file, "name", ""))
    if not path.startswith(FOLDERS):
        return _load(file)
    facts = os.stat(path)
    return pickle.loads(_parsed(path, facts.st_mtime_ns, facts.st_size))


def parse_once() -> None:
    """Let `OmegaConf.load` parse each file of the package once, until it changes."""
    OmegaConf.load = staticmethod(load)


def parse_all() -> None:
    """Parse them all now, for the forks of this process."""
    for folder in FOLDERS:
        for path in Path(folder).rglob("*.yaml"):
            load(path)
