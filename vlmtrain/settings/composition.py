"""From a command line to a run's settings: Hydra composes, and what the user named wins.

line -> groups (vision=, connector=, ...) -> recipe -> options of the choices made -> line
"""

from __future__ import annotations

import difflib
import functools
import importlib
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra._internal.utils import get_args_parser
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import ConfigCompositionException, HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from ..connectors import CONNECTORS, connector_options
from ..errors import first_line, nearest
from .fields import read
from .locations import CONFIGS, RECIPES
from .run import Evaluation, Run, read_run

OPTION_GROUPS = ("vision", "connector", "llm", "data")
OPEN_MAPPINGS = re.compile(r"stages\.\w+\.(lora|connector_options)[.=]")
SPLIT = re.compile(r"data\.\w+")
MINI_CHOICES = {"vision": "tiny", "llm": "tiny", "data": "shapes", "engine": "zero0"}


@functools.cache
def register_recipes() -> None:
    """Make the files of recipes/ the choices of the Hydra group `recipe`."""
    store = ConfigStore.instance()
    for file in sorted(RECIPES.glob("*.yaml")):
        store.store(group="recipe", name=file.stem, package="_global_", node=OmegaConf.load(file))


def load_modules(overrides: Sequence[str]) -> None:
    """Import the modules that ``modules=[...]`` names, from the working directory too, and make what they register
    choices of the group `connector`. Raises ValueError for one that is not there."""
    for override in overrides:
        key, _, _ = override.partition("=")
        if key.lstrip("+") == "modules":
            names = OverridesParser.create().parse_override(override).value()
            import_modules([names] if isinstance(names, str) else names)


def import_modules(names: Sequence[str]) -> None:
    """Import modules, from the working directory too. Raises ValueError for one that is not there."""
    if str(Path.cwd()) not in sys.path and names:
        sys.path.append(str(Path.cwd()))
    for name in names:
        try:
            importlib.import_module(str(name))
        except ModuleNotFoundError as error:
            if error.name is None or not str(name).startswith(error.name):
                raise
            raise ValueError(f"modules={list(names)}: there is no module {name} here or on PYTHONPATH") from None


def register_connectors() -> None:
    """Make connectors that come with no YAML file choices of the group `connector`, under their own defaults."""
    for name in CONNECTORS:
        if not (CONFIGS / "connector" / f"{name}.yaml").exists():
            node = {"name": name, **connector_options(name)}
            ConfigStore.instance().store(group="connector", name=name, node=node)


def with_mini(overrides: Sequence[str]) -> list[str]:
    """The overrides of a line, in which ``mini=true`` stands for the small parts that it does not name itself."""
    if "mini=true" not in (override.lower() for override in overrides):
        return list(overrides)
    named = {override.split("=")[0] for override in overrides}
    return [f"{group}={choice}" for group, choice in MINI_CHOICES.items() if group not in named] + list(overrides)


def _with_open_mappings(overrides: Sequence[str]) -> list[str]:
    """The overrides, of which those of a mapping that may have any keys can add some: Hydra's ``++``."""
    return [f"++{override}" if OPEN_MAPPINGS.match(override) else override for override in overrides]


def compose(overrides: Sequence[str], config_dir: str | None = None) -> Run:
    """The settings that a command's Hydra overrides mean. Raises ValueError naming the key and the nearest one."""
    config = _compose("train", with_mini(overrides), config_dir)
    return read_run(finish(config, config.hydra))


def compose_evaluation(overrides: Sequence[str]) -> Evaluation:
    """The settings of ``vlmtrain evaluate``. Raises ValueError naming the key and the nearest one."""
    config = _compose("evaluate", overrides)
    with open_dict(config):
        config.pop("hydra", None)
    return read(Evaluation, OmegaConf.to_container(config, resolve=True))


def _compose(name: str, overrides: Sequence[str], config_dir: str | None = None) -> DictConfig:
    overrides = _with_open_mappings(overrides)
    overrides = [*([f"hydra.searchpath=[file://{config_dir}]"] if config_dir else []), *overrides]
    load_modules(overrides)
    register_recipes()
    register_connectors()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        try:
            return hydra_compose(name, overrides, return_hydra_config=True)
        except (HydraException, OmegaConfBaseException) as error:
            raise ValueError(_explain(name, error, overrides)) from None


def prepare_line(line: Sequence[str]) -> list[str]:
    """A line as Hydra takes it: its own options first, ``mini=true`` spelt out, modules of the user's loaded.

    Raises ValueError for a line that does not compose, in our words rather than Hydra's.
    """
    arguments = get_args_parser().parse_intermixed_args(list(line))
    options = list(line)
    for override in arguments.overrides:
        options.remove(override)
    overrides = with_mini(arguments.overrides)
    load_modules(overrides)
    register_recipes()
    register_connectors()
    asks = arguments.help or arguments.hydra_help or arguments.info
    if not (arguments.multirun or asks or arguments.cfg):
        compose(overrides, arguments.config_dir)
    return [*options, *_with_open_mappings(overrides)]


def shown_settings(line: Sequence[str]) -> str | None:
    """What ``--cfg job`` is to print, as YAML: the settings that apply, ??? where one is missing; None if not asked."""
    arguments = get_args_parser().parse_intermixed_args(list(line))
    if arguments.cfg != "job":
        return None
    config = _compose("train", arguments.overrides, arguments.config_dir)
    composed = finish(config, config.hydra, must_be_complete=False)
    read_run(composed)
    settings, package = OmegaConf.create(composed), arguments.package
    return OmegaConf.to_yaml(OmegaConf.select(settings, package) if package else settings)


