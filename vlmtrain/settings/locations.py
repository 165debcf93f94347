"""Paths of the configuration groups and the recipes: in the installed package, or next to it in a checkout."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).parent.parent
_HOME = _PACKAGE if (_PACKAGE / "configs").is_dir() else _PACKAGE.parent

CONFIGS = _HOME / "configs"
RECIPES = _HOME / "recipes"
