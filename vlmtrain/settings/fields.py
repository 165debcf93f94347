"""Reads typed settings from plain mappings, and checks the names, types and bounds of all keys.

    @dataclass(frozen=True)
    class BadSteps:
        in_a_row: int = key(whole(1))          # consecutive bad steps that stop the run

A dataclass declares the keys of one level. `read` fills it, or raises a ValueError that names the key.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, field, fields
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

from ..errors import is_finite_number
from .other_trainers import suggestion

T = TypeVar("T")
LARGEST = 10**12
"""The bound of integers without another one."""
AUTO = "auto"
OPEN = "???"
"""Hydra's marker for a missing value, which the user must set."""


class Kind(NamedTuple):
    """The values that a key accepts.

    `expected` completes the error message. `build` converts a value, given its key, to the value of the field.
    """

    expected: str
    fits: Callable[[Any], bool]
    build: Callable[[Any, str], Any] = lambda value, key: value

    def __call__(self, value: Any, key: str) -> Any:
        if not self.fits(value):
            raise ValueError(f"{key}={value}: expected {self.expected}")
        return self.build(value, key)


def key(kind: Kind, default: Any = MISSING) -> Any:
    """Declare a dataclass field that is read from a key of the given kind. Without a default, the key is required."""
    return field(metadata={"kind": kind}, **({} if default is MISSING else {"default": default}))


def read(cls: type[T], given: Mapping[str, Any], prefix: str = "", **filled: Any) -> T:
    """Build the dataclass `cls` from the mapping at `prefix`, such as ``"stages.align."``.

    `filled` sets fields that have no key. Raises ValueError for an unknown key, a missing key or an invalid value.
    """
    known = {f.name: f for f in fields(cls) if "kind" in f.metadata}
    for name in given:
        if name not in known:
            unknown = f"{prefix}{name}"
            keys = [
                *(f"{prefix}{each}" for each in known),
                *(each for each, _ in flatten({k: v for k, v in given.items() if k in known}, prefix)),
            ]
            said = suggestion(unknown, [each for each in keys if not f"{each}.".startswith(f"{unknown}.")])
            raise ValueError(f"unknown key '{unknown}'.{said}")
    missing = [name for name, f in known.items() if name not in given and f.default is MISSING]
    if missing:
        raise ValueError(f"{prefix}{missing[0]} is missing: neither a configuration file nor the command sets it")
    values = {
        name: value if value == OPEN else known[name].metadata["kind"](value, f"{prefix}{name}")
        for name, value in given.items()
    }
    return cls(**values, **filled)


def flatten(
    config: Mapping, prefix: str = "", is_leaf: Callable[[str], bool] = lambda key: False
) -> Iterator[tuple[str, Any]]:
    """Yield the leaves of nested mappings as (dotted key, value). Mappings that `is_leaf` accepts are leaves too."""
    for name, value in config.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping) and value and not is_leaf(key):
            yield from flatten(value, f"{key}.", is_leaf)
        else:
            yield key, value


def optional(kind: Kind) -> Kind:
    """Accept null in addition to the values of a kind."""
    return Kind(
        f"{kind.expected}, or null",
        lambda value: value is None or kind.fits(value),
        lambda value, key: None if value is None else kind.build(value, key),
    )


def or_auto(kind: Kind) -> Kind:
    """Accept ``auto``, for which a run decides, in addition to the values of a kind."""
    return Kind(f"{kind.expected}, or {AUTO}", lambda value: value == AUTO or kind.fits(value))


def whole(least: float = -LARGEST, most: float = LARGEST) -> Kind:
    """Accept integers within inclusive bounds."""
    return Kind(f"an integer{_bounds(least, most)}", lambda value: type(value) is int and least <= value <= most)


def number(least: float = -math.inf, most: float = math.inf) -> Kind:
    """Accept finite numbers within inclusive bounds."""

    def fits(value: Any) -> bool:
        return is_finite_number(value) and least <= value <= most

    return Kind(f"a number{_bounds(least, most)}", fits)


def _bounds(least: float, most: float) -> str:
    if most == math.inf:
        return f" of at least {least:,}" if least > -math.inf else ""
    high = "10^12" if most == LARGEST else f"{most:,}"
    if least == -LARGEST:
        return "" if most == LARGEST else f" of at most {high}"
    return f" from {least:,} to {high}"


POSITIVE = Kind("a positive number", lambda value: number(0).fits(value) and value > 0)
SWITCH = Kind("true or false", lambda value: isinstance(value, bool))
TEXT = Kind("a string", lambda value: isinstance(value, str))
MAPPING = Kind("a mapping", lambda value: isinstance(value, Mapping), lambda value, key: MappingProxyType(value))


def one_of(*values: str | int) -> Kind:
    """Accept some strings or integers."""
    return Kind(
        f"one of {', '.join(map(str, values))}",
        lambda given: any(given == value and type(given) is type(value) for value in values),
    )


def list_of(kind: Kind, expected: str, sizes: Sequence[int] | None = None) -> Kind:
    """Accept lists of values of one kind, converted to tuples."""

    def fits(value: Any) -> bool:
        is_list = isinstance(value, Sequence) and not isinstance(value, str)
        return is_list and (sizes is None or len(value) in sizes) and all(map(kind.fits, value))

    return Kind(
        expected, fits, lambda value, key: tuple(kind.build(each, f"{key}[{i}]") for i, each in enumerate(value))
    )


def section(cls: type, expected: str = "a mapping") -> Kind:
    """Accept a nested mapping, which is read into the dataclass `cls`."""
    return Kind(expected, MAPPING.fits, lambda value, key: read(cls, value, f"{key}."))


def by_name(kind: Kind, expected: str) -> Kind:
    """Accept mappings from arbitrary names to values of one kind."""

    def build(value: Mapping, key: str) -> Mapping:
        return MappingProxyType({name: kind(each, f"{key}.{name}") for name, each in value.items()})

    return Kind(expected, MAPPING.fits, build)


NAMES = list_of(TEXT, "a list of names")
WORDS = list_of(
    Kind("a non-empty string", lambda value: isinstance(value, str) and bool(value.strip())),
    "a list of non-empty strings",
)
_SIDE = whole(1)
IMAGE_SIZE = Kind(
    "null, pixels, or [height, width]",
    lambda value: value is None or _SIDE.fits(value) or list_of(_SIDE, "", sizes=(2,)).fits(value),
    lambda value, key: tuple(value) if isinstance(value, Sequence) else value,
)
