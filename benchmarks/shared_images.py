"""Tokens and time of training with and without shared images, on data with several dialogues about an image.

    python benchmarks/shared_images.py
    python benchmarks/shared_images.py --write docs/data.md

Trains the connector and the language model of a small model on about one epoch, with both values of `share_images` in
turn, in packed rows of 2,048 tokens. An image has 576 tokens, as in LLaVA-1.5. Two public data sets give the numbers of
dialogues. Known are

- LLaVA-665K (Liu et al., 2023, appendix): of 665 thousand records, 364 thousand show one of the at most 118 thousand
  images of COCO's training split, 260 thousand show other images, and 41 thousand none.
- FineVision (its data card, 2025): 90 million questions and 10 billion tokens of answers about 17 million images.

Estimated are the spread of these numbers (one more than a Poisson variable), that an image that is not COCO's has one
record, and the lengths of LLaVA's texts (half 60, half 300 tokens) and of FineVision's questions (20 tokens). A record
of FineVision has all questions about its image in one conversation, where they see each other and need the image once
in any case; here, each is a dialogue of its own.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import islice, zip_longest
from pathlib import Path

import numpy as np
from PIL import Image
from tables import print_or_write

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from vlmtrain.data.loader import StepData, StepStream  # noqa: E402
from vlmtrain.data.sources import build_source  # noqa: E402
from vlmtrain.model import VLMWrapper  # noqa: E402
from vlmtrain.model.attention import attend_in_segments  # noqa: E402
from vlmtrain.objectives.language_modelling import LanguageModelling  # noqa: E402
from vlmtrain.reporting.tables import markdown_table  # noqa: E402
from vlmtrain.settings import compose  # noqa: E402
from vlmtrain.training.assembly import build_parts, build_tokenizer  # noqa: E402
from vlmtrain.training.batching import build_batching  # noqa: E402
from vlmtrain.training.processing import build_processor, image_size_of  # noqa: E402

IMAGES = 100
LINE = [
    *("recipe=quickstart", "stage=instruct", "stages.instruct.fresh=[vision,connector,llm]", "data=llava_json"),
    *("llm.config.hidden_size=256", "llm.config.max_position_embeddings=2048", "stages.instruct.max_length=2048"),
    *("vision.model_config.vision_cfg.image_size=288", "stages.instruct.layout=packed", "data.validation=null"),
]
Told = list[tuple[bool, list[int]]]
"""For each image, or text without one (False), the numbers of words of the dialogues about it."""


def llava(rng: np.random.Generator) -> Told:
    coco, others, texts = 118, 260, 41
    kinds = rng.choice(3, IMAGES, p=np.array([coco, others, texts]) / (coco + others + texts))
    counts = [1 + rng.poisson(364 / coco - 1) if kind == 0 else 1 for kind in kinds]
    return [(bool(kind < 2), rng.choice([60, 300], count).tolist()) for kind, count in zip(kinds, counts)]


def finevision(rng: np.random.Generator) -> Told:
    return [(True, [20 + 10_000 // 90] * (1 + rng.poisson(90 / 17 - 1))) for _ in range(IMAGES)]


DATA: dict[str, Callable[[np.random.Generator], Told]] = {"LLaVA-665K": llava, "FineVision": finevision}


def write_records(told: Told, folder: Path) -> None:
    """Write the dialogues as records in LLaVA's format."""
    records = []
    for number, (shows, dialogues) in enumerate(told):
        shown = {"image": f"{number}.png"} if shows else {}
        if shows:
            Image.new("RGB", (288, 288), (number, 0, 0)).save(folder / f"{number}.png")
        for words in dialogues:
            question = {"from": "human", "value": "<image>\n" * shows + "What color is this?"}
            talk = [question, {"from": "gpt", "value": " ".join(["red"] * words)}]
            records.append({"id": str(len(records)), **shown, "conversations": talk})
    (folder / "data.json").write_text(json.dumps(records))


class Training:
    """Training on the records in a folder, and what it has taken so far."""

    def __init__(self, folder: Path, share_images: bool):
        data = [f"data.images={folder}", f"data.instruct={folder / 'data.json'}"]
        run = compose([*LINE, *data, f"stages.instruct.share_images={str(share_images).lower()}"])
        stage, tokenizer = run.stages["instruct"], build_tokenizer(run)
        parts = build_parts(run, stage, None, tokenizer)
        attend_in_segments(parts["llm"])
        self.model, self.objective = VLMWrapper(parts["vision"], parts["connector"], parts["llm"]), LanguageModelling()
        self.model.vision.requires_grad_(False)
        source = build_source(run.data.split("instruct"), image_size_of(parts), run.seed)
        processor = build_processor(run, stage, parts, self.objective, tokenizer)
        batching = build_batching(source, processor, stage, 1, 0)
        steps = batching.steps_per_epoch
        self.steps = islice(StepStream(batching, source, processor, 0, 1, 0, steps), steps)
        self.dialogues, self.tokens, self.seconds = 0, 0, 0.0

    def step(self, data: StepData) -> None:
        started = time.perf_counter()
        for batch in data.micro_batches:
            self.objective(self.model, batch.to(next(self.model.parameters()).device), None).backward()
        self.seconds += time.perf_counter() - started
        self.dialogues += data.samples
        self.tokens += data.tokens
        self.model.zero_grad()


def table() -> str:
    rows = [("numbers of dialogues of", "dialogues per image", "tokens per dialogue", "shared", "tokens", "time")]
    for name, draw in DATA.items():
        told = draw(np.random.default_rng(0))
        with tempfile.TemporaryDirectory() as folder:
            write_records(told, Path(folder))
            separate, shared = (Training(Path(folder), share_images) for share_images in (False, True))
            for pair in zip_longest(separate.steps, shared.steps):
                for training, data in zip((separate, shared), pair):
                    if data is not None:
                        training.step(data)
        tokens, times = (
            [getattr(each, what) / each.dialogues for each in (separate, shared)] for what in ("tokens", "seconds")
        )
        mean = np.mean([len(dialogues) for shows, dialogues in told if shows])
        cells = (f"{mean:.1f}", f"{tokens[0]:.0f}", f"{tokens[1]:.0f}")
        rows.append((name, *cells, *(f"{1 - after / before:.0%} less" for before, after in (tokens, times))))
    return markdown_table(rows, numbers=True)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as cache:
        os.environ["XDG_CACHE_HOME"] = cache
        print_or_write(table, "shared-images", __doc__)
