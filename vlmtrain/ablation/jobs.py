"""The runs of an ablation: each connector and seed in a folder of its own, in processes of their own.

OUT/shared/seed-0/         stages that come before any connector, once a seed
OUT/jobs/mlp/seed-0/       the run of one connector, with links to the shared stages
OUT/features/              what the frozen encoder made of the pictures, for all of them
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig
from tqdm import tqdm

from ..errors import first_line
from ..paths import link_or_copy
from ..settings import compose

OWN_KEYS = ("connectors", "seeds", "jobs", "ranks", "run_dir")


@dataclass(frozen=True)
class Choice:
    """A connector with its options, as a recipe's line would name them."""

    name: str
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def label(self) -> str:
        return "-".join([self.name, *(f"{key}-{value}" for key, value in self.options)])

    @property
    def line(self) -> list[str]:
        return [f"connector={self.name}", *(f"connector.{key}={json.dumps(value)}" for key, value in self.options)]


@dataclass(frozen=True)
class Ablation:
    """What is compared. line: what all jobs share; jobs: how many run at once; ranks: processes each."""

    line: tuple[str, ...]
    choices: tuple[Choice, ...]
    seeds: tuple[int, ...]
    folder: Path
    jobs: int = 1
    ranks: int = 1

    def settings(self, choice: Choice, seed: int = 0) -> DictConfig:
        """The settings of one job."""
        return compose([*self.line, *choice.line, f"seed={seed}", f"run_dir={self.job(choice, seed)}"])

    def job(self, choice: Choice, seed: int) -> Path:
        return self.folder / "jobs" / choice.label / f"seed-{seed}"

    def shared(self, seed: int) -> Path:
        return self.folder / "shared" / f"seed-{seed}"


def read_line(overrides: Sequence[str]) -> Ablation:
    """An ablation from its line: ``recipe=... connectors=[linear,{qformer:{num_queries:64}}] seeds=[0,1]``, and
    ``jobs=N ranks=N run_dir=DIR``. Raises ValueError naming the key."""
    own: dict[str, Any] = {}
    line = []
    for override in overrides:
        key, _, value = override.partition("=")
        if key in OWN_KEYS:
            own[key] = value if key == "run_dir" else _value(override)
        elif key in ("connector", "seed"):
            raise ValueError(f"{override}: an ablation takes {key}s=[...]")
        else:
            line.append(override)
    if "connectors" not in own:
        raise ValueError("connectors=[...] is not set: name the connectors to compare")
    choices = tuple(_choice(entry) for entry in _list(own["connectors"], "connectors"))
    if len({choice.label for choice in choices}) < len(choices):
        raise ValueError(f"connectors={own['connectors']}: one is named twice")
    seeds = tuple(_whole(seed, "seeds", least=0) for seed in _list(own.get("seeds", [0]), "seeds"))
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds={list(seeds)}: one is named twice")
    name = compose([*line, *choices[0].line]).name
    folder = Path(own.get("run_dir") or f"runs/ablation-{name}")
    numbers = {key: _whole(own.get(key, 1), key, least=1) for key in ("jobs", "ranks")}
    return Ablation(tuple(line), choices, seeds, folder, **numbers)


def _value(override: str) -> Any:
    try:
        return OverridesParser.create().parse_override(override).value()
    except Exception as error:  # the parser raises its own kinds
        raise ValueError(f"{override}: {first_line(error)}") from None


def _list(value: Any, key: str) -> list:
    if not isinstance(value, list) or not value:
        raise ValueError(f"{key}={value}: expected a list that is not empty")
    return value


