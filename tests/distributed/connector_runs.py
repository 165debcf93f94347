"""Trains one small stage with each connector, all in one process group. Run by test_connectors_in_training.py:

python connector_runs.py FOLDER ENGINE PRECISION NAME...
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from vlmtrain.data.processor import Processor
from vlmtrain.data.sources import build_source
from vlmtrain.distributed.world import World, leave_world
from vlmtrain.evaluation.validation import Validator
from vlmtrain.model import VLMWrapper
from vlmtrain.model.parts import module_state
from vlmtrain.settings import Run, compose
from vlmtrain.training.assembly import build_parts, build_tokenizer
from vlmtrain.training.engine.joining import join_world
from vlmtrain.training.run import train_run


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
        # so that all parameters are partitioned, as at published sizes
        *(["engine.parameter_persistence_threshold=0"] if engine == "zero3" else []),
    ]


def record(folder: Path, settings: Run, world: World) -> None:
    """Save what the tests compare: initial weights, names of trainable parameters, and the loss of the saved model."""
    tokenizer = build_tokenizer(settings)
    connector = build_parts(settings, settings.stages["instruct"], None, tokenizer)["connector"]
    save_file(module_state(connector), folder / "initial_connector.safetensors")
    trained = [key for key, parameter in connector.named_parameters() if parameter.requires_grad]
    (folder / "trained.json").write_text(json.dumps(trained))
    model_dir = folder / "instruct" / "model"
    processor = Processor.from_pretrained(model_dir)
    source = build_source(settings.data.split("validation"), processor.geometry.size, settings.seed)
    validator = Validator(source, processor, world, torch.float32, settings.validation.batch_size, 2)
    with torch.no_grad():
        loss = validator.loss(VLMWrapper.from_pretrained(model_dir), settings.validation.final_samples)
    (folder / "reloaded.json").write_text(json.dumps({"loss": loss}))


if __name__ == "__main__":
    folder, engine, precision, *names = sys.argv[1:]
    world = join_world()
    for name in names:
        settings = compose(line(Path(folder), engine, precision, name))
        train_run(settings, world)
        if world.size == 1 and precision == "fp32":
            record(Path(folder) / name, settings, world)
    leave_world()
