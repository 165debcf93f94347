"""Composes the settings of a run from a command line with Hydra. Later sources override earlier ones:

groups (vision=, connector=, ...) -> recipe -> the recipe's options for the selected choices -> command line
"""

from __future__ import annotations

import functools
import importlib
import inspect
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra._internal.utils import get_args_parser
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from ..connectors import CONNECTORS
from ..errors import first_line, nearest
from ..model.fusion import FUSIONS
from ..model.llm import LANGUAGE_MODELS
from ..model.vision import ENCODERS
from .data import PURPOSES
from .fields import OPEN, flatten, read
from .locations import CONFIGS, RECIPES
from .mini import with_mini
from .other_trainers import suggestion
from .run import MODULES, Evaluation, Run, read_run

OPTION_GROUPS = ("vision", "connector", "fusion", "llm", "data")
REGISTRIES = {"vision": ENCODERS, "connector": CONNECTORS, "fusion": FUSIONS, "llm": LANGUAGE_MODELS}
OWN_KEYS = {
    "vision": {"image_size": None, "layer": -2, "levels": None, "scales": None},
    "llm": {
        **{"chat_template": None, "new_tokens": [], "attn_implementation": None},
        **{"positions": None, "image_frame": None},
    },
}
"""Keys of choices that a module registers, besides their options."""
ENCODERS_KEY = "vision.encoders"
OPEN_MAPPINGS = re.compile(r"(stages\.\w+\.(lora|connector_options)|vision\.encoders)[.=]")
SPLIT = re.compile(r"data\.(?!columns$)\w+")
MODEL_STAGE = "build_model"  # names the only stage of `compose_model` in messages


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


def load_modules(overrides: Sequence[str]) -> None:
    """Import the modules in ``modules=[...]``, which may be in the working directory, so that they can register
    connectors. Raises ValueError for a module that does not exist."""
    for override in overrides:
        key, _, _ = override.partition("=")
        if key.lstrip("+") == "modules":
            names = _parsed([override])[0].value()
            import_modules(MODULES(names, "modules"))


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


def register_choices(overrides: Sequence[str]) -> None:
    """Make the recipes, and registered parts without a YAML file with their default options, available to Hydra."""
    load_modules(overrides)
    register_recipes(overrides)
    for group, registry in REGISTRIES.items():
        for name in registry:
            if not (CONFIGS / group / f"{name}.yaml").exists():
                ConfigStore.instance().store(group=group, name=name, node=_defaults(group, name))


def _defaults(group: str, name: str) -> dict[str, Any]:
    """The keys of a registered part without a YAML file, with their defaults."""
    options = REGISTRIES[group].options(name)
    required = {option: OPEN for option, default in options.items() if default is inspect.Parameter.empty}
    common = {"provider" if group in OWN_KEYS else "name": name, **OWN_KEYS.get(group, {})}
    return {**common, **options, **required}


def _with_open_mappings(overrides: Sequence[str]) -> Iterator[str]:
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
            and not _parsed([override])[0].is_sweep_override()
        ):
            yield f"{'++' * key.startswith('+')}{split}=null"
        yield f"++{override}" if OPEN_MAPPINGS.match(override) else override


def compose(overrides: Sequence[str], config_dir: str | None = None, own_keys: Iterable[str] = ()) -> Run:
    """Compose the settings of a run from Hydra overrides.

    own_keys: further keys of the command, to suggest. Raises ValueError naming the key and, if it is unknown, the
    closest known one.
    """
    config = _compose("train", with_mini(overrides, config_dir), config_dir, own_keys)
    return read_run(finish(config, config.hydra))


def compose_evaluation(overrides: Sequence[str]) -> Evaluation:
    """Compose the settings of ``vlmtrain evaluate``. Raises ValueError as `compose` does."""
    config = _compose("evaluate", overrides)
    with open_dict(config):
        config.pop("hydra", None)
    return read(Evaluation, OmegaConf.to_container(config, resolve=True))


def compose_model(choices: Mapping[str, str | Mapping], inputs: Mapping[str, Any], **values: Any) -> Run:
    """Compose the settings of a run whose only stage, ``build_model``, has all parts and receives none.

    choices: for each group, a choice, or ``{choice: {key: value}}`` with keys of its file. inputs: keys of the stage.
    values: keys of the run. Raises ValueError as `compose` does.
    """
    named = {group: _choice(group, value) for group, value in choices.items()}
    overrides = ["~recipe", f"+name={MODEL_STAGE}", "data=shapes", "engine=zero0"]
    overrides += [f"+objective@stages.{MODEL_STAGE}=language_modelling"]
    overrides += [f"{group}={choice}" for group, (choice, _) in named.items()]
    config = _compose("train", overrides)
    settings = OmegaConf.create(finish(config, config.hydra, must_be_complete=False))
    stage = {"fresh": ["vision", "connector", "llm"], "train": {"connector": 1.0}}  # a stage has to train a part
    given = {group: options for group, (_, options) in named.items() if options}
    given |= {**values, "stages": {MODEL_STAGE: {**stage, **inputs}}}
    _lay_over(settings, given, named=(), setter="build_model")
    return read_run(_plain(settings, left_open_by="its choice"))