def _whole(value: Any, key: str, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{key}={value}: expected a whole number from {least}")
    return value


def _choice(entry: Any) -> Choice:
    if isinstance(entry, str):
        return Choice(entry)
    if isinstance(entry, dict) and len(entry) == 1:
        ((name, options),) = entry.items()
        if isinstance(options, dict):
            return Choice(str(name), tuple(sorted((str(key), value) for key, value in options.items())))
    raise ValueError(f"connectors: expected a name or {{name: {{option: value}}}}, got {entry}")


def run_ablation(ablation: Ablation, show_progress: bool = True) -> None:
    """Run what is not finished. Raises ValueError for what cannot work, before anything runs, or for a failed job."""
    settings = {choice: ablation.settings(choice) for choice in ablation.choices}
    _check_same(ablation)
    shared = _shared_stages(settings[ablation.choices[0]])
    work = [(choice, seed) for seed in ablation.seeds for choice in ablation.choices]
    with tqdm(total=len(work), unit="job", disable=not show_progress) as bar:
        for seed in ablation.seeds:
            for stage in shared:
                bar.set_postfix_str(f"shared {stage}, seed {seed}", refresh=True)
                line = ["connector=linear", f"stage={stage}"]  # any would do: these stages have none
                _run(ablation, line, seed, ablation.shared(seed))
        with ThreadPoolExecutor(ablation.jobs) as pool:
            for choice, seed in pool.map(lambda job: _run_job(ablation, *job, shared), work):
                bar.set_postfix_str(f"{choice.label}, seed {seed}", refresh=False)
                bar.update()


def _check_same(ablation: Ablation) -> None:
    """Hold the folder to the line it began with; more connectors and seeds may come."""
    file = ablation.folder / "ablation.json"
    line = sorted(ablation.line)
    if file.exists():
        began = json.loads(file.read_text())["line"]
        if began != line:
            changed = sorted(set(began) ^ set(line))
            raise ValueError(f"{ablation.folder} began with another line ({', '.join(changed)}); set another run_dir")
    ablation.folder.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"line": line}, indent=2) + "\n")


def _shared_stages(settings: DictConfig) -> list[str]:
    """The stages before the first that has a connector: they are the same for all."""
    shared = []
    for name, stage in settings.stages.items():
        if "connector" in stage.parts:
            break
        shared.append(name)
    return shared


def _run_job(ablation: Ablation, choice: Choice, seed: int, shared: Sequence[str]) -> tuple[Choice, int]:
    folder = ablation.job(choice, seed)
    for stage in shared:
        if not (folder / stage).exists():
            partial = folder / f"{stage}.partial"
            shutil.rmtree(partial, ignore_errors=True)
            shutil.copytree(ablation.shared(seed) / stage, partial, copy_function=link_or_copy)
            partial.rename(folder / stage)
    _run(ablation, choice.line, seed, folder)
    return choice, seed


def _run(ablation: Ablation, line: Sequence[str], seed: int, folder: Path) -> None:
    """One training process, or several under torchrun. Raises ValueError with its last words if it fails."""
    folder.mkdir(parents=True, exist_ok=True)
    launcher = [sys.executable, "-m", "vlmtrain.processes"]
    if ablation.ranks > 1:
        launcher += ["torch.distributed.run", "--standalone", "--nproc_per_node", str(ablation.ranks), "-m"]
    cache = (
        [] if any(o.startswith("features.") for o in ablation.line) else [f"features.cache={ablation.folder}/features"]
    )
    command = [*launcher, "vlmtrain.train", *ablation.line, *line, f"seed={seed}", f"run_dir={folder}", *cache]
    with open(folder / "output.log", "ab") as log:
        code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT).returncode
    finished = all((folder / stage / "summary.json").exists() for stage in _wanted(line, ablation, seed))
    if code or not finished:
        words = (folder / "output.log").read_text(errors="replace").strip().splitlines()
        said = next((w for w in reversed(words) if "error" in w.lower()), words[-1] if words else "nothing")
        raise ValueError(f"a job did not finish (exit {code}): {said} ({folder / 'output.log'})")


def _wanted(line: Sequence[str], ablation: Ablation, seed: int) -> list[str]:
    settings = compose([*ablation.line, *line, f"seed={seed}"])
    return [name for name in settings.stages if settings.stage in (None, name)]
