"""Loads checkpoints and writes them again with each engine, in one process group. Run by test_state_over_ranks.py:

python state_runs.py FOLDER NAME          # trains and writes a checkpoint to FOLDER/NAME-ENGINE
python state_runs.py FOLDER FROM NAME     # loads FOLDER/FROM-ENGINE and writes FOLDER/NAME-ENGINE
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from pathlib import Path

from vlmtrain.distributed.world import Stopped, leave_world
from vlmtrain.settings import compose
from vlmtrain.training import run, stage
from vlmtrain.training.bad_steps import BadSteps
from vlmtrain.training.engine.joining import join_world

ENGINES = ("zero0", "zero1", "zero2", "zero3")
STEP = 4


def line(run_dir: Path, engine: str) -> list[str]:
    """Train all parts, with three learning rates, layer decay, and weight decay for some parameters."""
    groups = "{match: vision, lr: 1e-4, layer_decay: 0.8}, {match: 'llm.layers[1:]', lr: 3e-4}"
    return [
        *("recipe=quickstart", "stage=instruct", "stages.instruct.fresh=[vision,connector,llm]", "workers=0"),
        *("data.instruct.size=16", "data.validation=null", f"run_dir={run_dir}", "stages.instruct.max_steps=8"),
        *("stages.instruct.batch_size=4", "stages.instruct.micro_batch_size=1", f"stages.instruct.groups=[{groups}]"),
        *("stages.instruct.optimizer.weight_decay=0.1", f"engine={engine}", "collective_timeout=600"),
        *(["engine.parameter_persistence_threshold=0"] if engine == "zero3" else []),
    ]


def stop_in_time() -> None:
    count = BadSteps.count

    def counted(self, step, *values):
        count(self, step, *values)
        if step == STEP - 1:
            os.kill(os.getpid(), signal.SIGUSR1)

    BadSteps.count = counted


def only_save_again() -> None:
    def saved(self, engine, *values):
        step = self.record["step"]
        engine.set_rates(step)
        groups = [[g["label"], g["lr"], g["weight_decay"]] for g in engine._engine.optimizer.param_groups]
        if self.world.is_main:
            (self.folder.root / "groups.json").write_text(json.dumps(sorted(groups)))
        self.checkpoints.save(engine.training_state, step, self.record)
        raise Stopped("saved again")

    stage._Stage._train = saved


if __name__ == "__main__":
    folder, *names = Path(sys.argv[1]), *sys.argv[2:]
    world = join_world()
    only_save_again() if len(names) == 2 else stop_in_time()
    for engine in ENGINES:
        target = folder / f"{names[-1]}-{engine}"
        if world.is_main and len(names) == 2:
            shutil.copytree(folder / f"{names[0]}-{engine}", target)
        world.barrier()
        try:
            run.train_run(compose(line(target, engine)), world)
        except Stopped:
            continue
        raise AssertionError("the run was not stopped")
    leave_world()
