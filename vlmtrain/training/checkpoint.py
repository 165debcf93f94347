"""Resumable checkpoints of a stage: whole or absent, checked when they are read, and only the last few."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file

from ..world import World
from .metrics import logger
from .state import TrainingState

RECORD = "vlmtrain.json"


class Checkpoints:
    """``checkpoints/step-000100`` folders of one stage. A folder gets its name only once it is complete."""

    def __init__(self, folder: Path, keep_last: int, world: World):
        self.folder, self.keep_last, self.world = folder, keep_last, world

    def save(self, state: TrainingState, step: int, record: dict) -> None:
        """Write the state behind optimiser step `step`, then drop the oldest beyond `keep_last`.

        Raises ValueError on every rank if one of them cannot write; the checkpoints before stay as they are.
        """
        name = f"step-{step:06d}"
        partial = self.folder / f"{name}.partial"
        if self.world.is_main:
            for left in self.folder.glob("*.partial"):
                shutil.rmtree(left, ignore_errors=True)
            partial.mkdir(parents=True)
        self.world.barrier()
        self._write(state, partial, step, record)
        if self.world.is_main:
            shutil.rmtree(self.folder / name, ignore_errors=True)
            partial.rename(self.folder / name)
            for old in self._complete()[: -self.keep_last]:
                shutil.rmtree(old)
        self.world.barrier()

    def _write(self, state: TrainingState, partial: Path, step: int, record: dict) -> None:
        tensors = state.share(self.world.rank, self.world.size)
        file = partial / f"state-{self.world.rank:05d}-of-{self.world.size:05d}.safetensors"
        problem, facts = None, {}
        try:
            save_file(tensors, file, metadata={"format": "pt"})
            facts = {file.name: {"bytes": file.stat().st_size, "sha256": _sha256(file)}}
        except (OSError, SafetensorError) as error:
            problem = f"{type(error).__name__}: {error}"
        found = self.world.gather((problem, facts))
        if self.world.is_main and not any(problem for problem, _ in found):
            files = {name: fact for _, facts in found for name, fact in facts.items()}
            try:
                whole = {**record, "step": step, "updates": state.updates, "files": files}
                (partial / RECORD).write_text(json.dumps(whole))
                _sync(partial)
            except OSError as error:
                problem = f"{type(error).__name__}: {error}"
        problems = [p for p in [problem, *(p for p, _ in found)] if p]
        problems = self.world.from_main(problems)
        if problems:
            if self.world.is_main:
                shutil.rmtree(partial, ignore_errors=True)
            raise ValueError(f"the checkpoint of step {step} could not be written to {self.folder}: {problems[0]}")

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
        for folder in reversed(complete):
            try:
                return _checked(folder)
            except (OSError, ValueError, KeyError, TypeError) as error:
                logger.warning(f"{folder} is damaged and not used: {error}")
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
        return sorted(path for path in self.folder.glob("step-*") if path.suffix != ".partial")


def _checked(folder: Path) -> dict:
    """A checkpoint's record. Raises ValueError or OSError unless every file is as it was written."""
    record = json.loads((folder / RECORD).read_text())
    if folder.name != f"step-{record['step']:06d}":
        raise ValueError(f"it is that of step {record['step']}")
    for name, facts in record["files"].items():
        file = folder / name
        if file.stat().st_size != facts["bytes"]:
            raise ValueError(f"{name} has {file.stat().st_size} bytes, {facts['bytes']} were written")
        if _sha256(file) != facts["sha256"]:
            raise ValueError(f"{name} is not what was written: its hash differs")
    return record


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with open(file, "rb") as opened:
        while chunk := opened.read(2**24):
            digest.update(chunk)
    return digest.hexdigest()


def _sync(folder: Path) -> None:
    """Have a folder's files on the disk before it gets its name."""
    for path in [*folder.iterdir(), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
