"""Finishes a composed configuration: applies the recipe's options for the selected choices, and checks all of them."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from ..errors import first_line, nearest
from ..model.fusion import CONCATENATION, FUSIONS
from ..model.vision import ENCODERS
from .data import PURPOSES
from .fields import flatten
from .locations import CONFIGS
from .other_trainers import suggestion
from .overrides import ENCODERS_KEY, OWN_KEYS, REGISTRIES, SPLIT, defaults_of, key_of, parsed

OPTION_GROUPS = ("vision", "connector", "fusion", "llm", "data")


def finish(config: DictConfig, hydra: DictConfig | None = None, must_be_complete: bool = True) -> dict[str, Any]:
    """Convert a composed configuration to plain values, and apply the recipe's options for the selected choices.

    hydra: Hydra's own configuration; None uses that of the running job. must_be_complete: whether a missing value is an
    error.
    """
    hydra = HydraConfig.get() if hydra is None else hydra
    keys = {key_of(override) for override in hydra.overrides.task}
    named = keys - set(hydra.runtime.choices)  # `connector=qformer` selects a choice and does not set its options
    settings = OmegaConf.create(OmegaConf.to_container(config, resolve=False))
    for group in OPTION_GROUPS:
        if not isinstance(hydra.runtime.choices.get(group), str):
            raise ValueError(f"{group} has no choice: expected {group}=NAME")
    with open_dict(settings):
        settings.pop("hydra", None)
        mini = OmegaConf.to_container(settings.pop("mini_options"))
        recipe = {group: OmegaConf.to_container(settings.pop(f"{group}_options")) for group in OPTION_GROUPS}
        small = {group: mini.pop(f"{group}_options", {}) for group in OPTION_GROUPS}
        _check_mini(settings, mini, named)
        _check_options(settings, (recipe, small), hydra.searchpath)
        if settings.mini and "encoders" in small["vision"].get("several", {}):
            recipe["vision"].get("several", {}).pop("encoders", None)  # replaced by the small ones
        for by_group in (recipe, small) if settings.mini else (recipe,):
            for group, by_choice in by_group.items():
                options = by_choice.get(hydra.runtime.choices[group])
                if options:
                    lay_over(settings, {group: options}, named)
        if settings.mini:
            lay_over(settings, mini, named)
        settings.named = sorted(key for key in keys if re.match(r"connector(\.|$)|stages\.\w+\.video(\.|$)", key))
        if settings.run_dir is None:
            suffix = "-mini" if settings.mini else ""
            apart = _swept(hydra, settings.name, settings.connector.name)
            settings.run_dir = f"runs/{settings.name}-{settings.connector.name}{suffix}{apart}"
    _complete_encoders(settings)
    complete_fusion_rates(settings, named)
    return plain(settings, left_open_by="the recipe" if must_be_complete else None)


def _check_mini(settings: DictConfig, mini: Mapping, named: Iterable[str]) -> None:
    """Raise ValueError for options of mini runs that do not exist. named: keys that the command sets or removes."""
    known = dict(flatten(OmegaConf.to_container(settings)))
    for key, _ in flatten(mini, is_leaf=lambda key: key in known):
        if any(_is_within(key, name) for name in named):
            continue
        if not any(_is_within(each, key) for each in known):
            raise ValueError(f"mini_options sets {key}, which does not exist.{suggestion(key, known)}")


def _check_options(settings: DictConfig, options: Iterable[Mapping[str, Mapping]], searchpath: Iterable[str]) -> None:
    """Raise ValueError for options of choices, also of those that are not selected, that do not exist."""
    folders = [CONFIGS, *(Path(path.removeprefix("file://")) for path in searchpath)]
    entries = [(group, *entry) for by_group in options for group in by_group for entry in by_group[group].items()]
    for group, choice, given in entries:
        files = [file for folder in folders if (file := folder / group / f"{choice}.yaml").exists()]
        registry = REGISTRIES.get(group, {})
        has_class, by_name = choice in registry, group in ("connector", "fusion")
        if (has_class and by_name) or (not files and (has_class or by_name)):
            own = {key: value for key, value in (given or {}).items() if key not in OWN_KEYS.get(group, ())}
            registry.check_options(choice, own, f"{group}_options.{choice}")
        elif not files:
            choices = {file.stem for folder in folders for file in (folder / group).glob("*.yaml")}
            raise ValueError(f"the recipe sets {group}_options.{choice}: no such {group}.{nearest(choice, choices)}")
        else:
            own = OmegaConf.to_container(OmegaConf.load(files[0]))
            own_keys = dict(flatten(own))
            if group == "data":
                own_keys |= dict.fromkeys((*PURPOSES, *_splits(settings)))
            unknown = (key for key, _ in flatten(given or {}, is_leaf=own_keys.__contains__) if key not in own_keys)
            for key in unknown if "defaults" not in own else ():
                name = f"{group}_options.{choice}.{key}"
                raise ValueError(f"the recipe sets {name}, which does not exist.{nearest(key, own_keys)}")


def _splits(settings: DictConfig) -> Iterator[str]:
    """The splits that the stages and the demonstrations name."""
    settings = OmegaConf.to_container(settings)
    named = [stage.get(key) for stage in settings.get("stages", {}).values() for key in ("data", "validation")]
    yield from (name for name in (*named, settings["validation"]["shots_from"]) if isinstance(name, str))


def lay_over(settings: DictConfig, options: Mapping, named: Iterable[str], setter: str = "the recipe") -> None:
    """Apply options, except those that the command line sets. Raises ValueError for an unknown key, naming the setter.

    A key that is null may be set to a mapping. A data split is replaced completely, as it may have other sources. Keys
    of single encoders on the command line override those of the options.
    """
    known = dict(flatten(OmegaConf.to_container(settings)))
    whole = {ENCODERS_KEY, *known}
    for key, value in flatten(options, is_leaf=lambda key: key in whole or SPLIT.fullmatch(key) is not None):
        if key == ENCODERS_KEY and key not in named:
            value = _encoders(value, OmegaConf.select(settings, key) or {})
        elif any(_is_within(key, name) or _is_within(name, key) for name in named):
            continue
        if not any(_is_within(each, key) for each in known):
            raise ValueError(f"{setter} sets {key}, which does not exist.{nearest(key, known)}")
        OmegaConf.update(settings, key, value, merge=False)


def _encoders(options: Mapping, given: Mapping) -> dict[str, Any]:
    """The encoders of options, in their order, with the keys that are `given` for single ones.

    An encoder with a given provider has only the given keys. Encoders that the options do not have come last.
    """
    encoders = dict(options)
    for name, keys in given.items():
        extends = name in encoders and isinstance(keys, Mapping | DictConfig) and "provider" not in keys
        encoders[name] = OmegaConf.merge(encoders[name], keys) if extends else keys
    return encoders


def _is_within(key: str, outer: str) -> bool:
    """Whether a dotted key is `outer` or a key below it."""
    return f"{key}.".startswith(f"{outer}.")


def _complete_encoders(settings: DictConfig) -> None:
    """Give each of several encoders the defaults of its provider, a choice of the group ``vision``."""
    encoders = settings.vision.get("encoders")
    if settings.vision.get("provider") != "several" or not isinstance(encoders, DictConfig):
        return
    with open_dict(settings):
        for name, given in encoders.items():
            choice = given.get("provider") if isinstance(given, DictConfig) else None
            if choice is None:
                value = "null" if given is None else given
                raise ValueError(f"vision.encoders.{name}={value}: expected {{provider: PROVIDER, key: value, ...}}")
            file = CONFIGS / "vision" / f"{choice}.yaml"
            if choice == "several" or (choice not in ENCODERS and not file.exists()):
                known = sorted({*ENCODERS, *(each.stem for each in file.parent.glob("*.yaml"))} - {"several"})
                raise ValueError(f"vision.encoders.{name}.provider={choice}: expected one of {', '.join(known)}")
            defaults = OmegaConf.load(file) if file.exists() else OmegaConf.create(defaults_of("vision", choice))
            own = {key: value for key, value in given.items() if key != "provider"}
            encoders[name] = OmegaConf.merge(defaults, own)


def complete_fusion_rates(settings: DictConfig, named: Iterable[str] = ()) -> None:
    """Replace ``train.fusion: connector`` by the connector's learning rate, or by null where no fusion has weights.

    With concatenation, what a recipe says about the training of a fusion is dropped. named: keys that the command sets.
    """
    name = settings.fusion.get("name")
    has_weights = name in FUSIONS and FUSIONS[name].has_weights
    for key, stage in settings.get("stages", {}).items():
        train = stage.get("train") if isinstance(stage, DictConfig) else None
        if not isinstance(train, DictConfig):
            continue
        if train.get("fusion") == "connector":
            joins = {"connector", "llm"} <= set(stage.get("parts") or ())
            train.fusion = train.get("connector") if has_weights and joins else None
        if name == CONCATENATION:
            if not any(_is_within(f"stages.{key}.train.fusion", each) for each in named):
                train.fusion = None
            is_named = any(_is_within(f"stages.{key}.groups", each) for each in named)
            if isinstance(stage.get("groups"), ListConfig) and not is_named:
                stage.groups = [group for group in stage.groups if not _is_of_fusion(group)]


def _is_of_fusion(group: Any) -> bool:
    return isinstance(group, DictConfig) and str(group.get("match")).partition(".")[0] == "fusion"


def _swept(hydra: DictConfig, recipe: str, connector: str) -> str:
    """Suffix for the folder name of a ``--multirun`` job: the overrides in which it differs from the other jobs.

    The folder name already contains the names of the recipe and the connector. A choice with a name other than its
    connector's (the same connector with other options) is part of the suffix.
    """
    if hydra.mode is not RunMode.MULTIRUN:
        return ""
    fixed = {o.get_key_element() for o in parsed(sys.argv[1:]) if not o.is_sweep_override()}
    known = (f"recipe={recipe}", f"connector={connector}")
    apart = (o for o in hydra.overrides.task if o not in known and o.split("=")[0] not in fixed)
    return "".join("-" + re.sub(r"[^\w.=-]+", "_", override) for override in apart)


def plain(settings: DictConfig, left_open_by: str | None) -> dict[str, Any]:
    """Settings as plain values, without references.

    left_open_by: named in the error if a value is missing; None allows that.
    """
    try:
        OmegaConf.resolve(settings)
    except OmegaConfBaseException as error:
        raise ValueError(first_line(error)) from None
    missing = sorted(OmegaConf.missing_keys(settings))
    if missing and left_open_by is not None:
        them = "it" if len(missing) == 1 else "them"
        raise ValueError(f"set {', '.join(missing)}: {left_open_by} leaves {them} open")
    return OmegaConf.to_container(settings)
