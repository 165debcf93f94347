"""Overrides of a command line, and the choices that they may name: recipes, and the parts that are registered."""

from __future__ import annotations

import functools
import importlib
import inspect
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import OverrideParseException
from omegaconf import OmegaConf

from ..connectors import CONNECTORS
from ..model.fusion import FUSIONS
from ..model.llm import LANGUAGE_MODELS
from ..model.vision import ENCODERS
from .fields import OPEN
from .locations import CONFIGS, RECIPES
from .model import OwnLLM
from .run import MODULES

REGISTRIES = {"vision": ENCODERS, "connector": CONNECTORS, "fusion": FUSIONS, "llm": LANGUAGE_MODELS}
OWN_KEYS = {
    "vision": {"image_size": None, "layer": -2, "levels": None, "scales": None},
    "llm": {each.name: each.default for each in fields(OwnLLM) if each.default is not MISSING},
}
"""Keys of choices that a module registers, besides their options."""
ENCODERS_KEY = "vision.encoders"
OPEN_MAPPINGS = re.compile(r"(stages\.\w+\.(lora|connector_options)|vision\.encoders)[.=]")
SPLIT = re.compile(r"data\.(?!columns$)\w+")


def key_of(override: str) -> str:
    """The key that an override sets, adds or removes."""
    return override.partition("=")[0].lstrip("+~")


def parsed(words: Sequence[str]) -> list[Override]:
    """The overrides among the words of a command line. Raises ValueError for one that cannot be parsed."""
    overrides = [word for word in words if "=" in word and not word.startswith("-")]
    try:
        return OverridesParser.create().parse_overrides(overrides)
    except OverrideParseException as error:
        raise ValueError(unparsable(error)) from None


def unparsable(error: OverrideParseException) -> str:
    return f"{error.override} cannot be parsed; quote values with special characters: 'KEY=\"VALUE\"'"


def with_open_mappings(overrides: Sequence[str]) -> Iterator[str]:
    """Adapt overrides of mappings with arbitrary keys to Hydra, which merges mappings of known keys.

    With ``++``, they can add keys. A data split, and the encoders, are set to null first, so that they have only what
    the override has.
    """
    for override in overrides:
        key, _, value = override.partition("=")
        split = key.lstrip("+")
        if (
            (SPLIT.fullmatch(split) or split == ENCODERS_KEY)
            and value.startswith("{")
            and not parsed([override])[0].is_sweep_override()
        ):
            yield f"{'++' * key.startswith('+')}{split}=null"
        yield f"++{override}" if OPEN_MAPPINGS.match(override) else override


def register_choices(overrides: Sequence[str]) -> None:
    """Make the recipes, and registered parts without a YAML file with their default options, available to Hydra."""
    load_modules(overrides)
    register_recipes(overrides)
    for group, registry in REGISTRIES.items():
        for name in registry:
            if not (CONFIGS / group / f"{name}.yaml").exists():
                ConfigStore.instance().store(group=group, name=name, node=defaults_of(group, name))


def load_modules(overrides: Sequence[str]) -> None:
    """Import the modules in ``modules=[...]``, which may be in the working directory, so that they can register
    connectors. Raises ValueError for a module that does not exist."""
    for override in parsed([each for each in overrides if each.partition("=")[0].lstrip("+") == "modules"]):
        import_modules(MODULES(override.value(), "modules"))


def import_modules(names: Sequence[str]) -> None:
    """Import modules, which may be in the working directory. Raises ValueError for a module that does not exist."""
    if str(Path.cwd()) not in sys.path and names:
        sys.path.append(str(Path.cwd()))
    for name in names:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not name.startswith(error.name):
                raise
            raise ValueError(
                f"modules={list(names)}: no module {name} in the working directory or on PYTHONPATH"
            ) from None


def register_recipes(overrides: Sequence[str]) -> None:
    """Register files in recipes/ as choices of the Hydra group `recipe`: the one that is chosen, and those it extends.

    If none of them is chosen, all are registered, since another recipe can extend them.
    """
    files = {file.stem: file for file in sorted(RECIPES.glob("*.yaml"))}
    chosen = [value for key, _, value in (o.partition("=") for o in overrides) if key.lstrip("+") == "recipe"]
    waiting = chosen if chosen and files.keys() >= set(chosen) else list(files)
    while waiting:
        name = waiting.pop(0)
        waiting += [entry for entry in _register_recipe(files[name]) if entry in files]


@functools.cache
def _register_recipe(file: Path) -> tuple[str, ...]:
    """Register a recipe. Returns the recipes that its defaults name."""
    node = OmegaConf.load(file)
    ConfigStore.instance().store(group="recipe", name=file.stem, package="_global_", node=node)
    return tuple(entry for entry in node.get("defaults") or () if isinstance(entry, str))


def defaults_of(group: str, name: str) -> dict[str, Any]:
    """The keys of a registered part without a YAML file, with their defaults."""
    options = REGISTRIES[group].options(name)
    required = {option: OPEN for option, default in options.items() if default is inspect.Parameter.empty}
    common = {"provider" if group in OWN_KEYS else "name": name, **OWN_KEYS.get(group, {})}
    return {**common, **options, **required}