def finish(config: DictConfig, hydra: DictConfig | None = None, must_be_complete: bool = True) -> dict[str, Any]:
    """A composed configuration as plain values, with the recipe's options for the choices made.

    hydra: Hydra's own part of it; None asks the job that is running. must_be_complete: whether a key that is left open
    is an error.
    """
    hydra = HydraConfig.get() if hydra is None else hydra
    # `connector=qformer` names a choice, not the options of it
    groups = set(hydra.runtime.choices)
    named = [key for o in hydra.overrides.task if (key := o.split("=")[0].lstrip("+~")) not in groups]
    settings = OmegaConf.create(OmegaConf.to_container(config, resolve=False))
    with open_dict(settings):
        settings.pop("hydra", None)
        mini = OmegaConf.to_container(settings.pop("mini_options"))
        recipe = {group: OmegaConf.to_container(settings.pop(f"{group}_options")) for group in OPTION_GROUPS}
        small = {group: mini.pop(f"{group}_options", {}) for group in OPTION_GROUPS}
        for by_group in (recipe, small) if settings.mini else (recipe,):
            for group, by_choice in by_group.items():
                options = by_choice.get(hydra.runtime.choices[group])
                if options:
                    _lay_over(settings, {group: options}, named)
        if settings.mini:
            _lay_over(settings, mini, named)
        settings.named = sorted(_named_of_connector(hydra))
        if settings.run_dir is None:
            suffix = "-mini" if settings.mini else ""
            apart = _swept(hydra, settings.name, settings.connector.name)
            settings.run_dir = f"runs/{settings.name}-{settings.connector.name}{suffix}{apart}"
    try:
        OmegaConf.resolve(settings)
    except OmegaConfBaseException as error:
        raise ValueError(first_line(error)) from None
    missing = sorted(OmegaConf.missing_keys(settings))
    if missing and must_be_complete:
        raise ValueError(f"set {', '.join(missing)}: the recipe leaves {'it' if len(missing) == 1 else 'them'} open")
    return OmegaConf.to_container(settings)


def _named_of_connector(hydra: DictConfig) -> set[str]:
    """``connector`` and its options, as far as the line names them."""
    keys = (override.split("=")[0].lstrip("+") for override in hydra.overrides.task)
    return {key for key in keys if key.split(".")[0] == "connector"}


def _swept(hydra: DictConfig, recipe: str, connector: str) -> str:
    """What sets a job of ``--multirun`` apart from the others, for its folder's name.

    That has the names of recipe and connector anyway; a choice under another name (a connector's further options) not.
    """
    if hydra.mode is not RunMode.MULTIRUN:
        return ""
    known = (f"recipe={recipe}", f"connector={connector}", *sys.argv)
    return "".join("-" + re.sub(r"[^\w.=-]+", "_", o) for o in hydra.overrides.task if o not in known)


def flatten(config: Mapping, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of nested mappings as (dotted key, value)."""
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _lay_over(settings: DictConfig, options: Mapping, named: Sequence[str]) -> None:
    """Set the options whose keys exist and which the command line did not name."""
    known = dict(flatten(OmegaConf.to_container(settings)))
    for key, value in _settable(options, known):
        if any(key == name or key.startswith(f"{name}.") or name.startswith(f"{key}.") for name in named):
            continue
        if key not in known and not any(each.startswith(f"{key}.") for each in known):
            raise ValueError(f"the recipe sets {key}, which does not exist.{nearest(key, known)}")
        OmegaConf.update(settings, key, value, merge=False)


def _settable(options: Mapping, known: Mapping, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Options down to the keys that are known; one that is null so far may become a whole mapping.

    A split of the data is replaced as a whole: it may name other sources.
    """
    for key, value in options.items():
        is_split = SPLIT.fullmatch(f"{prefix}{key}")
        if isinstance(value, Mapping) and value and f"{prefix}{key}" not in known and not is_split:
            yield from _settable(value, known, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _explain(name: str, error: Exception, overrides: Sequence[str]) -> str:
    text = str(error)
    group = re.search(r"Could not find '(\w+)/([\w./-]+)'", text)
    if group:
        kind, choice = group.groups()
        available = re.findall(r"^\t(\S+)$", text, re.MULTILINE)
        return f"unknown {kind} '{choice}'.{nearest(choice, available)} Available: {', '.join(available)}"
    key = re.search(r"Could not override '([^']+)'", text)
    if key:
        known = _known_keys(name, [o for o in overrides if o.split("=")[0].lstrip("+~") != key.group(1)])
        return f"unknown key '{key.group(1)}'.{_nearest_key(key.group(1), known)}"
    return first_line(error)


def _known_keys(name: str, overrides: Sequence[str]) -> list[str]:
    """Keys that the rest of a line could override; an empty list if that does not compose either."""
    try:
        with_hydra = hydra_compose(name, list(overrides))
    except (ConfigCompositionException, HydraException, OmegaConfBaseException):
        return []
    return [key for key, _ in flatten(OmegaConf.to_container(with_hydra))]


def _nearest_key(key: str, known: Sequence[str]) -> str:
    """The closest key; of equally long ones, the one that differs in the fewest places."""
    prefixes = {".".join(k.split(".")[: key.count(".") + 1]) for k in known}
    match = difflib.get_close_matches(key, sorted(prefixes | set(known)), 1, cutoff=0.5)
    return f" Did you mean '{match[0]}'?" if match else ""
