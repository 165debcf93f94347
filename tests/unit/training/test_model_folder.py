"""A model folder contains the current parts, whatever was in its place before."""

from __future__ import annotations

import pytest
import torch

from vlmtrain.data.processor import Processor
from vlmtrain.distributed.world import World
from vlmtrain.model.folder import write_manifest
from vlmtrain.model.parts import load_part, module_state
from vlmtrain.model.vision import build_vision
from vlmtrain.settings import compose
from vlmtrain.training.model_folder import ModelWriter

from ...stages import make_stage

VISION = {
    "embed_dim": 12,
    "vision_cfg": {"image_size": 16, "layers": 2, "width": 24, "head_width": 12, "patch_size": 8},
    "text_cfg": {"context_length": 8, "vocab_size": 32, "width": 16, "heads": 2, "layers": 1},
}


class Engine:
    """A single process without sharding."""

    def state(self, module, keep, averaged=False):
        return {name: tensor.clone() for name, tensor in module_state(module).items()}


def test_a_frozen_part_is_not_copied_from_a_folder_with_other_weights(tmp_path, tokenizer):
    vision = build_vision("open_clip", model_config=VISION)
    run = compose(["recipe=quickstart"])
    processor = Processor(tokenizer, None, "plain", 64)
    writer = ModelWriter(run, make_stage(), {"vision": vision}, [], processor, None, World(0, 1, torch.device("cpu")))
    writer.write(Engine(), tmp_path / "best")
    with torch.no_grad():
        for parameter in vision.parameters():
            parameter.mul_(0.5)
    writer.write(Engine(), tmp_path / "best")
    found = module_state(load_part("vision", tmp_path / "best"))
    assert all(tensor.equal(found[name]) for name, tensor in module_state(vision).items())


@pytest.mark.parametrize(
    "start, stage, fresh, expected",
    [
        (None, None, [], "hub/id"),  # frozen so far
        (None, "align", [], "before"),
        ("imported", None, [], "before"),
        ("imported", None, ["llm"], "hub/id"),
    ],
)
def test_adapters_name_the_weights_that_they_fit(start, stage, fresh, expected, tmp_path, tokenizer):
    (tmp_path / "before").mkdir()
    write_manifest(tmp_path / "before", {"llm": {"sha256": "", "dtype": "float32", "stage": stage}})
    settings = compose(["recipe=llava_1_5", "llm.path=hub/id", f"init_from={start or 'null'}"])
    processor = Processor(tokenizer, None, "plain", 64)
    world = World(0, 1, torch.device("cpu"))
    writer = ModelWriter(settings, make_stage(fresh=fresh), {}, [], processor, tmp_path / "before", world)
    assert writer._base("llm") == (expected if "/" in expected else str(tmp_path / expected / "llm"))
