"""The definition of an ablation, parsed from its overrides: what is compared and what all jobs share."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser

from ..errors import first_line, nearest
from ..files import read_json
from ..settings import Run, compose
from ..settings.fields import whole

OWN_KEYS = ("connectors", "seeds", "jobs", "ranks", "run_dir", "budget", "metric", "sweep_steps")
BUDGETS = ("steps", "samples", "flops", "wall")
BY_PROVIDER = ("vision", "llm")  # groups whose choices may be the values of an axis
_PLAIN = re.compile(r"[\w./:@-]+")


@dataclass(frozen=True)
class Named:
    """A value of an axis that has a name: a choice of the group `group`, with its keys."""

    name: str
    group: str
    keys: tuple[tuple[str, Any], ...]

    @property
    def line(self) -> list[str]:
        keys = dict(self.keys)
        chosen = keys.pop("provider", "several" if "encoders" in keys else None)
        choice = [] if chosen is None else [f"{self.group}={chosen}"]
        return choice + [f"{self.group}.{key}={_text(value)}" for key, value in keys.items()]


@dataclass(frozen=True)
class Choice:
    """One row of the table: a connector with its options, and a value of each further axis."""

    name: str
    options: tuple[tuple[str, Any], ...] = ()
    axes: tuple[tuple[str, Any], ...] = ()

    @property
    def label(self) -> str:
        connector = "-".join([self.name, *(f"{key}-{value}" for key, value in self.options)])
        return ", ".join([connector, *(f"{_short(key)}={_text(value)}" for key, value in self.axes)])

    @property
    def folder(self) -> str:
        """The label as a folder name."""
        return re.sub(r"[^\w.-]+", "-", self.label)

    @property
    def line(self) -> list[str]:
        connector = [f"connector={self.name}", *(f"connector.{key}={_text(value)}" for key, value in self.options)]
        axes = (value.line if isinstance(value, Named) else [f"{key}={_text(value)}"] for key, value in self.axes)
        return connector + [override for line in axes for override in line]


@dataclass(frozen=True)
class Ablation:
    """What is compared, and how.

    line: overrides that all jobs share. jobs: how many run at once; ranks: processes per job. budget: what is held
    equal, one of `BUDGETS`. metric: what the table is sorted by. sweep: keys and their candidate values; each choice
    gets its best combination, found in short runs of `sweep_steps` steps per stage.
    """

    line: tuple[str, ...]
    choices: tuple[Choice, ...]
    seeds: tuple[int, ...]
    folder: Path
    jobs: int = 1
    ranks: int = 1
    budget: str = "steps"
    metric: str = "exact_match"
    sweep: tuple[tuple[str, tuple[Any, ...]], ...] = ()
    sweep_steps: int = 100

    def settings(self, choice: Choice, seed: int = 0) -> Run:
        """Settings of one job, including what the budget and the sweep have determined so far."""
        return compose([*self.line_of(choice), f"seed={seed}", f"run_dir={self.job(choice, seed)}"])

    def line_of(self, choice: Choice) -> list[str]:
        """Overrides of a job, without its seed and folder."""
        return [*self.line, *choice.line, *self.decisions().get(choice.label, {}).get("line", [])]

    def job(self, choice: Choice, seed: int) -> Path:
        return self.folder / "jobs" / choice.folder / f"seed-{seed}"

    @property
    def decisions_file(self) -> Path:
        return self.folder / "decisions.json"

    def decisions(self) -> dict[str, dict]:
        """What the budget and the sweep have determined, by label."""
        return read_json(self.decisions_file) if self.decisions_file.exists() else {}

    def sweep_lines(self) -> list[list[str]]:
        """All combinations of the sweep's values, as overrides."""
        named = [[f"{key}={_text(value)}" for value in values] for key, values in self.sweep]
        return [list(combination) for combination in itertools.product(*named)]


