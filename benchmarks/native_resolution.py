"""Native resolution against stretched images at the same mean number of visual tokens, on images of mixed sizes.

    python benchmarks/native_resolution.py                      # trains 2 x 3 models, or reads the finished ones
    python benchmarks/native_resolution.py jobs=2 stages.instruct.max_steps=4000 'seeds=[0,1,2,3]'

The same small model is trained with both fits by `vlmtrain ablate`, whose overrides may be given. Sides from 36 to 84
pixels become 3 to 7 patches of 12 pixels, 5 on average, so an image has 25 tokens on average with ``native``, and 25
when it is stretched to 60 x 60 pixels. Objects and text have the same size in pixels in all images.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from vlmtrain.ablation import read_line, run_ablation  # noqa: E402
from vlmtrain.ablation.results import Clusters, interval, mean_of  # noqa: E402
from vlmtrain.files import read_json  # noqa: E402
from vlmtrain.reporting.tables import markdown_table  # noqa: E402

CATEGORIES = ("small", "text")
FITS = ("{image_fit:native,image_pixels:[1296,7056]}", "{image_fit:squash,image_size:60}")
SETTINGS = {
    "recipe": "quickstart",
    "connectors": "[mlp]",
    "seeds": "[0,1,2]",
    "run_dir": "runs/native-resolution",
    "data": "probes",
    "data.sides": "[36,84]",
    "data.categories": f"[{','.join(CATEGORIES)}]",
    # the scenes have many questions each, from which a small model learns to look at images
    "data.instruct": "{scenes: {format: shapes, split: instruct, size: 20000}, probes: {split: instruct, size: 20000}}",
    "axis.stages.instruct": f"[{','.join(FITS)}]",
    "stages.instruct.train.vision": "2e-4",  # the shared stages before show all images as squares
    "stages.instruct.max_steps": "600",
}


def table(given: list[str]) -> str:
    """Exact match by category with both fits, and the 95 % interval of the paired difference."""
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
        rows.append((kind or "both", *cells, f"{100 * mean_of(paired):+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"))
    return markdown_table(rows, numbers=True)


def _scores(answers: list[dict], kind: str | None, scores: str = "scores") -> Clusters:
    own = [answer for answer in answers if kind in (None, answer["category"])]
    values = np.array([answer[scores]["exact_match"] for answer in own])
    return Clusters.of(values, np.array([answer["conversation"] for answer in own]))


if __name__ == "__main__":
    print(table(sys.argv[1:]))
