"""Resumable checkpoints of a stage: whole or absent, checked when they are read, and only the last few."""

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
    """``checkpoints/step-000100`` folders of one stage. A folder gets its name only once it is complete.

    cost: how many this process has saved, the seconds that they took, and the bytes of the last one.
    """

    def __init__(self, folder: Path, keep_last: int, world: World):
        self.folder, self.keep_last, self.world = folder, keep_last, world
        self.cost = {"saved": 0, "seconds": 0.0, "bytes": 0}
        self.saved_at = time.monotonic()

    def save(self, state: TrainingState, step: int, record: dict, prune: bool = True) -> None:
        """Write the state behind optimiser step `step`, then drop the oldest beyond `keep_last`, if they are to go.

        Raises ValueError on every rank if one of them cannot write; the checkpoints before stay as they are.
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
        """Since the last save, or the stage's start."""
        return (time.monotonic() - self.saved_at) / 60

    def _prepare(self, partial: Path) -> str | None:
        """Make room, and an empty folder; returns what stood in the way."""
        for left in self.folder.glob("*.partial"):
            shutil.rmtree(left, ignore_errors=True)
        try:
            partial.mkdir(parents=True)
            sync(*self.folder.parents[:2])  # the folder may be new
        except OSError as error:
            return f"{type(error).__name__}: {error}"
        return None

    def _check(self, step: int, problem: str | None) -> None:
        """Raise ValueError on every rank if the main one has a problem."""
        problem = self.world.from_main(problem)
        if problem:
            raise ValueError(
                f"the checkpoint of step {step} could not be written to {self.folder}: {problem}; those before it are "
                "as they were, and the same line goes on from the last of them"
            )

    def _write(self, state: TrainingState, partial: Path, step: int, record: dict) -> int:
        """Write all files; returns their bytes."""
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
        """The record of the newest checkpoint that is sound, with ``step`` 0 if there are none.

        A damaged one is named in the log, and the one before it is taken. Raises ValueError if all are damaged.
        """
        record = self.world.from_main(self._newest_sound() if self.world.is_main else None)
        if "problem" in record:
            raise ValueError(record["problem"])
        return record

    def load(self, record: dict, state: TrainingState) -> None:
        """Take up the checkpoint of a record. Raises ValueError if the state is another stage's."""
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
                logger.warning(f"{folder} is damaged and not used: {error}")
                damaged.append(folder)
                continue
            for newer in damaged:  # or `keep_last` would keep it in place of sound ones
                aside = newer.with_name(f"{newer.name}.damaged")
                shutil.rmtree(aside, ignore_errors=True)
                newer.rename(aside)
            return record
        if complete:
            return {
                "problem": f"every checkpoint in {self.folder} is damaged: delete the folder to begin the stage anew"
            }
        return {"step": 0}

    def clear(self) -> None:
        """Remove all: the stage is finished."""
        if self.world.is_main:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _complete(self) -> list[Path]:
        found = {path: NAME.fullmatch(path.name) for path in self.folder.glob("step-*")}
        return sorted((path for path in found if found[path]), key=lambda path: int(found[path][1]))


def _checked(folder: Path) -> dict:
    """A checkpoint's record. Raises ValueError or OSError unless every file is as it was written."""
    found = json.loads((folder / RECORD).read_text())
    record = found["record"]
    if _record_hash(record) != found["sha256"]:
        raise ValueError(f"{RECORD} is not what was written: its hash differs")
    if folder.name != f"step-{record['step']:06d}":
        raise ValueError(f"it is that of step {record['step']}")
    for name, facts in record["files"].items():
        file = folder / name
        if file.stat().st_size != facts["bytes"]:
            raise ValueError(f"{name} has {file.stat().st_size} bytes, {facts['bytes']} were written")
        if _sha256(file) != facts["sha256"]:
            raise ValueError(f"{name} is not what was written: its hash differs")
    return record


def _record_hash(record: dict) -> str:
    return hashlib.sha256(json.dumps(record).encode()).hexdigest()


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with open(file, "rb") as opened:
        while chunk := opened.read(2**24):
            digest.update(chunk)
    return digest.hexdigest()
