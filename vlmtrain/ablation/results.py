"""What an ablation found: scores with their uncertainty, and which differences are more than chance."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..planning.plan import Machine, plan_run
from ..run_files import read_json, read_records, read_summary
from .jobs import wanted_stages
from .line import Ablation, Choice

DRAWS = 2000
LEVEL = 0.05
FEW_SEEDS = 3

Interval = tuple[float, float]


@dataclass
class Clusters:
    """Values of the conversations of a seed: their sums, and what those are divided by (questions, or tokens)."""

    sums: np.ndarray
    counts: np.ndarray

    @classmethod
    def of(cls, values: np.ndarray, conversation: np.ndarray) -> Clusters:
        _, numbers = np.unique(conversation, return_inverse=True)
        return cls(np.bincount(numbers, values), np.bincount(numbers).astype(float))

    def minus(self, other: Clusters) -> Clusters:
        return Clusters(self.sums - other.sums, self.counts)


@dataclass
class Entry:
    """One choice: a connector, and a value of each further axis. `measured` is its score, a seed after the other.

    interval, loss_interval: 95 % over seeds and conversations; p_value: of the difference to the best, corrected for
    the number of comparisons (Holm), None for the best itself. scores: all that validation computed, means over seeds.
    by_category: score and interval. chosen: what the sweep chose. steps: of the stages with a connector.
    """

    label: str
    score: float
    interval: Interval
    measured: list[Clusters]
    blind: float = 0.0
    loss: float = 0.0
    loss_interval: Interval = (0.0, 0.0)
    tokens: int = 0
    parameters: int = 0
    samples_per_second: float = 0.0
    train_flops: float | None = None
    peak_memory_bytes: int = 0
    steps: dict[str, int] = field(default_factory=dict)
    chosen: dict[str, str] = field(default_factory=dict)
    scores: dict[str, float] = field(default_factory=dict)
    by_category: dict[str, tuple[float, Interval]] = field(default_factory=dict)
    p_value: float | None = None

    @property
    def runs_differ(self) -> bool:
        """Whether these runs answer differently from the best one's, by more than the choice of questions explains."""
        return self.p_value is not None and self.p_value < LEVEL

    @property
    def is_told_apart(self) -> bool:
        """Whether other runs may be expected to differ too: that takes several."""
        return self.runs_differ and len(self.measured) >= FEW_SEEDS


def read_results(ablation: Ablation) -> list[Entry]:
    """The results of all jobs, best first. Raises ValueError for a job without validation, or without the metric."""
    entries = [_entry(ablation, choice) for choice in ablation.choices]
    sizes = {tuple(len(seed.sums) for seed in entry.measured) for entry in entries}
    if len(sizes) > 1:
        raise ValueError(f"{ablation.folder}: the jobs answered different questions, so they cannot be compared")
    compare(entries)
    return sorted(entries, key=lambda entry: -entry.score)


def _entry(ablation: Ablation, choice: Choice) -> Entry:
    settings = ablation.settings(choice, ablation.seeds[0])
    last = wanted_stages(settings)[-1]
    folders = [ablation.job(choice, seed) / last for seed in ablation.seeds]
    summaries = [_finished(folder) for folder in folders]
    validations = [summary["validation"] for summary in summaries]
    if None in validations:
        raise ValueError(f"stage {last} has no validation, so there is nothing to compare: set data.validation")
    answers = [read_json(folder / "answers.json") for folder in folders]
    plans = {plan.name: plan for plan in plan_run(settings, Machine()) if "connector" in plan.parts}
    flops = [plan.flops for plan in plans.values()]
    steps = [step for folder in folders for step in read_records(folder / "metrics.jsonl")]
    measured = [_measured(seed, ablation.metric, folder) for seed, folder in zip(answers, folders)]
    names = [name for name in validations[0] if isinstance(validations[0][name], float)]
    sweep = {key for key, _ in ablation.sweep}
    decided = [override.partition("=") for override in ablation.decisions().get(choice.label, {}).get("line", [])]
    losses = [_losses(seed) for seed in answers]
    return Entry(
        choice.label,
        _mean_of(measured),
        _interval(measured),
        measured,
        blind=_mean_of([_measured(seed, ablation.metric, folders[0], "blind_scores") for seed in answers]),
        loss=_mean_of(losses),
        loss_interval=_interval(losses),
        tokens=plans[last].picture_tokens[1],
        parameters=summaries[0]["parts"]["connector"]["parameters"],
        samples_per_second=float(np.median([step["samples_per_second"] for step in steps])),
        train_flops=None if None in flops else sum(flops),
        peak_memory_bytes=max(step["peak_memory_bytes"] for step in steps),
        steps={name: plan.steps for name, plan in plans.items()},
        chosen={key: value for key, _, value in decided if key in sweep},
        scores={name: float(np.mean([validation[name] for validation in validations])) for name in names},
        by_category=_by_category(answers, ablation.metric),
    )


