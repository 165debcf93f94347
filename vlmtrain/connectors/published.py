"""Loading published weights: the mapping between a connector's tensor names and the published names."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)


class Names(NamedTuple):
    """One naming convention.

    prefix:      prefix of every name in the full model. Leading components may be missing:
                 ``"model.visual."`` also accepts ``"visual."`` and no prefix.
    renames:     substitutions ``(pattern, replacement)`` that are applied in order to our name. If several of
                 our names map to one published name, they are its slices along dimension 0, in our order.
    unpublished: pattern of our names without a published counterpart; these keep their values.
    ignored:     pattern of published names that hold no weights.
    """

    prefix: str = ""
    renames: tuple[tuple[str, str | Callable[[re.Match], str]], ...] = ()
    unpublished: str | None = None
    ignored: str | None = None


def load(module: nn.Module, state_dict: dict[str, Tensor], conventions: tuple[Names, ...]) -> None:
    """Copy `state_dict` into `module` under the convention that fits best. Raises ValueError listing mismatches."""
    fits = [_fit(module, state_dict, names, prefix) for names in conventions for prefix in _prefixes(names.prefix)]
    expected, missing, unexpected, kept = min(fits, key=lambda fit: len(fit[1]) + len(fit[2]))
    own = module.state_dict()
    problems = [f"missing: {name}" for name in missing] + [f"unexpected: {name}" for name in unexpected]
    for name, parts in expected.items():
        shape = (sum(len(own[part]) for part in parts), *own[parts[0]].shape[1:])
        if name in state_dict and tuple(state_dict[name].shape) != shape:
            problems.append(f"shape of {name}: expected {shape}, got {tuple(state_dict[name].shape)}")
    if problems:
        raise ValueError(
            f"These weights do not fit {type(module).__name__}; nothing was loaded. Check the connector's options "
            "against the published model.\n  " + "\n  ".join(problems)
        )
    with torch.no_grad():
        for name, parts in expected.items():
            rows = [len(own[part]) for part in parts]
            for part, tensor in zip(parts, state_dict[name].split(rows), strict=True):
                own[part].copy_(tensor)
    if kept:
        logger.warning("Not part of the published weights, left unchanged: %s", ", ".join(kept))


def published_state(module: nn.Module, names: Names) -> dict[str, Tensor]:
    """Return the tensors of `module` under the names of a convention, without its prefix, as `load` accepts them."""
    own = module.state_dict()
    expected, *_ = _fit(module, own, names, "")
    return {name: torch.cat([own[part] for part in parts]) for name, parts in expected.items()}


def _prefixes(prefix: str) -> list[str]:
    parts = prefix.split(".")
    return [".".join(parts[start:]) for start in range(len(parts))]


def _fit(module: nn.Module, state_dict: dict[str, Tensor], names: Names, prefix: str):
    """Map published names to ours, and list the missing, unexpected and kept names under this convention."""
    expected: dict[str, list[str]] = {}
    kept = []
    for own in module.state_dict():
        if names.unpublished and re.match(names.unpublished, own):
            kept.append(own)
            continue
        name = own
        for pattern, replacement in names.renames:
            name = re.sub(pattern, replacement, name)
        expected.setdefault(prefix + name, []).append(own)
    missing = [name for name in expected if name not in state_dict]
    unexpected = [
        name for name in state_dict if name not in expected and not (names.ignored and re.search(names.ignored, name))
    ]
    return expected, missing, unexpected, kept
