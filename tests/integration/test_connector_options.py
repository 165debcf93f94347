"""A stage may change how its connector works, as long as its weights still fit."""

from __future__ import annotations

import sys

import torch

from vlmtrain.model.folder import read_manifest
from vlmtrain.model.parts import load_part, module_state
from vlmtrain.planning.plan import Machine, plan_run
from vlmtrain.settings import compose

from ..conftest import data_overrides, metrics, run, train

SMALL = [
    "recipe=llava_1_5",
    "mini=true",
    "workers=0",
    "stages.align.max_steps=2",
    "stages.align.batch_size=4",
    "stages.instruct.max_steps=2",
    "stages.instruct.batch_size=4",
]


def test_another_window_gives_fewer_tokens_with_the_same_weights(llava_files, tmp_path):
    change = "stages.instruct.connector_options={avgpool: {window: 4}}"
    line = ["connector=avgpool", "connector.window=2", change, "stages.instruct.train.connector=1e-12"]
    train(*SMALL, *data_overrides(llava_files), "data.validation=null", f"run_dir={tmp_path}", *line)
    align, instruct = (load_part("connector", tmp_path / stage / "model") for stage in ("align", "instruct"))
    grid = align.config["input_grid"]
    assert align.num_tokens(*grid) == 4 * instruct.num_tokens(*grid)
    for name, tensor in module_state(align).items():
        torch.testing.assert_close(module_state(instruct)[name], tensor, rtol=0, atol=1e-9)
    pictures = {stage: metrics(tmp_path, stage)[0]["image_tokens"] for stage in ("align", "instruct")}
    assert pictures["align"] == 4 * align.num_tokens(*grid)  # one image per record
    assert pictures["instruct"] % instruct.num_tokens(*grid) == 0 and pictures["instruct"] > 0
    assert read_manifest(tmp_path / "instruct" / "model")["connector"]["stage"] == "instruct"
    planned = plan_run(compose([*SMALL, *line]), Machine())
    assert [stage.picture_tokens[0] for stage in planned] == [align.num_tokens(*grid), instruct.num_tokens(*grid)]


def test_options_that_need_new_weights_are_refused_before_training(llava_files, tmp_path):
    for change, said in (
        ("{mlp: {depth: 3}}", "not in the received connector and not in stages.instruct.fresh: layers.4"),
        ("{mpl: {depth: 3}}", "unknown connector mpl. Did you mean 'mlp'?"),
        ("{mlp: {deep: 3}}", "Unknown option stages.instruct.connector_options.mlp.deep of 'mlp'"),
    ):
        wrong = [*SMALL, *data_overrides(llava_files), f"run_dir={tmp_path}"]
        command = [sys.executable, "-m", "vlmtrain.train", *wrong, f"stages.instruct.connector_options={change}"]
        done = run(*command, check=False)
        assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1, done.stderr[-2000:]
        assert not (tmp_path / "align").exists()
