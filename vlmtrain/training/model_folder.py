"""Writes the model folders of a stage: its final model and its best one."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from ..data.processor import Processor
from ..distributed.world import World
from ..files import link_or_copy, replace_folder, sync
from ..model.folder import read_manifest, write_manifest
from ..model.parts import PARTS, part_facts, save_part
from ..settings import Run, Stage
from .adapters import FOLDER as ADAPTERS
from .adapters import merged, save_adapters
from .engine.stage_engine import StageEngine
from .proof import Hashes, part_hashes
from .trainable import Group, groups_of


@dataclass
class ModelWriter:
    """Writes model folders of one stage atomically.

    groups: the parameter groups that the stage trains. previous: the model folder that it started from, if any.
    """

    run: Run
    stage: Stage
    parts: Mapping[str, nn.Module]
    groups: Sequence[Group]
    processor: Processor
    previous: Path | None
    world: World

    def write(self, engine: StageEngine, target: Path, averaged: bool = False) -> dict[str, Hashes]:
        """Write a model folder to `target`, replacing it, on the main rank. Returns the hashes of the parts on all.

        averaged: whether to write the average of the weights.
        """
        partial = target.with_name(f"{target.name}.partial")
        manifest, hashes, before = {}, {}, {}
        if self.world.is_main:
            with contextlib.suppress(ValueError):  # there is no valid folder yet
                before = read_manifest(target)
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        for part, module in self.parts.items():
            state = engine.state(module, self.world.is_main, averaged)  # gathered from all ranks
            if not self.world.is_main:
                continue
            groups = groups_of(part, self.groups)
            hashes[part] = part_hashes(module, state, groups)
            if part in PARTS:
                whole = merged(module, state)
                if before.get(part, {}).get("sha256") != hashes[part].whole:
                    save_part(part, module, partial / part, whole)
                else:  # unchanged since the folder was last written
                    shutil.copytree(target / part, partial / part, copy_function=link_or_copy)
                manifest[part] = {**part_facts(whole, hashes[part].whole), "stage": self.stage.name if groups else None}
                if whole.keys() != state.keys():
                    save_adapters(module, state, partial / ADAPTERS / part, self._base(part))
        if self.world.is_main:
            self._hand_on(partial, manifest)
            self.processor.save_pretrained(partial)
            write_manifest(partial, manifest)
            sync(*partial.rglob("*"), partial)
            replace_folder(partial, target)
        self.world.barrier()
        return self.world.from_main(hashes)

    def _base(self, part: str) -> str | None:
        """The source of the weights that a part started from: a folder or Hub ID, or None.

        This is the path in the settings only if neither `init_from` nor an earlier stage has replaced the weights.
        """
        handed_on = {} if self.previous is None else read_manifest(self.previous)
        is_others = self.run.init_from is not None or handed_on.get(part, {}).get("stage") is not None
        if part in handed_on and is_others and part not in self.stage.fresh:
            return str(self.previous / part)
        return getattr(getattr(self.run, part), "path", None)

    def _hand_on(self, folder: Path, manifest: dict[str, dict]) -> None:
        """Keep parts that this stage does not use in the model, as links to the same files where possible."""
        if self.previous is None:
            return
        for part, facts in read_manifest(self.previous).items():
            if part in manifest:
                manifest[part]["stage"] = manifest[part]["stage"] or facts.get("stage")
            elif part not in self.stage.drops:
                shutil.copytree(self.previous / part, folder / part, copy_function=link_or_copy)
                manifest[part] = facts
