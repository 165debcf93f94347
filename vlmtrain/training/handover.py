"""Which connector a run goes on with, and what a stage takes over of one that it builds anew.

    fresh: [connector.proj]
    drops: [connector.core.embedding, connector.core.layers.*.text_ffn]

Where `fresh` or `drops` name something within the connector, or `connector_options` change how it works, it is built as
the stage wants it, and every tensor comes from the one handed on, but for those that are fresh here or dropped there.
All others must agree in name and shape.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from ..connectors import connector_options
from ..errors import some
from ..model.loading import read_json
from ..model.tiled import TiledConnector
from .trainable import ALL_PARTS

PART = "connector"
FIXED = ("in_dim", "out_dim", "input_grid", "newline")  # what a connector joins, not options of it


def adopt_connector(settings: DictConfig, finished: Collection[str]) -> tuple[DictConfig, list[str]]:
    """The settings with the connector that `init_from` holds, where the run goes on with it; and what that overrules.

    finished: stages that the run has behind it. Raises ValueError, naming the keys, where the line itself, or a stage
    that builds its connector anew, says something else.
    """
    ahead = (name for name in settings.stages if settings.stage in (None, name) or name in finished)
    name = next((name for name in ahead if PART in settings.stages[name].parts), None)
    file = Path(settings.init_from or "", PART, "config.json")
    if settings.init_from is None or name is None or PART in settings.stages[name].fresh or not file.exists():
        return settings, []
    held = {key: value for key, value in read_json(file).items() if key not in FIXED}
    kind, chosen = held["name"], OmegaConf.to_container(settings.connector)
    anew = builds_anew(settings.stages[name])
    if chosen["name"] != kind and (anew or PART in settings.get("named", ())):
        raise ValueError(
            f"connector={chosen['name']}, but init_from={settings.init_from} holds the connector {kind}: set "
            f"connector={kind}, or list {PART} in stages.{name}.fresh to start another from random weights"
        )
    if anew:
        return settings, []
    held = {"name": kind, **connector_options(kind), **held}
    differing = [key for key in held if key in chosen and chosen[key] != held[key]] if chosen["name"] == kind else []
    for key in differing:
        if f"{PART}.{key}" in settings.get("named", ()):
            raise ValueError(
                f"{PART}.{key}={chosen[key]}, but the connector in init_from={settings.init_from} has {held[key]}: it "
                "is trained already"
            )
    said = [f"connector={chosen['name']} ({kind} is used)"] if chosen["name"] != kind else []
    said += [f"{PART}.{key}={chosen[key]} ({held[key]} is used)" for key in differing]
    settings = settings.copy()
    settings.connector = held
    return settings, [f"init_from={settings.init_from} overrules {', '.join(said)}"] if said else []


def overruled_fit(settings: DictConfig, finished: Collection[str]) -> list[str]:
    """What the next stage prepares pictures by otherwise than the model in `init_from` has seen them, as a warning."""
    ahead = (name for name in settings.stages if settings.stage in (None, name) and name not in finished)
    name = next((name for name in ahead if "vision" in settings.stages[name].parts), None)
    file = Path(settings.init_from or "", "processor", "processor.json")
    if settings.init_from is None or finished or name is None or not file.exists():
        return []
    chosen, key = settings.stages[name].image_fit, f"stages.{name}.image_fit"
    held = (read_json(file).get("geometry") or {}).get("fit", chosen)
    return [f"{key}={chosen}, but init_from={settings.init_from} has {held}: {key}={held} keeps it"] * (held != chosen)


def builds_anew(stage: Mapping) -> bool:
    """Whether a stage builds its connector anew, though one is handed on to it."""
    within = any(entry.startswith(f"{PART}.") for entry in (*stage["fresh"], *stage["drops"]))
    return within or bool(stage["connector_options"])


def check_names(stage: Mapping, name: str) -> None:
    """Raise ValueError if `fresh` or `drops` name what is no part, or something within another than the connector."""
    for key in ("fresh", "drops"):
        for entry in stage[key]:
            part, dot, _ = entry.partition(".")
            if part not in ALL_PARTS:
                raise ValueError(f"stages.{name}.{key} names {entry}; the parts are {', '.join(ALL_PARTS)}")
            if dot and part != PART:
                raise ValueError(f"stages.{name}.{key} names {entry}: only what is within the {PART} can be named")


def tensors_taken(new: nn.Module, old: nn.Module, stage: Mapping, name: str) -> dict[str, Tensor]:
    """The tensors of `new` that come from `old`, by name. Raises ValueError naming those that do not fit."""
    own, handed_on = _state(new), _state(old)
    fresh = {tensor for tensor in own if _is_named(tensor, stage["fresh"])}
    dropped = {tensor for tensor in handed_on if _is_named(tensor, (*stage["fresh"], *stage["drops"]))}
    idle = [entry for entry in stage["fresh"] if "." in entry and not any(_is_named(tensor, [entry]) for tensor in own)]
    if isinstance(new, TiledConnector) and not isinstance(old, TiledConnector):
        fresh.add("newline")
    missing = own.keys() - fresh - handed_on.keys()
    left = handed_on.keys() - dropped - own.keys()
    both = own.keys() & handed_on.keys() - fresh
    shapes = [
        f"{tensor} ({tuple(handed_on[tensor].shape)} becomes {tuple(own[tensor].shape)})"
        for tensor in both
        if own[tensor].shape != handed_on[tensor].shape
    ]
    problems = [
        f"{what}: {some(names)}"
        for what, names in (
            (f"nothing of this name is there to be made fresh (stages.{name}.fresh)", idle),
            (f"not handed on, and not in stages.{name}.fresh", missing),
            (f"handed on without a place, and not in stages.{name}.drops", left),
            ("of another shape", shapes),
        )
        if names
    ]
    if problems:
        raise ValueError(
            f"the {PART} that stage {name} builds cannot take over the one handed on: {'; '.join(problems)}"
        )
    return {tensor: own[tensor] for tensor in both}


def take_over(new: nn.Module, old: nn.Module, stage: Mapping, name: str) -> None:
    """Copy into `new` what it takes over of `old`."""
    handed_on = _state(old)
    with torch.no_grad():
        for tensor, place in tensors_taken(new, old, stage, name).items():
            place.copy_(handed_on[tensor])


def _state(module: nn.Module) -> dict[str, Tensor]:
    """Tensors under the names that they have without tiles."""
    return {tensor.removeprefix("connector."): value for tensor, value in module.state_dict().items()}


def _is_named(tensor: str, entries: list[str]) -> bool:
    patterns = [entry.partition(".")[2] for entry in entries if entry.startswith(f"{PART}.")]
    return any(re.fullmatch(".*".join(map(re.escape, p.split("*"))) + r"(?:\..*)?", tensor) for p in patterns)
