"""Resumable checkpoints of a stage: written atomically, verified when read, and limited to the most recent ones."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import time
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file

from ..distributed.world import World
from ..files import sync
from .engine.state import TrainingState
from .log import logger

RECORD = "vlmtrain.json"
NAME = re.compile(r"step-(\d+)")


class Checkpoints:
    """``checkpoints/step-000100`` folders of one stage. A folder gets its final name only once it is complete.

    cost: number of checkpoints saved by this process, the seconds that this took, and the bytes of the last one.
    """

    def __init__(self, folder: Path, keep_last: int, world: World):
        self.folder, self.keep_last, self.world = folder, keep_last, world
        self.cost = {"saved": 0, "seconds": 0.0, "bytes": 0}
        self.saved_at = time.monotonic()

    def save(self, state: TrainingState, step: int, record: dict, prune: bool = True) -> None:
        """Write the state after optimizer step `step`, then delete all but the last `keep_last` if `prune` is set.

        Raises ValueError on every rank if any rank cannot write. Earlier checkpoints then remain unchanged.
        """
        started = time.monotonic()
        name = f"step-{step:06d}"
        partial = self.folder / f"{name}.partial"
        self._check(step, self._prepare(partial) if self.world.is_main else None)
        size = self._write(state, partial, step, record)
        if self.world.is_main:
            shutil.rmtree(self.folder / name, ignore_errors=True)
            partial.rename(self.folder / name)
            sync(self.folder)
            for old in self._complete()[: -self.keep_last] if prune else ():
                shutil.rmtree(old, ignore_errors=True)
        self.world.barrier()
        self.saved_at = time.monotonic()
        self.cost["saved"] += 1
        self.cost["seconds"] += self.saved_at - started
        self.cost["bytes"] = size

    @property
    def minutes_since(self) -> float:
        """Minutes since the last save, or since the start of the stage."""
        return (time.monotonic() - self.saved_at) / 60

    def _prepare(self, partial: Path) -> str | None:
        """Remove partial checkpoints and create an empty folder. Returns the problem if this fails."""
        for left in self.folder.glob("*.partial"):
            shutil.rmtree(left, ignore_errors=True)
        try:
            partial.mkdir(parents=True)
            sync(*self.folder.parents[:2])  # the folder may be new
        except OSError as error:
            return f"{type(error).__name__}: {error}"
        return None

    def _check(self, step: int, problem: str | None) -> None:
        """Raise ValueError on every rank if the main rank has a problem."""
        problem = self.world.from_main(problem)
        if problem:
            raise ValueError(
                f"the checkpoint of step {step} could not be written to {self.folder}: {problem}; earlier "
                "checkpoints are unchanged: run the same command to resume from the last one"
            )

    def _write(self, state: TrainingState, partial: Path, step: int, record: dict) -> int:
        """Write all files. Returns their total size in bytes."""
        tensors = state.share(self.world.rank, self.world.size)
        file = partial / f"state-{self.world.rank:05d}-of-{self.world.size:05d}.safetensors"
        problem, facts = None, {}
        try:
            save_file(tensors, file, metadata={"format": "pt"})
            sync(file)
            facts = {file.name: {"bytes": file.stat().st_size, "sha256": _sha256(file)}}
        except (OSError, SafetensorError) as error:
            problem = f"{type(error).__name__}: {error}"
        found = self.world.gather((problem, facts))
        problem = next((problem for problem, _ in found if problem), None)
        files = {name: fact for _, facts in found for name, fact in facts.items()}
        if self.world.is_main and not problem:
            try:
                whole = {**record, "step": step, "updates": state.updates, "files": files}
                (partial / RECORD).write_text(json.dumps({"record": whole, "sha256": _record_hash(whole)}))
                sync(partial / RECORD, partial)
            except OSError as error:
                problem = f"{type(error).__name__}: {error}"
        if self.world.is_main and problem:
            shutil.rmtree(partial, ignore_errors=True)
        self._check(step, problem)
        return sum(fact["bytes"] for fact in files.values())

    def newest(self) -> dict:
        """Return the record of the newest intact checkpoint, with ``step`` 0 if there are no checkpoints.

        Damaged checkpoints are logged and skipped. Raises ValueError if all of them are damaged.
        """
        record = self.world.from_main(self._newest_sound() if self.world.is_main else None)
        if "problem" in record:
            raise ValueError(record["problem"])
        return record

    def load(self, record: dict, state: TrainingState) -> None:
        """Load the checkpoint of a record. Raises ValueError if its state belongs to another stage."""
        if record["step"]:
            folder = self.folder / f"step-{record['step']:06d}"
            state.load([folder / name for name in sorted(record["files"])], record["step"], record["updates"])

    def _newest_sound(self) -> dict:
        complete = self._complete()
        damaged: list[Path] = []
        for folder in reversed(complete):
            try:
                record = _checked(folder)
            except (OSError, ValueError, KeyError, TypeError) as error:
                logger.warning(f"{folder} is damaged and is ignored: {error}")
                damaged.append(folder)
                continue
            for newer in damaged:  # otherwise `keep_last` would count it in place of intact ones
                aside = newer.with_name(f"{newer.name}.damaged")
                shutil.rmtree(aside, ignore_errors=True)
                newer.rename(aside)
            return record
        if complete:
            return {"problem": f"every checkpoint in {self.folder} is damaged: delete the folder to restart the stage"}
        return {"step": 0}

    def clear(self) -> None:
        """Delete all checkpoints once the stage is finished."""
        if self.world.is_main:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _complete(self) -> list[Path]:
        found = {path: NAME.fullmatch(path.name) for path in self.folder.glob("step-*")}
        return sorted((path for path in found if found[path]), key=lambda path: int(found[path][1]))


def _checked(folder: Path) -> dict:
    """Return a checkpoint's record. Raises ValueError or OSError unless every file is as it was written."""
    found = json.loads((folder / RECORD).read_text())
    record = found["record"]
    if _record_hash(record) != found["sha256"]:
        raise ValueError(f"{RECORD} has changed since it was written: its hash differs")
    if folder.name != f"step-{record['step']:06d}":
        raise ValueError(f"it belongs to step {record['step']}")
    for name, facts in record["files"].items():
        file = folder / name
        if file.stat().st_size != facts["bytes"]:
            raise ValueError(f"{name} has {file.stat().st_size} bytes, expected {facts['bytes']}")
        if _sha256(file) != facts["sha256"]:
            raise ValueError(f"{name} has changed since it was written: its hash differs")
    return record


def _record_hash(record: dict) -> str:
    return hashlib.sha256(json.dumps(record).encode()).hexdigest()


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with open(file, "rb") as opened:
        while chunk := opened.read(2**24):
            digest.update(chunk)
    return digest.hexdigest()
