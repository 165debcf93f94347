"""Native resolution against stretched images at the same mean number of visual tokens, on images of mixed sizes.

    python benchmarks/native_resolution.py                      # trains 1 + 2 x 3 models, or reads the finished ones
    python benchmarks/native_resolution.py jobs=2 stages.instruct.max_steps=2000 'seeds=[0,1,2,3]'

A small model is first trained on square images of 48 pixels, then with both fits by `vlmtrain ablate`, whose overrides
may be given. Sides from 48 to 96 pixels become 4 to 8 patches of 12 pixels, 6 on average, so an image has 36 tokens on
average with ``native``, and 36 when it is stretched to 72 x 72 pixels. Objects and text have the same size in pixels in
all images.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from vlmtrain.ablation import read_line, run_ablation  # noqa: E402
from vlmtrain.ablation.results import Clusters, interval, mean_of  # noqa: E402
from vlmtrain.files import read_json  # noqa: E402
from vlmtrain.reporting.tables import markdown_table  # noqa: E402

FOLDER = "runs/native-resolution"
CATEGORIES = ("color", "shape", "small", "text")
COMMON = {"recipe": "quickstart", "data": "probes", "data.categories": f"[{','.join(CATEGORIES)}]"}
SQUARES = {**COMMON, "stages.clip.max_steps": "300", "run_dir": f"{FOLDER}/squares"}
FITS = ("{image_fit:native,image_pixels:[2304,9216]}", "{image_fit:squash,image_size:72}")
SETTINGS = {
    **COMMON,
    "connectors": "[mlp]",
    "seeds": "[0,1,2]",
    "run_dir": f"{FOLDER}/fits",
    "stage": "instruct",
    "init_from": f"{FOLDER}/squares/instruct/model",
    "data.sides": "[48,96]",
    "axis.stages.instruct": f"[{','.join(FITS)}]",
    "stages.instruct.train.vision": "2e-4",  # it has seen only squares of one size
    "stages.instruct.max_steps": "800",
}


def table(given: list[str]) -> str:
    """Exact match by category with both fits, and the 95 % interval of the paired difference."""
    run = [sys.executable, "-m", "vlmtrain.train", *(f"{key}={value}" for key, value in SQUARES.items())]
    subprocess.run(run, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    settings = SETTINGS | dict(override.split("=", 1) for override in given)
    ablation = read_line([f"{key}={value}" for key, value in settings.items()])
    failed = run_ablation(ablation)
    if failed:
        raise SystemExit(failed[0][1])
    answers = [
        [read_json(ablation.job(choice, seed) / "instruct" / "answers.json") for seed in ablation.seeds]
        for choice in ablation.choices
    ]
    rows = [("exact match", "native", "squash", "difference (95 %)")]
    for kind in (*CATEGORIES, None):
        measured = [[_scores(seed, kind) for seed in seeds] for seeds in answers]
        blind = [[_scores(seed, kind, "blind_scores") for seed in seeds] for seeds in answers]
        paired = [Clusters(one.sums - other.sums, one.counts) for one, other in zip(*measured)]
        low, high = interval(paired)
        cells = (f"{mean_of(own):.1%} (blind {mean_of(shut):.1%})" for own, shut in zip(measured, blind))
        rows.append((kind or "all", *cells, f"{100 * mean_of(paired):+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"))
    return markdown_table(rows, numbers=True)


def _scores(answers: list[dict], kind: str | None, scores: str = "scores") -> Clusters:
    own = [answer for answer in answers if kind in (None, answer["category"])]
    values = np.array([answer[scores]["exact_match"] for answer in own])
    return Clusters.of(values, np.array([answer["conversation"] for answer in own]))


if __name__ == "__main__":
    print(table(sys.argv[1:]))
