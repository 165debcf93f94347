"""What a small model reads from a video, compared with one frame, shuffled frames and no video.

    python benchmarks/video.py                                  # trains the model, or reads the finished one
    python benchmarks/video.py --questions 2000 stages.instruct.max_steps=6000

A model is trained from scratch on `data=motion` with `vlmtrain.train`, whose overrides may be given. It then answers
the same questions about videos as they are; about one frame, drawn at random and shown as often as a video has frames;
about the same frames in random order; and without a video.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from vlmtrain.ablation.results import Clusters, interval, mean_of  # noqa: E402
from vlmtrain.data.frame_sampling import uniform  # noqa: E402
from vlmtrain.data.motion import BEATS, CATEGORIES, Motion  # noqa: E402
from vlmtrain.data.processor import Processor  # noqa: E402
from vlmtrain.data.records import Conversation, VideoFacts, VideoSource  # noqa: E402
from vlmtrain.distributed.world import World  # noqa: E402
from vlmtrain.evaluation.scores import Answer  # noqa: E402
from vlmtrain.evaluation.validation import Validator  # noqa: E402
from vlmtrain.model import VLMWrapper  # noqa: E402
from vlmtrain.reporting.tables import markdown_table  # noqa: E402

VIDEO = f"{{fps: null, frames: {BEATS}, sampling: uniform, pool: average, stride: 2}}"
SETTINGS = {
    "recipe": "quickstart",
    "data": "motion",
    "run_dir": "runs/video",
    "data.instruct.size": "100000",
    "stages.clip.max_steps": "200",
    "stages.text.max_steps": "300",
    # captions teach a new connector to read frames, if all parts train
    "stages.align.train": "{vision: 5e-4, connector: 1e-3, llm: 5e-4}",
    "stages.align.max_steps": "1000",
    "stages.instruct.train": "{vision: 3e-4, connector: 5e-4, llm: 5e-4}",
    "stages.instruct.max_steps": "4000",
    **{
        f"stages.{stage}.{key}": value
        for stage in ("align", "instruct")
        for key, value in {"video": VIDEO, "batch_size": "16", "schedule.warmup_steps": "30"}.items()
    },
}


@dataclass(frozen=True)
class Reordered:
    """A video whose frames show other frames of it. shown: the number of the frame that each of some frames shows."""

    video: VideoSource
    shown: dict[int, int]

    def probe(self) -> VideoFacts:
        return self.video.probe()

    def frames(self, numbers: Sequence[int]) -> Iterator[Image.Image]:
        for number in numbers:
            yield from self.video.frames([self.shown[number]])


@dataclass(frozen=True)
class Changed:
    """The questions of a source about videos whose frames are changed. order: of the new frames, given the old ones."""

    source: Motion
    order: Callable[[random.Random, list[int]], list[int]]

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Conversation:
        conversation = self.source[index]
        (video,) = conversation.media
        frames = uniform(video.probe(), None, BEATS, False)
        order = self.order(random.Random(index), frames)
        return Conversation(conversation.id, conversation.turns, (Reordered(video, dict(zip(frames, order))),))


VIEWS: dict[str, Callable[[random.Random, list[int]], list[int]]] = {
    "video": lambda draw, frames: frames,
    "one frame": lambda draw, frames: [draw.choice(frames)] * len(frames),
    "shuffled": lambda draw, frames: draw.sample(frames, len(frames)),
}


def answers(folder: Path, questions: int) -> dict[str, list[Answer]]:
    """The model's answers to the same questions, by what it sees."""
    model, processor = VLMWrapper.from_pretrained(folder), Processor.from_pretrained(folder)
    source = Motion("validation", questions, min(processor.geometry.size))
    world = World(0, 1, torch.device("cpu"))
    found = {}
    with torch.no_grad():
        for name, order in VIEWS.items():
            validator = Validator(Changed(source, order), processor, world, torch.float32, 32, 4)
            found[name] = validator.answers(model, None)
        found["blind"] = validator.answers(model, None, blind=True)
    return found


def table(given: Sequence[str], questions: int) -> str:
    """Exact match by category, and the paired differences from the video, with 95 % intervals over questions."""
    settings = SETTINGS | dict(override.split("=", 1) for override in given)
    command = [sys.executable, "-m", "vlmtrain.train", *(f"{key}={value}" for key, value in settings.items())]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    trained = Path(settings["run_dir"], "instruct", "model")
    if not trained.exists():
        raise SystemExit(f"{settings['run_dir']} is not finished: run the same command again")
    found = answers(trained, questions)
    others = [name for name in found if name != "video"]
    rows = [("exact match", *found, *(f"video minus {name}" for name in others))]
    for kind in (*CATEGORIES, None):
        right = {name: _right(own, kind) for name, own in found.items()}
        cells = [_with_interval(own, "{:.0%}") for own in right.values()]
        cells += [_with_interval(right["video"] - right[name], "{:+.0%}") for name in others]
        rows.append((kind or "all", *cells))
    return markdown_table(rows, numbers=True)


def _right(answers: list[Answer], kind: str | None) -> np.ndarray:
    return np.array([float(answer.is_exact) for answer in answers if kind in (None, answer.grading.category)])


def _with_interval(values: np.ndarray, form: str) -> str:
    measured = [Clusters.of(values, np.arange(len(values)))]
    low, high = interval(measured)
    return f"{form.format(mean_of(measured))} ({form.format(low)} to {form.format(high)})"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=1000)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of vlmtrain.train")
    options = parser.parse_intermixed_args()
    print(table(options.overrides, options.questions))
