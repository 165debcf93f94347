"""A command, and the files of a finished job."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

QUICKSTART = ["recipe=quickstart", "connectors=[linear,mlp]"]


def finished_job(
    folder: Path,
    rng: np.random.Generator,
    question: str = "What is",
    samples: int = 8,
    right: float = 0.5,
    category: str | None = None,
    fewer: int | None = None,
) -> None:
    """The files of a job that has trained the stage `instruct`; with a category, there is one more score.

    fewer: number of conversations with fewer demonstrations, with which all answers are right; None without them.
    """
    folder.mkdir(parents=True)
    answers = [
        {
            "conversation": i // 5,
            "turn": i % 5,
            "question": f"{question} {i}?",
            "reference": "red",
            "category": category,
            "scores": {"exact_match": float(rng.random() < right)},
            "blind_scores": {"exact_match": 0.0},
            "conversation_loss": [1.0, 2.0],
        }
        for i in range(50)
    ]
    score = float(np.mean([answer["scores"]["exact_match"] for answer in answers]))
    summary = {"steps": 1, "parts": {"connector": {"parameters": 7}}, "validation": {"exact_match": score, "loss": 0.5}}
    summary["validation"] |= {"cider": 1.0, "blind_cider": 0.5} if category else {}
    if fewer is not None:
        for answer in answers:
            for kind, value in (("scores", 1.0), ("blind_scores", 0.5)):
                answer[kind]["exact_match_4_shots"] = value
        few = {"exact_match_4_shots": 1.0, "blind_exact_match_4_shots": 0.5, "blind_exact_match": 0.0}
        summary["validation"] |= {**few, "fewer_than_4_shots": fewer}
    record = {"step": 1, "loss": 1.0, "samples": samples, "samples_per_second": 1.0, "peak_memory_bytes": 1}
    for name, content in (("answers", answers), ("summary", summary), ("samples", [])):
        (folder / f"{name}.json").write_text(json.dumps(content))
    (folder / "metrics.jsonl").write_text(json.dumps(record) + "\n")
