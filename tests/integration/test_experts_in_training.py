"""A run that trains only the visual experts of a dense model, which another run has trained."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from ..conftest import train

FEW = ["stages.joint.max_steps=2", "stages.joint.batch_size=4", "workers=0"]
FEW += ["validation.samples=2", "validation.final_samples=2", "validation.max_new_tokens=2"]
EXPERTS = [
    "stages.joint.fresh=[]",
    "stages.joint.train={connector: null, llm: null}",
    "stages.joint.groups=[{match: llm.*.visual, lr: 1e-2}]",
]
FILES = ("model.safetensors", "visual_experts.safetensors")


def test_a_dense_model_gets_experts_that_train_alone(tmp_path):
    dense, run = tmp_path / "dense", tmp_path / "experts"
    train("recipe=kempnerforge", "mini=true", *FEW, f"run_dir={dense}")
    start = f"init_from={dense / 'joint' / 'model'}"
    more = ["stages.joint.layout=packed", "stages.joint.gradient_checkpointing=true", "llm.visual_experts=[mlp]"]
    train("recipe=kempnerforge", "mini=true", *FEW, *EXPERTS, *more, start, f"run_dir={run}")
    before, after = (json.loads((folder / "joint" / "summary.json").read_text()) for folder in (dense, run))
    assert after["validation"]["loss_at_start"] == pytest.approx(before["validation"]["loss"], rel=1e-5)
    assert after["validation"]["loss"] != pytest.approx(before["validation"]["loss"], rel=1e-3)
    received = load_file(dense / "joint" / "model" / "llm" / FILES[0])
    text, visual = (load_file(run / "joint" / "model" / "llm" / file) for file in FILES)
    assert text.keys() == received.keys()
    assert all(tensor.equal(received[name]) for name, tensor in text.items())
    assert {name.replace(".visual", "") for name in visual} == {name for name in received if ".mlp." in name}
    assert not any(tensor.equal(received[name.replace(".visual", "")]) for name, tensor in visual.items())
    llm = after["parts"]["llm"]
    assert llm["trainable_parameters"] == sum(map(torch.numel, visual.values()))
    assert llm["frozen_parameters"] == sum(map(torch.numel, text.values()))
