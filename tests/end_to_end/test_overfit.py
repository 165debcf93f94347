"""A model that is trained on a few samples long enough reproduces their answers, but not without the images."""

from __future__ import annotations

import json
import sys

from ..conftest import data_overrides, run, train


def test_answers_are_reproduced(llava_files, tmp_path):
    train(
        "recipe=llava_1_5",
        "mini=true",
        *data_overrides(llava_files),
        f"run_dir={tmp_path}",
        "stages.align.max_steps=20",
        "stages.align.batch_size=8",
        "stages.instruct.max_steps=250",
        "stages.instruct.batch_size=8",
        "validation.final_samples=4",
    )
    done = run(
        *(sys.executable, "-m", "vlmtrain.cli", "evaluate", str(tmp_path / "instruct" / "model"), "--json"),
        f"data.validation={llava_files['instruct']}",
        f"data.images={llava_files['images']}",
    )
    scores = json.loads(done.stdout)
    assert scores["questions"] == 32
    assert scores["exact_match"] == 1.0
    # text-only questions need no image; the others cannot be answered without it
    assert scores["blind_exact_match"] < 0.6