def _choice(group: str, value: str | Mapping) -> tuple[str, Mapping]:
    """A choice of a group and its options."""
    if isinstance(value, str):
        return value, {}
    if isinstance(value, Mapping) and len(value) == 1:
        ((choice, options),) = value.items()
        if isinstance(choice, str) and isinstance(options, Mapping):
            return choice, options
    raise ValueError(f"{group}={value}: expected a choice, or {{choice: {{key: value}}}}")


def _compose(
    name: str, overrides: Sequence[str], config_dir: str | None = None, own_keys: Iterable[str] = ()
) -> DictConfig:
    overrides = [*_with_open_mappings(overrides)]
    if config_dir is not None and not Path(config_dir).is_dir():
        raise ValueError(f"--config-dir {config_dir} is not a folder")
    overrides = [*([f"hydra.searchpath=[file://{config_dir}]"] if config_dir else []), *overrides]
    register_choices(overrides)
    callers = GlobalHydra.instance().hydra  # a script that calls build_model may use Hydra itself
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(CONFIGS), version_base="1.3"):
            try:
                return hydra_compose(name, overrides, return_hydra_config=True)
            except (HydraException, OmegaConfBaseException) as error:
                raise ValueError(_explain(name, error, overrides, own_keys)) from None
            except RecursionError:
                said = "a configuration file includes itself; in the defaults of a recipe, name another one as `- NAME`"
                raise ValueError(said) from None
            except yaml.YAMLError as error:
                raise ValueError(f"a configuration file is not valid YAML: {' '.join(str(error).split())}") from None
    finally:
        GlobalHydra.instance().hydra = callers


def read_line(line: Sequence[str]) -> tuple[list[str], str | None]:
    """Prepare command-line arguments for Hydra, and return the output of ``--cfg job`` if it is given.

    Hydra's own options come first, ``mini=true`` is expanded and custom modules are imported. The output is the
    effective settings as YAML, with ??? for missing values. Raises ValueError, with a shorter message than Hydra's, for
    arguments that do not compose.
    """
    arguments = get_args_parser().parse_intermixed_args(list(line))
    options = list(line)
    for override in arguments.overrides:
        options.remove(override)
    overrides = with_mini(arguments.overrides, arguments.config_dir)
    register_choices(overrides)
    shown = None
    if arguments.cfg == "job":
        config = _compose("train", overrides, arguments.config_dir)
        settings = finish(config, config.hydra, must_be_complete=False)
        read_run(settings)
        shown = OmegaConf.to_yaml(OmegaConf.select(OmegaConf.create(settings), arguments.package or ""))
    elif not (arguments.multirun or arguments.cfg or arguments.help or arguments.hydra_help or arguments.info):
        compose(overrides, arguments.config_dir)
    return [*options, *_with_open_mappings(overrides)], shown


def finish(config: DictConfig, hydra: DictConfig | None = None, must_be_complete: bool = True) -> dict[str, Any]:
    """Convert a composed configuration to plain values, and apply the recipe's options for the selected choices.

    hydra: Hydra's own configuration; None uses that of the running job. must_be_complete: whether a missing value is an
    error.
    """
    hydra = HydraConfig.get() if hydra is None else hydra
    keys = {override.split("=")[0].lstrip("+~") for override in hydra.overrides.task}
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
        _check_unselected(settings, mini, (recipe, small), named, hydra.searchpath)
        if settings.mini and "encoders" in small["vision"].get("several", {}):
            recipe["vision"].get("several", {}).pop("encoders", None)  # replaced by the small ones
        for by_group in (recipe, small) if settings.mini else (recipe,):
            for group, by_choice in by_group.items():
                options = by_choice.get(hydra.runtime.choices[group])
                if options:
                    _lay_over(settings, {group: options}, named)
        if settings.mini:
            _lay_over(settings, mini, named)
        settings.named = sorted(key for key in keys if re.match(r"connector(\.|$)|stages\.\w+\.video(\.|$)", key))
        if settings.run_dir is None:
            suffix = "-mini" if settings.mini else ""
            apart = _swept(hydra, settings.name, settings.connector.name)
            settings.run_dir = f"runs/{settings.name}-{settings.connector.name}{suffix}{apart}"
    _complete_encoders(settings)
    return _plain(settings, left_open_by="the recipe" if must_be_complete else None)


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
                known = ", ".join(
                    sorted({*ENCODERS, *(each.stem for each in file.parent.glob("*.yaml"))} - {"several"})
                )
                raise ValueError(f"vision.encoders.{name}.provider={choice}: expected one of {known}")
            defaults = OmegaConf.load(file) if file.exists() else OmegaConf.create(_defaults("vision", choice))
            own = {key: value for key, value in given.items() if key != "provider"}
            encoders[name] = OmegaConf.merge(defaults, own)


def _plain(settings: DictConfig, left_open_by: str | None) -> dict[str, Any]:
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


