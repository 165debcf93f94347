"""Rerun of a run from its record: where the losses diverge from the original, and what else differs.

python -m vlmtrain.runs.reproduction SETTINGS.yaml [STAGE]     # trains with resolved settings
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from ..distributed.processes import die_with_launcher
from ..files import make_folder, read_json, replace_text
from ..settings import import_modules, read_run
from ..settings.free_keys import completed
from ..settings.run import MODULES
from .records import read_config, read_records, read_summary

SETTINGS = "reproduced.yaml"
COMPARED = ("loss", "grad_norm", "samples", "tokens")


class Parting(NamedTuple):
    """The first step of a stage that differs, and the key and values that differ."""

    step: int
    key: str
    first: float | None
    again: float | None


class StageResult(NamedTuple):
    """Comparison of a stage with its rerun.

    steps: number of compared steps; parting: None if all are bitwise equal; same_model: None unless both have a model.
    """

    steps: int
    parting: Parting | None
    same_model: bool | None


class Reproduction(NamedTuple):
    folder: str
    stages: dict[str, StageResult]
    differences: list[str]


def reproduce(run_dir: Path, out: Path | None = None, ranks: int | None = None) -> Reproduction:
    """Train from the record of `run_dir` into `out`, with the recorded number of processes, and compare.

    An interrupted rerun of the same record is resumed. Raises ValueError if there is no record, if `out` contains
    anything else, or if the run fails.
    """
    config = read_config(run_dir)
    out = out or run_dir.with_name(f"{run_dir.name}-again")
    if out.resolve() == run_dir.resolve():
        raise ValueError(f"{out} is the run itself: choose another folder")
    record = {key: config.pop(key) for key in ("versions", "git", "machine", "files", "earlier") if key in config}
    began = [name for name in config["stages"] if (run_dir / name / "metrics.jsonl").exists()]
    if not began or "machine" not in record:
        raise ValueError(f"{run_dir} contains no steps to compare with, or no record of how they were made")
    config |= {"run_dir": str(out), "wandb": "disabled", "stage": None}
    if _is_finished(out, began):
        # its result may be outdated: code, libraries and machine may have changed
        raise ValueError(f"{out} already contains a finished rerun: remove it, or choose another folder with --out")
    _take_folder(config, out)
    for stage in [None] if began == list(config["stages"]) else began:
        _run(out, stage, ranks or record["machine"]["processes"], record["machine"]["threads"])
    if not _is_finished(out, began):
        raise ValueError(f"the run in {out} was stopped; the same command resumes it")
    from .provenance import differences

    return Reproduction(
        str(out), {name: compare(run_dir / name, out / name) for name in began}, differences(record, read_config(out))
    )


def _is_finished(out: Path, stages: list[str]) -> bool:
    return (out / SETTINGS).is_file() and all(read_summary(out / name) for name in stages)


def _take_folder(config: dict, out: Path) -> None:
    """Write the settings to `out`, which must be empty or contain a rerun with the same settings."""
    from omegaconf import OmegaConf

    text = OmegaConf.to_yaml(OmegaConf.create(config))
    settings = out / SETTINGS
    others = [file for file in out.iterdir() if file.suffix != ".partial"] if out.is_dir() else []
    if others and not (settings.is_file() and settings.read_text() == text):
        raise ValueError(f"{out} already contains something else: choose another folder with --out")
    make_folder(out, f"--out {out}")
    replace_text(settings, text)


def _run(out: Path, stage: str | None, ranks: int, threads: int) -> None:
    command = [sys.executable, "-m", "vlmtrain.distributed.processes"]
    if ranks > 1:
        command += ["torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks), "-m"]
    command += ["vlmtrain.runs.reproduction", str(out / SETTINGS), *([stage] if stage else [])]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": str(threads)}, stdout=sys.stderr)
    if done.returncode:
        raise ValueError(f"the run in {out} failed (exit {done.returncode}); its last messages are above")


def compare(first: Path, again: Path) -> StageResult:
    """Compare the folder of a stage with that of its rerun."""
    then, now = (read_records(folder / "metrics.jsonl") for folder in (first, again))
    pairs = list(zip(then, now))
    partings = [
        Parting(one["step"], key, one[key], two[key]) for one, two in pairs for key in COMPARED if one[key] != two[key]
    ]
    if len(now) < len(then):  # more steps are not a difference: the first run may have been interrupted
        partings.append(Parting(len(now) + 1, "steps", len(then), len(now)))
    manifests = [read_json(file) for folder in (first, again) if (file := folder / "model" / "vlmtrain.json").exists()]
    hashes = [{part: facts["sha256"] for part, facts in manifest["parts"].items()} for manifest in manifests]
    same_model = hashes[0] == hashes[1] if len(hashes) == 2 else None
    return StageResult(len(pairs), next(iter(partings), None), same_model)


def main() -> None:
    die_with_launcher()
    from omegaconf import OmegaConf

    from ..train import train, users_errors

    try:
        with users_errors():
            settings = completed(OmegaConf.to_container(OmegaConf.load(sys.argv[1])))
            import_modules(MODULES(settings.get("modules", []), "modules"))
            train(read_run({**settings, "stage": sys.argv[2] if len(sys.argv) > 2 else None}))
    finally:
        from ..distributed.world import leave_world

        leave_world()


if __name__ == "__main__":
    main()
