"""Composes the settings of a run from a command line with Hydra. Later sources override earlier ones:

groups (vision=, connector=, ...) -> recipe -> the recipe's options for the selected choices -> command line
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from ..errors import first_line, nearest
from .fields import flatten
from .finishing import complete_fusion_rates, finish, lay_over, plain
from .locations import CONFIGS
from .mini import with_mini
from .other_trainers import suggestion
from .overrides import key_of, register_choices, unparsable, with_open_mappings
from .run import Answers, Evaluation, Run, read_evaluation, read_run

MODEL_STAGE = "build_model"  # names the only stage of `compose_model` in messages


def compose(overrides: Sequence[str], config_dir: str | None = None, own_keys: Iterable[str] = ()) -> Run:
    """Compose the settings of a run from Hydra overrides.

    own_keys: further keys of the command, to suggest. Raises ValueError naming the key and, if it is unknown, the
    closest known one.
    """
    config = _compose("train", with_mini(overrides, config_dir), config_dir, own_keys)
    return read_run(finish(config, config.hydra))


def compose_evaluation(overrides: Sequence[str]) -> Evaluation:
    """Compose the settings of ``vlmtrain evaluate``, where keys of ``validation`` may be given without their group.

    Raises ValueError as `compose` does.
    """
    own = {field.name for field in fields(Answers)}
    config = _compose(
        "evaluate", [f"validation.{each}" if each.partition("=")[0] in own else each for each in overrides]
    )
    with open_dict(config):
        config.pop("hydra", None)
    return read_evaluation(OmegaConf.to_container(config, resolve=True))


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
    rates = {"connector": 1.0, "fusion": "connector"}  # a stage has to train a part, and a new fusion
    stage = {"fresh": ["vision", "connector", "llm"], "train": rates}
    given = {group: options for group, (_, options) in named.items() if options}
    given |= {**values, "stages": {MODEL_STAGE: {**stage, **inputs}}}
    lay_over(settings, given, named=(), setter="build_model")
    complete_fusion_rates(settings)
    return read_run(plain(settings, left_open_by="its choice"))


def _choice(group: str, value: str | Mapping) -> tuple[str, Mapping]:
    """A choice of a group and its options."""
    if isinstance(value, str):
        return value, {}
    if isinstance(value, Mapping) and len(value) == 1:
        ((choice, options),) = value.items()
        if isinstance(choice, str) and isinstance(options, Mapping):
            return choice, options
    raise ValueError(f"{group}={value}: expected a choice, or {{choice: {{key: value}}}}")


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
    return [*options, *with_open_mappings(overrides)], shown


def _compose(
    name: str, overrides: Sequence[str], config_dir: str | None = None, own_keys: Iterable[str] = ()
) -> DictConfig:
    overrides = [*with_open_mappings(overrides)]
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


def _explain(name: str, error: Exception, overrides: Sequence[str], own_keys: Iterable[str]) -> str:
    text = str(error)
    if isinstance(error, OverrideParseException):
        return unparsable(error)
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
        others = [override for override in overrides if key_of(override) != key]
        composed = flatten(OmegaConf.to_container(hydra_compose(name, others)))
        known = {key: value for key, value in composed if not key.split(".")[0].endswith("_options")}
    except (HydraException, OmegaConfBaseException):  # the other overrides do not compose either
        known = {}
    shortened = {".".join(each.split(".")[: key.count(".") + 1]) for each in known}
    if key in shortened:
        value = next(o.partition("=")[2] for o in overrides if key_of(o) == key)
        return f"{key}={value} sets a key that {key} does not have; ++{key}.NAME=VALUE adds one"
    return f"unknown key '{key}'.{suggestion(key, sorted(shortened | known.keys() | set(own_keys)))}"
