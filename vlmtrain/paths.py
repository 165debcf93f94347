"""Where the configuration groups and the recipes are: in the installed package, or beside it in a checkout. Links."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

_PACKAGE = Path(__file__).parent
_HOME = _PACKAGE if (_PACKAGE / "configs").is_dir() else _PACKAGE.parent

CONFIGS = _HOME / "configs"
RECIPES = _HOME / "recipes"


def link_or_copy(source: str, target: str) -> None:
    """The same file under another name, where the file system allows; otherwise a copy."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
