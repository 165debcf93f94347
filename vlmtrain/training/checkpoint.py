"""Resumable checkpoints of a stage: whole or absent, and only the last few."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from ..world import World
from .engine import StageEngine


class Checkpoints:
    """``checkpoints/step-000100`` folders of one stage. A folder gets its name only once it is complete."""

    def __init__(self, folder: Path, keep_last: int, world: World):
        self.folder, self.keep_last, self.world = folder, keep_last, world

    def save(self, engine: StageEngine, step: int, state: dict) -> None:
        """Write the state behind optimiser step `step`, then drop the oldest beyond `keep_last`."""
        name = f"step-{step:06d}"
        partial = self.folder / f"{name}.partial"
        if self.world.is_main:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        self.world.barrier()
        engine.save(self.folder, partial.name)
        self.world.barrier()
        if self.world.is_main:
            record = {"step": step, "world_size": self.world.size, **state}
            (partial / "vlmtrain.json").write_text(json.dumps(record))
            shutil.rmtree(self.folder / name, ignore_errors=True)
            partial.rename(self.folder / name)
            for old in self._complete()[: -self.keep_last]:
                shutil.rmtree(old)
        self.world.barrier()

    def load_latest(self, engine: StageEngine) -> dict:
        """Take up the newest complete checkpoint; returns its record, with ``step`` 0 if there is none."""
        found = self.world.from_main([folder.name for folder in self._complete()])
        if not found:
            return {"step": 0}
        record = json.loads((self.folder / found[-1] / "vlmtrain.json").read_text())
        if record["world_size"] != self.world.size:
            raise ValueError(
                f"{self.folder / found[-1]} was saved by {record['world_size']} processes and needs as many to "
                f"continue; there are {self.world.size}"
            )
        engine.load(self.folder, found[-1])
        return record

    def clear(self) -> None:
        """Remove all: the stage is finished."""
        if self.world.is_main:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _complete(self) -> list[Path]:
        return sorted(path for path in self.folder.glob("step-*") if path.suffix != ".partial")
