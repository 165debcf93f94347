"""Scores a model with demonstrations, in the ranks of one process group. Run by test_few_shot.py:

python few_shot_runs.py FOLDER
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from tests.integration.test_evaluation import built
from vlmtrain.data.shapes import Shapes
from vlmtrain.distributed.world import World, leave_world
from vlmtrain.evaluation.few_shot import Demonstrations
from vlmtrain.evaluation.validation import Validator
from vlmtrain.training.engine.joining import join_world

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    world: World = join_world()
    model, processor = built("recipe=quickstart", "stages.instruct.max_length=400")
    found = {}
    batch_size, workers = (4, 0) if world.size == 1 else (3, 1)
    for rices in (False, True):
        shots = Demonstrations(Shapes("instruct", 40), "instruct", [0, 1, 3], rices=rices)
        sizes, options = (batch_size, 3), {"demonstrations": shots, "workers": workers}
        validator = Validator(Shapes("validation", 7), processor, world, torch.float32, *sizes, **options)
        with torch.no_grad():
            found[f"rices={rices}"] = validator.scores(model, 3)
    if world.is_main:
        (folder / f"{world.size}.json").write_text(json.dumps(found))
    leave_world()