def read_line(overrides: Sequence[str]) -> Ablation:
    """Parse an ablation from its overrides. Raises ValueError naming the key.

    ``recipe=... connectors=[linear,{qformer:{num_queries:64}}] seeds=[0,1] axis.KEY=[...] axis.vision={NAME: {...}}
    sweep.KEY=[...]
    sweep_steps=N budget=steps|samples|flops|wall metric=NAME jobs=N ranks=N run_dir=DIR`` and overrides for training.
    """
    own: dict[str, Any] = {}
    by_key: dict[str, dict[str, tuple]] = {"axis": {}, "sweep": {}}
    line = []
    for override in overrides:
        key, _, value = override.partition("=")
        kind, _, rest = key.partition(".")
        if key in OWN_KEYS:
            own[key] = value if key in ("run_dir", "budget", "metric") else _value(override)
        elif kind in by_key and rest:
            if rest in by_key[kind]:
                raise ValueError(f"{override}: {key} is given twice")
            values = _value(f"values={value}")
            named = kind == "axis" and rest in BY_PROVIDER and isinstance(values, dict)
            by_key[kind][rest] = _named(values, rest) if named else tuple(_list(values, key))
        elif key in ("connector", "seed"):
            raise ValueError(f"{override}: expected {key}s=[...] for an ablation")
        else:
            line.append(override)
    _check_keys(by_key, line)
    if "sweep_steps" in own and not by_key["sweep"]:
        raise ValueError(f"sweep_steps={own['sweep_steps']} has no effect without sweep.KEY=[...]")
    _check_budget(own.get("budget", "steps"), by_key)
    if "connectors" not in own and by_key["axis"]:
        own["connectors"] = [compose(line, own_keys=OWN_KEYS).connector.name]
    choices = _choices(own, by_key["axis"])
    seeds = tuple(whole(0)(seed, "seeds") for seed in _list(own.get("seeds", [0]), "seeds"))
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds={list(seeds)}: duplicate entry")
    name = compose([*line, *choices[0].line], own_keys=OWN_KEYS).name
    folder = Path(own.get("run_dir") or f"runs/ablation-{name}")
    numbers = {key: whole(1)(own.get(key, 1), key) for key in ("jobs", "ranks")}
    numbers["sweep_steps"] = whole(1)(own.get("sweep_steps", 100), "sweep_steps")
    metric = own.get("metric", "exact_match")
    return Ablation(
        tuple(line),
        choices,
        seeds,
        folder,
        budget=own.get("budget", "steps"),
        metric=metric,
        sweep=tuple(by_key["sweep"].items()),
        **numbers,
    )


def _check_keys(by_key: dict[str, dict[str, tuple]], line: Sequence[str]) -> None:
    taken = {override.partition("=")[0] for override in line}
    for kind, named in by_key.items():
        for key in named:
            if key in taken or key in ("connector", "seed", "run_dir"):
                raise ValueError(f"{kind}.{key}: {key} is set elsewhere in the command")
            taken.add(key)


def _check_budget(budget: str, by_key: dict[str, dict[str, tuple]]) -> None:
    """Raise ValueError for an unknown budget, and for axes and sweeps that conflict with it."""
    if budget not in BUDGETS:
        raise ValueError(f"budget={budget}: expected one of {', '.join(BUDGETS)}.{nearest(budget, BUDGETS)}")
    lengths = {"axis": ("max_steps", "epochs"), "sweep": ("max_steps", "epochs", "batch_size")}
    for kind, named in by_key.items():
        for key in named:
            if budget != "steps" and key.startswith("stages.") and key.rpartition(".")[2] in lengths[kind]:
                raise ValueError(f"{kind}.{key}: budget={budget} sets the steps of each choice; expected budget=steps")


def _choices(own: dict[str, Any], axes: dict[str, tuple]) -> tuple[Choice, ...]:
    if "connectors" not in own:
        raise ValueError("connectors=[...] is not set: name the connectors to compare")
    named = [_choice(entry) for entry in _list(own["connectors"], "connectors")]
    choices = tuple(
        Choice(choice.name, choice.options, tuple(zip(axes, values)))
        for choice in named
        for values in itertools.product(*axes.values())
    )
    for key, values in {"connectors": tuple(named), **{f"axis.{key}": values for key, values in axes.items()}}.items():
        if any(value in values[:i] for i, value in enumerate(values)):
            raise ValueError(f"{key}={own.get(key, list(values))}: duplicate entry")
    folders = [choice.folder for choice in choices]
    for i, folder in enumerate(folders):
        if folder in folders[:i]:
            raise ValueError(f"two choices would use the same folder {folder}: one of them is {choices[i].label}")
    return choices


def _value(override: str) -> Any:
    try:
        return OverridesParser.create().parse_override(override).value()
    except Exception as error:  # the parser raises its own exception types
        raise ValueError(f"{override}: {first_line(error)}") from None


def _list(value: Any, key: str) -> list:
    if not isinstance(value, list) or not value:
        raise ValueError(f"{key}={value}: expected a non-empty list")
    return value


def _named(values: dict, group: str) -> tuple[Named, ...]:
    for name, keys in values.items():
        if not isinstance(keys, dict) or not keys:
            raise ValueError(f"axis.{group}: expected {{NAME: {{provider: ..., key: value}}, ...}}, got {name}: {keys}")
    return tuple(Named(str(name), group, tuple(keys.items())) for name, keys in values.items())


def _choice(entry: Any) -> Choice:
    if isinstance(entry, str):
        return Choice(entry)
    if isinstance(entry, dict) and len(entry) == 1:
        ((name, options),) = entry.items()
        if isinstance(options, dict):
            return Choice(str(name), tuple(sorted((str(key), value) for key, value in options.items())))
    raise ValueError(f"connectors: expected a name or {{name: {{option: value}}}}, got {entry}")


def _text(value: Any) -> str:
    """A value as an override: in Hydra's grammar, where the keys of mappings are not quoted."""
    if isinstance(value, Named):
        return value.name
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_text(each)}" for key, each in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_text, value)) + "]"
    return value if isinstance(value, str) and _PLAIN.fullmatch(value) else json.dumps(value, ensure_ascii=False)


def _short(key: str) -> str:
    """A key without the parts that all keys of its kind share."""
    return key.removeprefix("stages.").replace(".train.", ".")
