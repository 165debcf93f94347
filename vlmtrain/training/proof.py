"""Hashes of the parts before and after a stage, which show which of them it trained."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..model.parts import state_hash
from .adapters import merged
from .trainable import Group, part_size


class Hashes(NamedTuple):
    """SHA-256 of a part's complete state, and of its trained and frozen tensors separately.

    encoders: of the state of each encoder of the part ``vision``, by name.
    """

    whole: str
    trained: str
    frozen: str
    encoders: Mapping[str, str] = MappingProxyType({})


def part_hashes(module: nn.Module, state: Mapping[str, Tensor], groups: Sequence[Group]) -> Hashes:
    """Compute the hashes of a part's state: of all tensors, of those that its `groups` train, and of the rest.

    If a part, or one of several encoders, trains, its buffers count as trained.
    """
    found = _part_hashes(module, state, groups)
    encoders = getattr(module, "encoders", {})
    if len(encoders) < 2:
        return found._replace(encoders=dict.fromkeys(encoders, found.whole))
    within = {name: {key: state[key] for key in state if key.startswith(f"{name}.")} for name in encoders}
    return found._replace(
        encoders={
            name: state_hash({key.removeprefix(f"{name}."): tensor for key, tensor in own.items()})
            for name, own in within.items()
        }
    )


def _part_hashes(module: nn.Module, state: Mapping[str, Tensor], groups: Sequence[Group]) -> Hashes:
    rows = {name: group.rows for group in groups for name in group.names}
    parameters = {name for name, _ in module.named_parameters()}
    names = getattr(module, "encoders", {"": module})
    training = {_owner(name, names) for name in rows}
    moves = {name for name in state if name in rows or (name not in parameters and _owner(name, names) in training)}
    whole = state_hash(merged(module, state))
    if not moves:
        return Hashes(whole, trained="", frozen=whole)
    if len(moves) == len(state) and not any(rows.values()):
        return Hashes(whole, trained=whole, frozen="")
    trained = {name: state[name] for name in moves}
    frozen = {name: state[name] for name in state.keys() - moves}
    for name, few in rows.items():
        if few is not None:
            chosen = torch.zeros(len(state[name]), dtype=torch.bool)
            chosen[list(few)] = True
            trained[name], frozen[name] = state[name][chosen], state[name][~chosen]
    return Hashes(whole, state_hash(trained), state_hash(frozen))


def part_summary(name: str, module: nn.Module, groups: Sequence[Group], before: Hashes, after: Hashes) -> dict:
    """Parameter counts, learning rates and hashes of the part `name`.

    Raises RuntimeError if frozen tensors changed.
    """
    if before.frozen != after.frozen:
        raise RuntimeError(f"{name} is frozen but changed")
    size = part_size(module)
    trained = sum(group.size(module) for group in groups)
    rates = {group.label: group.lr for group in groups}
    return {
        "parameters": size,
        "trainable_parameters": trained,
        "frozen_parameters": size - trained,
        "trained": bool(groups),
        "learning_rate": rates.get(name) if set(rates) <= {name} else rates,
        "sha256_before": before.whole,
        "sha256_after": after.whole,
        **({"encoders": _encoders(before, after, groups)} if len(before.encoders) > 1 else {}),
    }


def _encoders(before: Hashes, after: Hashes, groups: Sequence[Group]) -> dict[str, dict]:
    training = {_owner(name, before.encoders) for group in groups for name in group.names}
    return {
        name: {"trained": name in training, "sha256_before": sha256, "sha256_after": after.encoders[name]}
        for name, sha256 in before.encoders.items()
    }


def _owner(name: str, encoders: Iterable[str]) -> str:
    """The encoder, of those of a part, to which a tensor belongs; an empty string if the part is not several."""
    return next((encoder for encoder in encoders if encoder and name.startswith(f"{encoder}.")), "")