def _measured(answers: list[dict], metric: str, folder: Path, kind: str = "scores") -> Clusters:
    judged = [answer for answer in answers if metric in answer[kind]]
    if not judged:
        known = sorted({name for answer in answers for name in answer[kind]})
        raise ValueError(
            f"metric={metric}: no question of {folder / 'answers.json'} has it; they have {', '.join(known)}"
        )
    return Clusters.of(
        np.array([answer[kind][metric] for answer in judged]), np.array([answer["conversation"] for answer in judged])
    )


def _losses(answers: list[dict]) -> Clusters:
    by_conversation = {answer["conversation"]: answer["conversation_loss"] for answer in answers}
    sums, counts = zip(*by_conversation.values())
    return Clusters(np.array(sums), np.array(counts))


def _by_category(answers: list[list[dict]], metric: str) -> dict[str, tuple[float, Interval]]:
    kinds = sorted({answer["category"] for seed in answers for answer in seed if answer["category"] is not None})
    found = {}
    for kind in kinds:
        own = [[a for a in seed if a["category"] == kind and metric in a["scores"]] for seed in answers]
        if all(own):
            measured = [_measured(seed, metric, Path()) for seed in own]
            found[kind] = (_mean_of(measured), _interval(measured))
    return found


def compare(entries: Sequence[Entry]) -> None:
    """Set every entry's `p_value` against the best.

    A paired bootstrap over seeds and conversations; from `FEW_SEEDS` seeds on also a paired t-test over the seeds,
    since resampling a few seeds makes too little of how much they differ. The larger of the two counts.
    """
    best = max(entries, key=lambda entry: entry.score)
    others = [entry for entry in entries if entry is not best]
    raw = [_p_value([a.minus(b) for a, b in zip(best.measured, entry.measured)]) for entry in others]
    # Holm: the smallest is multiplied by the number of comparisons, the next by one less, and so on
    corrected = 0.0
    for rank, number in enumerate(np.argsort(raw)):
        corrected = max(corrected, min(1.0, raw[number] * (len(raw) - rank)))
        others[number].p_value = corrected
    best.p_value = None


def _draws(measured: list[Clusters]) -> np.ndarray:
    """Means, with seeds and, within each, conversations drawn again, `DRAWS` times."""
    rng = np.random.default_rng(0)
    total, count = np.zeros(DRAWS), np.zeros(DRAWS)
    for chosen in rng.integers(len(measured), size=(len(measured), DRAWS)):
        for number, seed in enumerate(measured):
            (draws,) = np.nonzero(chosen == number)
            drawn = rng.integers(len(seed.sums), size=(len(draws), len(seed.sums)))
            total[draws] += seed.sums[drawn].sum(1)
            count[draws] += seed.counts[drawn].sum(1)
    return total / count


def _mean_of(measured: Sequence[Clusters]) -> float:
    return float(sum(seed.sums.sum() for seed in measured) / sum(seed.counts.sum() for seed in measured))


def _interval(measured: list[Clusters]) -> Interval:
    low, high = np.quantile(_draws(measured), [0.025, 0.975])
    return float(low), float(high)


def _p_value(differences: list[Clusters]) -> float:
    means = _draws(differences)
    p_value = float(min(1.0, 2 * (1 + min((means <= 0).sum(), (means >= 0).sum())) / (DRAWS + 1)))
    if len(differences) < FEW_SEEDS:
        return p_value
    return max(p_value, t_test([seed.sums.sum() / seed.counts.sum() for seed in differences]))


def t_test(values: Sequence[float]) -> float:
    """Two-sided p-value of a mean other than 0, by Student's t."""
    spread = float(np.std(values, ddof=1))
    if spread == 0:
        return 1.0 if np.mean(values) == 0 else 0.0
    degrees = len(values) - 1
    statistic = abs(float(np.mean(values))) / (spread / math.sqrt(len(values)))
    # with t = sqrt(degrees) tan(angle), Student's density is proportional to cos(angle)^(degrees - 1)
    angles = np.linspace(0, math.pi / 2, 20_001)
    density = np.cos(angles) ** (degrees - 1)
    below = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return float(1 - np.interp(math.atan(statistic / math.sqrt(degrees)), angles, below) / below[-1])


def _finished(stage: Path) -> dict:
    summary = read_summary(stage)
    if summary is None:
        raise ValueError(f"{stage} has no summary.json: the job has not finished; run the same line again")
    return summary
