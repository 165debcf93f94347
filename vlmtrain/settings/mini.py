"""Small choices for ``mini=true``, which tries a recipe on a laptop."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import yaml

from .locations import RECIPES

CHOICES = {"vision": "tiny", "llm": "tiny", "data": "shapes", "engine": "zero0"}
SMALL_ENCODERS = ("mini_options", "vision_options", "several", "encoders")


def with_mini(overrides: Sequence[str], config_dir: str | None = None) -> list[str]:
    """Expand ``mini=true`` to the small choices of all groups that the overrides do not set.

    A recipe with several encoders keeps ``vision=several`` if its `mini_options` have small encoders, and one without
    an encoder keeps ``vision=patches``.
    """
    split = [override.partition("=") for override in overrides]
    mini = [value for key, _, value in split if key.lstrip("+") == "mini"]
    if not mini or mini[-1].strip().lower() != "true":
        return list(overrides)
    named = {key for key, _, _ in split}
    recipes = [value for key, _, value in split if key == "recipe"]
    if recipes and _keeps_vision(recipes[-1], config_dir):
        named.add("vision")
    return [f"{group}={choice}" for group, choice in CHOICES.items() if group not in named] + list(overrides)


def _keeps_vision(recipe: str, config_dir: str | None) -> bool:
    """Whether a recipe chooses ``vision=patches``, or ``vision=several`` and has small encoders for it."""
    files = [*_with_extended(recipe, config_dir)]
    entries = (entry for file in files for entry in file.get("defaults") or () if isinstance(entry, Mapping))
    chosen = next((entry["override /vision"] for entry in entries if "override /vision" in entry), None)
    return chosen == "patches" or (chosen == "several" and any(map(_small_encoders, files)))


def _small_encoders(content: object) -> object:
    for key in SMALL_ENCODERS:
        content = content.get(key) if isinstance(content, Mapping) else None
    return content


def _with_extended(recipe: str, config_dir: str | None, extended_by: Sequence[str] = ()) -> Iterator[dict]:
    """The contents of a recipe, then those of the recipes that its defaults name."""
    folders = [*([Path(config_dir, "recipe")] if config_dir else []), RECIPES]
    file = next((file for folder in folders if (file := folder / f"{recipe}.yaml").exists()), None)
    if file is None or recipe in extended_by:
        return
    try:
        content = yaml.safe_load(file.read_text())
    except (yaml.YAMLError, UnicodeDecodeError):
        return  # Hydra reports it
    if isinstance(content, dict):
        yield content
        for entry in content.get("defaults") or ():
            if isinstance(entry, str):
                yield from _with_extended(entry, config_dir, (*extended_by, recipe))
