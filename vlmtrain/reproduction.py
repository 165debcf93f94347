"""A run once more, from its own record: where its losses part from the first time's, and what else differs.

python -m vlmtrain.reproduction SETTINGS.yaml      # trains by settings that are resolved already
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import yaml

from .processes import die_with_launcher
from .train import train, users_errors

COMPARED = ("loss", "grad_norm", "samples", "tokens")


class Parting(NamedTuple):
    """Where a stage's steps begin to differ, in what, and by how much of it."""

    step: int
    key: str
    first: float | None
    again: float | None


class StageResult(NamedTuple):
    """steps: compared; parting: None where all are the same to the bit; same_model: None where there are not two."""

    steps: int
    parting: Parting | None
    same_model: bool | None


class Reproduction(NamedTuple):
    folder: str
    stages: dict[str, StageResult]
    differences: list[str]


def reproduce(run_dir: Path, out: Path | None = None, ranks: int | None = None) -> Reproduction:
    """Train by the record of `run_dir` into `out`, on as many processes as it says, and compare.

    Raises ValueError if there is no record, or if the run fails.
    """
    config = _config(run_dir)
    out = out or run_dir.with_name(f"{run_dir.name}-again")
    if out.resolve() == run_dir.resolve():
        raise ValueError(f"{out} is the run itself: name another folder")
    record = {key: config.pop(key) for key in ("versions", "git", "machine", "files", "earlier") if key in config}
    began = [name for name in config["stages"] if (run_dir / name / "metrics.jsonl").exists()]
    if not began or "machine" not in record:
        raise ValueError(f"{run_dir} holds no steps to compare with, or no record of what made them")
    everything = began == list(config["stages"])
    config |= {"run_dir": str(out), "wandb": "disabled", "stage": None if everything else config["stage"]}
    _run(config, out, ranks or record["machine"]["processes"], record["machine"]["threads"])
    from .training.provenance import differences

    return Reproduction(
        str(out), {name: _compare(run_dir / name, out / name) for name in began}, differences(record, _config(out))
    )


def _config(run_dir: Path) -> dict:
    from omegaconf import OmegaConf

    file = run_dir / "config.yaml"
    if not file.exists():
        raise ValueError(f"{run_dir} is not a run folder: config.yaml is missing")
    try:
        config = OmegaConf.to_container(OmegaConf.load(file))
        dict(config)["stages"].items()
    except (yaml.YAMLError, OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{file} is not a run's record: {error}") from None
    return config


def _run(config: dict, out: Path, ranks: int, threads: int) -> None:
    from omegaconf import OmegaConf

    out.mkdir(parents=True, exist_ok=True)
    settings = out / "reproduced.yaml"
    settings.write_text(OmegaConf.to_yaml(OmegaConf.create(config)))
    command = [sys.executable, "-m", "vlmtrain.processes"]
    if ranks > 1:
        command += ["torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks), "-m"]
    command += ["vlmtrain.reproduction", str(settings)]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": str(threads)}, stdout=sys.stderr)
    if done.returncode:
        raise ValueError(f"the run in {out} failed (exit {done.returncode}); its last words are above")


def _compare(first: Path, again: Path) -> StageResult:
    pairs = list(zip(_records(first / "metrics.jsonl"), _records(again / "metrics.jsonl")))
    partings = (
        Parting(one["step"], key, one[key], two[key]) for one, two in pairs for key in COMPARED if one[key] != two[key]
    )
    manifests = [folder / "model" / "vlmtrain.json" for folder in (first, again)]
    both = all(file.exists() for file in manifests)
    return StageResult(
        len(pairs), next(partings, None), _hashes(manifests[0]) == _hashes(manifests[1]) if both else None
    )


def _records(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def _hashes(manifest: Path) -> dict[str, str]:
    return {part: facts["sha256"] for part, facts in json.loads(manifest.read_text())["parts"].items()}


def main() -> None:
    die_with_launcher()
    from omegaconf import OmegaConf

    try:
        with users_errors():
            train(OmegaConf.load(sys.argv[1]))
    finally:
        from .world import leave_world

        leave_world()


if __name__ == "__main__":
    main()
