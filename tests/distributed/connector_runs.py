"""Trains one small stage with each connector, all in one process group. Run by test_connectors_in_training.py:

python connector_runs.py FOLDER ENGINE PRECISION NAME...
"""

from __future__ import annotations

import sys
from pathlib import Path

from vlmtrain.settings import compose
from vlmtrain.training.run import train_run
from vlmtrain.world import join_world, leave_world


def line(folder: Path, engine: str, precision: str, name: str) -> list[str]:
    return [
        "recipe=quickstart",
        "mini=true",
        f"connector={name}",
        "stage=instruct",
        "stages.instruct.fresh=[connector]",
        "stages.instruct.max_steps=4",
        "stages.instruct.batch_size=8",
        "stages.instruct.schedule.name=constant",
        "stages.instruct.schedule.warmup_ratio=0",
        "data.instruct.size=8",
        "validation.final_samples=4",
        "validation.max_new_tokens=2",
        "workers=0",
        f"engine={engine}",
        f"precision={precision}",
        f"run_dir={folder / name}",
    ]


if __name__ == "__main__":
    folder, engine, precision, *names = sys.argv[1:]
    world = join_world()
    for name in names:
        train_run(compose(line(Path(folder), engine, precision, name)), world)
    leave_world()