def _swept(hydra: DictConfig, recipe: str, connector: str) -> str:
    """Suffix for the folder name of a ``--multirun`` job: the overrides in which it differs from the other jobs.

    The folder name already contains the names of the recipe and the connector. A choice with a name other than its
    connector's (the same connector with other options) is part of the suffix.
    """
    if hydra.mode is not RunMode.MULTIRUN:
        return ""
    fixed = {o.get_key_element() for o in _parsed(sys.argv[1:]) if not o.is_sweep_override()}
    known = (f"recipe={recipe}", f"connector={connector}")
    apart = (o for o in hydra.overrides.task if o not in known and o.split("=")[0] not in fixed)
    return "".join("-" + re.sub(r"[^\w.=-]+", "_", override) for override in apart)


def _parsed(words: Sequence[str]) -> list[Override]:
    """The overrides among the words of a command line. Raises ValueError for one that cannot be parsed."""
    overrides = [word for word in words if "=" in word and not word.startswith("-")]
    try:
        return OverridesParser.create().parse_overrides(overrides)
    except OverrideParseException as error:
        raise ValueError(_unparsable(error)) from None


def _unparsable(error: OverrideParseException) -> str:
    return f"{error.override} cannot be parsed; quote values with special characters: 'KEY=\"VALUE\"'"


def _check_unselected(
    settings: DictConfig,
    mini: Mapping,
    options: Iterable[Mapping[str, Mapping]],
    named: Iterable[str],
    searchpath: Iterable[str],
) -> None:
    """Raise ValueError for options of mini runs, or of choices that are not selected, that do not exist.

    named: keys that the command sets or removes.
    """
    known = dict(flatten(OmegaConf.to_container(settings)))
    for key, _ in flatten(mini, is_leaf=lambda key: key in known):
        if any(f"{key}.".startswith(f"{name}.") for name in named):
            continue
        if key not in known and not any(each.startswith(f"{key}.") for each in known):
            raise ValueError(f"mini_options sets {key}, which does not exist.{suggestion(key, known)}")
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
    """The splits that the stages name."""
    for stage in OmegaConf.to_container(settings).get("stages", {}).values():
        yield from (stage[key] for key in ("data", "validation") if isinstance(stage.get(key), str))


def _lay_over(settings: DictConfig, options: Mapping, named: Iterable[str], setter: str = "the recipe") -> None:
    """Apply options, except those that the command line sets. Raises ValueError for an unknown key, naming the setter.

    A key that is null may be set to a mapping. A data split is replaced completely, as it may have other sources. Keys
    of single encoders on the command line override those of the options.
    """
    known = dict(flatten(OmegaConf.to_container(settings)))
    whole = {ENCODERS_KEY, *known}
    for key, value in flatten(options, is_leaf=lambda key: key in whole or SPLIT.fullmatch(key) is not None):
        if key == ENCODERS_KEY and key not in named:
            value = _encoders(value, OmegaConf.select(settings, key) or {})
        elif any(key == name or key.startswith(f"{name}.") or name.startswith(f"{key}.") for name in named):
            continue
        if key not in known and not any(each.startswith(f"{key}.") for each in known):
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


def _explain(name: str, error: Exception, overrides: Sequence[str], own_keys: Iterable[str]) -> str:
    text = str(error)
    if isinstance(error, OverrideParseException):
        return _unparsable(error)
    if text.startswith("Ambiguous value"):
        override = text.split("'")[1]
        if override.startswith("connectors="):
            return f"{override} is an argument of vlmtrain ablate: connectors=[NAME,NAME]; training has connector=NAME"
        return f"{override} has several values: --multirun trains each of them, and vlmtrain ablate compares connectors"
    group = re.search(r"Could not (?:find|load) '(\w+)/([\w./-]+)'", text)
    if group:
        kind, choice = group.groups()
        available = re.findall(r"^\t(\S+)$", text, re.MULTILINE)
        listed = f" Available: {', '.join(available)}" if available else " Expected one name, not a list"
        return f"unknown {kind} '{choice}'.{nearest(choice, available)}{listed}"
    unknown = re.search(r"Could not override '([^']+)'", text)
    if not unknown:
        return first_line(error)
    key = unknown.group(1)
    try:
        others = [override for override in overrides if override.split("=")[0].lstrip("+~") != key]
        composed = flatten(OmegaConf.to_container(hydra_compose(name, others)))
        known = {key: value for key, value in composed if not key.split(".")[0].endswith("_options")}
    except (HydraException, OmegaConfBaseException):  # the other overrides do not compose either
        known = {}
    shortened = {".".join(each.split(".")[: key.count(".") + 1]) for each in known}
    if key in shortened:
        value = next(o.partition("=")[2] for o in overrides if o.split("=")[0].lstrip("+~") == key)
        return f"{key}={value} sets a key that {key} does not have; ++{key}.NAME=VALUE adds one"
    return f"unknown key '{key}'.{suggestion(key, sorted(shortened | known.keys() | set(own_keys)))}"
