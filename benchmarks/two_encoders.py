"""Two encoders that see different things, alone and together.

    python benchmarks/two_encoders.py                           # trains the encoders and 3 x 3 models, or reads them
    python benchmarks/two_encoders.py jobs=2 'seeds=[0,1,2,3]'

Two small encoders are trained contrastively on the same images. The captions of one name only colors and places, those
of the other only shapes and places, so that the last layer of each keeps little of the rest. `vlmtrain ablate`, whose
overrides may be given, then trains the same model with the first, the second, and both (`vision=several`), with frozen
encoders, and asks for colors and shapes of combinations that no training image has.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from vlmtrain.ablation import read_line, run_ablation  # noqa: E402
from vlmtrain.ablation.results import Clusters, interval, mean_of  # noqa: E402
from vlmtrain.data.shapes import Item, Shapes  # noqa: E402
from vlmtrain.files import read_json  # noqa: E402
from vlmtrain.reporting.tables import markdown_table  # noqa: E402

FOLDER = Path("runs/two-encoders")
NAMES: dict[str, Callable[[Item], str]] = {"color": lambda item: item.color, "shape": lambda item: item.shape}
IMAGES = 8000
ENCODER = {
    "recipe": "quickstart",
    "stage": "clip",
    "data": "llava_json",
    "stages.clip.data": "align",
    "data.images": str(FOLDER / "images"),
    "data.validation": "null",
    "stages.clip.max_steps": "400",
}
TEXT = {"recipe": "quickstart", "stage": "text", "data": "probes", "run_dir": str(FOLDER / "text")}
SETTINGS = {
    "recipe": "quickstart",
    "stage": "instruct",
    "data": "probes",
    "data.categories": "[color,shape]",
    "init_from": str(FOLDER / "text/text/model"),
    "connectors": "[mlp]",
    "seeds": "[0,1,2]",
    "run_dir": str(FOLDER / "ablation"),
    "stages.instruct.fresh": "[connector]",
    "stages.instruct.max_steps": "1000",
}


def train(settings: dict[str, str]) -> None:
    command = [sys.executable, "-m", "vlmtrain.train", *(f"{key}={value}" for key, value in settings.items())]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})


def write_captions() -> None:
    """Write the images, and captions for each encoder in LLaVA's format."""
    scenes = Shapes("caption", IMAGES)
    (FOLDER / "images").mkdir(parents=True, exist_ok=True)
    records: dict[str, list[dict]] = {name: [] for name in NAMES}
    for number in range(IMAGES):
        (picture,) = scenes[number].images
        file = FOLDER / "images" / f"{number}.png"
        if not file.exists():
            picture.load().save(file)
        for name, word in NAMES.items():
            said = f"{', '.join(f'{item.place} {word(item)}' for item in picture.items)}."
            turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": said}]
            records[name].append({"id": str(number), "image": file.name, "conversations": turns})
    for name, own in records.items():
        (FOLDER / f"{name}.json").write_text(json.dumps(own))


def table(given: list[str]) -> str:
    """Exact match by category, and the 95 % intervals of the paired differences from both encoders."""
    write_captions()
    for name in NAMES:
        train({**ENCODER, "data.align": str(FOLDER / f"{name}.json"), "run_dir": str(FOLDER / name)})
    train(TEXT)
    encoders = {
        name: f"{{provider: tiny, layer: -1, pretrained: {FOLDER / name / 'clip/model/vision/model.safetensors'}}}"
        for name in NAMES
    }
    both = ", ".join(f"{name}: {keys}" for name, keys in encoders.items())
    axis = ", ".join(f"{name}: {keys}" for name, keys in encoders.items()) + f", both: {{encoders: {{{both}}}}}"
    settings = {**SETTINGS, "axis.vision": f"{{{axis}}}"} | dict(override.split("=", 1) for override in given)
    ablation = read_line([f"{key}={value}" for key, value in settings.items()])
    failed = run_ablation(ablation)
    if failed:
        raise SystemExit(failed[0][1])
    answers = [
        [read_json(ablation.job(choice, seed) / "instruct" / "answers.json") for seed in ablation.seeds]
        for choice in ablation.choices
    ]
    head = ["exact match", *(f"{name} encoder" for name in NAMES), "both"]
    rows = [(*head, *(f"both minus {name} (95 %)" for name in NAMES))]
    for kind in (*NAMES, None):
        measured = [[_scores(seed, kind) for seed in seeds] for seeds in answers]
        differences = []
        for alone in measured[:-1]:
            paired = [Clusters(one.sums - other.sums, one.counts) for one, other in zip(measured[-1], alone)]
            low, high = interval(paired)
            differences.append(f"{100 * mean_of(paired):+.1f} ({100 * low:+.1f} to {100 * high:+.1f})")
        rows.append((kind or "all", *(f"{mean_of(own):.1%}" for own in measured), *differences))
    return markdown_table(rows, numbers=True)


def _scores(answers: list[dict], kind: str | None) -> Clusters:
    own = [answer for answer in answers if kind in (None, answer["category"])]
    values = np.array([answer["scores"]["exact_match"] for answer in own])
    return Clusters.of(values, np.array([answer["conversation"] for answer in own]))


if __name__ == "__main__":
    print(table(sys.argv[1:]))
