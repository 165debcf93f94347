"""Initializes a connector that a stage rebuilds from the one that it receives.

    fresh: [connector.proj]
    drops: [connector.core.embedding, connector.core.layers.*.text_ffn]

If `fresh` or `drops` name modules within the connector, or `connector_options` change its options, the stage builds a
new connector. Every tensor of it is copied from the received connector, except those in `fresh`; tensors of the
received connector in `drops` are discarded. All others must agree in name and shape.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from ..errors import some
from ..settings import Stage

PART = "connector"


def tensors_taken(new: nn.Module, old: nn.Module, stage: Stage) -> dict[str, Tensor]:
    """The tensors of `new` that are copied from `old`, by name. Raises ValueError naming those that do not fit."""
    own, handed_on = _state(new), _state(old)
    fresh = {tensor for tensor in own if _is_named(tensor, stage.fresh)}
    dropped = {tensor for tensor in handed_on if _is_named(tensor, (*stage.fresh, *stage.drops))}
    idle = [entry for entry in stage.fresh if "." in entry and not _names_any(entry, own)]
    gone = [entry for entry in stage.drops if "." in entry and not _names_any(entry, handed_on)]
    if "newline" not in handed_on:  # of a stage without tiles or videos that need one
        fresh |= own.keys() & {"newline"}
    missing = own.keys() - fresh - handed_on.keys()
    left = handed_on.keys() - dropped - own.keys()
    both = own.keys() & handed_on.keys() - fresh
    shapes = [
        f"{tensor} ({tuple(handed_on[tensor].shape)} becomes {tuple(own[tensor].shape)})"
        for tensor in both
        if own[tensor].shape != handed_on[tensor].shape
    ]
    found = {
        f"no tensor of this name in the new connector ({stage.prefix}.fresh)": idle,
        f"no tensor of this name in the received connector ({stage.prefix}.drops)": gone,
        f"not in the received connector and not in {stage.prefix}.fresh": missing,
        f"not in the new connector and not in {stage.prefix}.drops": left,
        "wrong shape": shapes,
    }
    problems = "; ".join(f"{what}: {some(names)}" for what, names in found.items() if names)
    if problems:
        raise ValueError(f"the {PART} that stage {stage.name} builds does not fit the one it receives: {problems}")
    return {tensor: own[tensor] for tensor in both}


def _names_any(entry: str, tensors: Iterable[str]) -> bool:
    return any(_is_named(tensor, [entry]) for tensor in tensors)


def take_over(new: nn.Module, old: nn.Module, stage: Stage) -> None:
    """Copy the tensors of `old` that `new` uses."""
    handed_on = _state(old)
    with torch.no_grad():
        for tensor, place in tensors_taken(new, old, stage).items():
            place.copy_(handed_on[tensor])


def _state(module: nn.Module) -> dict[str, Tensor]:
    """Tensors by the names that they have in a connector without tiles."""
    return {tensor.removeprefix("connector."): value for tensor, value in module.state_dict().items()}


def _is_named(tensor: str, entries: Sequence[str]) -> bool:
    patterns = [entry.partition(".")[2] for entry in entries if entry.startswith(f"{PART}.")]
    return any(re.fullmatch(".*".join(map(re.escape, p.split("*"))) + r"(?:\..*)?", tensor) for p in patterns)
