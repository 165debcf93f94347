"""Settings of the right kind: lists, mappings and switches, or an error that names the key."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

SWITCHES = ("image_tiles_alone", "gradient_checkpointing", "keep_best")


def check_stage_kinds(stage: Mapping, prefix: str) -> None:
    """Raise ValueError for a stage's key that holds another kind of thing than it can mean."""
    for key in ("parts", "fresh", "drops"):
        _check(_is_list(stage[key], str), f"{prefix}{key}", stage[key], "a list of names")
    for key in SWITCHES:
        _check(isinstance(stage[key], bool), f"{prefix}{key}", stage[key], "true or false")
    _check(isinstance(stage["train"], Mapping), f"{prefix}train", stage["train"], "{part: learning rate}")
    groups = stage["groups"]
    _check(_is_list(groups, Mapping), f"{prefix}groups", groups, "a list of {match: PATTERN, lr: LR}")
    for key, kind in (("lora", "{part: {rank: 16, ...}}"), ("connector_options", "{connector: {option: value}}")):
        value = stage[key]
        fits = value is None or (isinstance(value, Mapping) and all(isinstance(v, Mapping) for v in value.values()))
        _check(fits, f"{prefix}{key}", value, f"null or {kind}")
    size = stage["image_size"]
    fits = size is None or _is_count(size) or (_is_list(size, int) and len(size) == 2 and all(map(_is_count, size)))
    _check(fits, f"{prefix}image_size", size, "null, pixels, or [height, width]")
    grids = stage["image_tiles"]
    fits = _is_list(grids, Sequence) and all(len(grid) == 2 and all(map(_is_count, grid)) for grid in grids)
    _check(fits and len(grids) > 0, f"{prefix}image_tiles", grids, "a list of [rows, columns]")


def check_words(value: Any, key: str) -> None:
    """Raise ValueError unless a key holds a list of words."""
    _check(_is_list(value, str) and all(word.strip() for word in value), key, value, "a list of words")


def _check(fits: bool, key: str, value: Any, expected: str) -> None:
    if not fits:
        raise ValueError(f"{key}={value}: expected {expected}")


def _is_list(value: Any, kind: type) -> bool:
    is_list = isinstance(value, Sequence) and not isinstance(value, str)
    return is_list and all(isinstance(one, kind) and not (kind is Sequence and isinstance(one, str)) for one in value)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
