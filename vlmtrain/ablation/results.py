"""What an ablation found: scores with their uncertainty, and which differences are more than chance."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..planning.plan import Machine, plan_run
from .jobs import Ablation, Choice

DRAWS = 2000
LEVEL = 0.05
FEW_SEEDS = 3


@dataclass
class Entry:
    """One connector. Shares are of 1; `exact` and `conversation` have an array a seed: whether each question was
    answered, and whose it is. (Procedural data asks other questions for each seed.)

    interval: 95 % over seeds and conversations; p_value: of the difference to the best, corrected for the number of
    comparisons (Holm), None for the best itself.
    """

    label: str
    score: float
    interval: tuple[float, float]
    blind: float
    loss: float
    tokens: int
    parameters: int
    samples_per_second: float
    train_flops: float | None
    peak_memory_bytes: int
    exact: list[np.ndarray]
    conversation: list[np.ndarray]
    p_value: float | None = None

    @property
    def is_told_apart(self) -> bool:
        """Whether it differs from the best by more than chance."""
        return self.p_value is not None and self.p_value < LEVEL


def read_results(ablation: Ablation) -> list[Entry]:
    """The results of all jobs, best first. Raises ValueError for a job without validation."""
    entries = [_entry(ablation, choice) for choice in ablation.choices]
    compare(entries)
    return sorted(entries, key=lambda entry: -entry.score)


def _entry(ablation: Ablation, choice: Choice) -> Entry:
    settings = ablation.settings(choice, ablation.seeds[0])
    last = list(settings.stages)[-1]
    folders = [ablation.job(choice, seed) / last for seed in ablation.seeds]
    summaries = [_read(folder / "summary.json") for folder in folders]
    answers = [_read(folder / "answers.json") for folder in folders]
    if any(summary["validation"] is None for summary in summaries):
        raise ValueError(f"stage {last} has no validation, so there is nothing to compare: set data.validation")
    steps = [json.loads(line) for folder in folders for line in (folder / "metrics.jsonl").read_text().splitlines()]
    plans = {plan.name: plan for plan in plan_run(settings, Machine())}
    flops = [plan.flops for plan in plans.values() if "connector" in plan.parts]
    exact = [np.array([answer["exact"] for answer in seed], dtype=float) for seed in answers]
    conversation = [np.array([answer["conversation"] for answer in seed]) for seed in answers]
    return Entry(
        choice.label,
        float(np.concatenate(exact).mean()),
        _interval(exact, conversation),
        _mean(summary["validation"]["blind_exact_match"] for summary in summaries),
        _mean(summary["validation"]["loss"] for summary in summaries),
        plans[last].picture_tokens[1],
        summaries[0]["parts"]["connector"]["parameters"],
        float(np.median([step["samples_per_second"] for step in steps])),
        None if None in flops else sum(flops),
        max(step["peak_memory_bytes"] for step in steps),
        exact,
        conversation,
    )


def compare(entries: Sequence[Entry]) -> None:
    """Set every entry's `p_value` against the best, by a paired bootstrap over seeds and conversations."""
    best = max(entries, key=lambda entry: entry.score)
    others = [entry for entry in entries if entry is not best]
    differences = [[a - b for a, b in zip(best.exact, entry.exact)] for entry in others]
    raw = [_p_value(difference, best.conversation) for difference in differences]
    # Holm: the smallest is multiplied by the number of comparisons, the next by one less, and so on
    corrected = 0.0
    for rank, number in enumerate(np.argsort(raw)):
        corrected = max(corrected, min(1.0, raw[number] * (len(raw) - rank)))
        others[number].p_value = corrected
    best.p_value = None


def _draws(values: list[np.ndarray], conversations: list[np.ndarray]) -> np.ndarray:
    """Means of `values`, with seeds and, within each, conversations drawn again, `DRAWS` times."""
    rng = np.random.default_rng(0)
    sums, counts = [], []
    for value, conversation in zip(values, conversations):
        _, numbers = np.unique(conversation, return_inverse=True)
        sums.append(np.bincount(numbers, value))
        counts.append(np.bincount(numbers))
    means = np.empty(DRAWS)
    for draw in range(DRAWS):
        total = questions = 0.0
        for seed in rng.integers(len(values), size=len(values)):
            drawn = rng.integers(len(sums[seed]), size=len(sums[seed]))
            total += sums[seed][drawn].sum()
            questions += counts[seed][drawn].sum()
        means[draw] = total / questions
    return means


def _interval(exact: list[np.ndarray], conversations: list[np.ndarray]) -> tuple[float, float]:
    low, high = np.quantile(_draws(exact, conversations), [0.025, 0.975])
    return float(low), float(high)


def _p_value(difference: list[np.ndarray], conversations: list[np.ndarray]) -> float:
    means = _draws(difference, conversations)
    return float(min(1.0, 2 * (1 + min((means <= 0).sum(), (means >= 0).sum())) / (DRAWS + 1)))


def _mean(values) -> float:
    return float(np.mean(list(values)))


def _read(file: Path) -> dict | list:
    try:
        return json.loads(file.read_text())
    except FileNotFoundError:
        raise ValueError(f"{file} is missing: the job has not finished; run the same line again") from None
