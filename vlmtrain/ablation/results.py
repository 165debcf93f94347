"""The results of an ablation: scores, their uncertainty, and which differences are significant."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np

from ..evaluation.scores import FEWER
from ..files import read_json
from ..planning.plan import Machine, plan_run
from ..runs.records import read_records, read_summary
from .definition import Ablation, Choice

DRAWS, BLOCK = 2000, 100
"""Number of bootstrap draws, and draws per block."""

RANGES = 100_000
"""Number of simulated ranges."""

ROUNDING = 1e-12
"""Differences up to this size count as zero."""

LEVEL = 0.05
FEW_SEEDS = 3

Interval = tuple[float, float]


@dataclass
class Clusters:
    """Sums and counts (of questions or tokens) for each conversation of one seed."""

    sums: np.ndarray
    counts: np.ndarray

    @classmethod
    def of(cls, values: np.ndarray, conversation: np.ndarray) -> Clusters:
        return cls(np.bincount(conversation, values), np.bincount(conversation).astype(float))


@dataclass
class Entry:
    """One choice: a connector, and a value of each further axis. `measured` is its score, one entry per seed.

    interval, loss_interval: 95 % intervals over seeds and conversations. p_value: of the difference to the best,
    corrected for all pairs (see `compare`); None for the best itself. scores: everything that validation computed,
    averaged over seeds. fewer_shots: numbers of conversations with fewer demonstrations than a score says, summed over
    seeds. by_category: score, interval, and score with the image blanked. chosen: the values that the
    sweep chose. steps: of the stages with a connector. samples: number that the first seed was trained on. questions:
    the questions and their references.
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
    samples: int = 0
    questions: frozenset = frozenset()
    chosen: dict[str, str] = field(default_factory=dict)
    scores: dict[str, float] = field(default_factory=dict)
    fewer_shots: dict[str, int] = field(default_factory=dict)
    by_category: dict[str, tuple[float, Interval, float]] = field(default_factory=dict)
    p_value: float | None = None

    @property
    def runs_differ(self) -> bool:
        """Whether these runs differ from the best ones by more than the choice of questions explains."""
        return self.p_value is not None and self.p_value < LEVEL

    @property
    def is_told_apart(self) -> bool:
        """Whether further runs can be expected to differ too, which takes several seeds to show."""
        return self.runs_differ and len(self.measured) >= FEW_SEEDS


def read_results(ablation: Ablation, without: Collection[Choice] = ()) -> list[Entry]:
    """The results of all choices except `without`, best first. Raises ValueError for a job without the metric.

    Only choices with the same questions as the best are compared with it, since an axis can change the data.
    """
    entries = [_entry(ablation, choice) for choice in ablation.choices if choice not in without]
    entries.sort(key=lambda entry: -entry.score)
    if entries:
        compare([entry for entry in entries if entry.questions == entries[0].questions])
    return entries


def _entry(ablation: Ablation, choice: Choice) -> Entry:
    settings = ablation.settings(choice, ablation.seeds[0])
    last = settings.wanted[-1].name
    folders = [ablation.job(choice, seed) / last for seed in ablation.seeds]
    summaries = [_finished(folder) for folder in folders]
    validations = [summary["validation"] for summary in summaries]
    answers = [read_json(folder / "answers.json") for folder in folders]
    plans = {plan.name: plan for plan in plan_run(settings, Machine()) if "connector" in plan.parts}
    stages = {
        stage.name: ablation.job(choice, ablation.seeds[0]) / stage.name
        for stage in settings.wanted
        if stage.name in plans
    }
    flops = [plan.flops for plan in plans.values()]
    steps = [step for folder in folders for step in read_records(folder / "metrics.jsonl")]
    measured = [_measured(seed, ablation.metric, folder) for seed, folder in zip(answers, folders)]
    names = [name for name in validations[0] if isinstance(validations[0][name], float)]
    sweep = {key for key, _ in ablation.sweep}
    decided = [override.partition("=") for override in ablation.decisions().get(choice.label, {}).get("line", [])]
    losses, parts = [_losses(seed) for seed in answers], summaries[0]["parts"]
    return Entry(
        choice.label,
        mean_of(measured),
        interval(measured),
        measured,
        blind=mean_of([_measured(seed, ablation.metric, folders[0], "blind_scores") for seed in answers]),
        loss=mean_of(losses),
        loss_interval=interval(losses),
        tokens=plans[last].picture_tokens[1],
        parameters=sum(parts[part]["parameters"] for part in ("connector", "fusion") if part in parts),
        samples_per_second=float(np.median([step["samples_per_second"] for step in steps])),
        train_flops=None if None in flops else sum(flops),
        peak_memory_bytes=max(step["peak_memory_bytes"] for step in steps),
        steps={name: _finished(folder)["steps"] for name, folder in stages.items()},
        samples=sum(step["samples"] for folder in stages.values() for step in read_records(folder / "metrics.jsonl")),
        questions=_questions(answers),
        chosen={key: value for key, _, value in decided if key in sweep},
        scores={name: float(np.mean([validation[name] for validation in validations])) for name in names},
        fewer_shots={
            name: sum(validation[name] for validation in validations)
            for name in validations[0]
            if name.startswith(FEWER)
        },
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


def _questions(answers: list[list[dict]]) -> frozenset:
    keys = ("conversation", "turn", "question", "reference")
    return frozenset((number, *(answer[key] for key in keys)) for number, seed in enumerate(answers) for answer in seed)


def _losses(answers: list[dict]) -> Clusters:
    by_conversation = {answer["conversation"]: answer["conversation_loss"] for answer in answers}
    sums, counts = zip(*by_conversation.values())
    return Clusters(np.bincount(list(by_conversation), sums), np.bincount(list(by_conversation), counts))


def _by_category(answers: list[list[dict]], metric: str) -> dict[str, tuple[float, Interval, float]]:
    kinds = sorted({answer["category"] for seed in answers for answer in seed if answer["category"] is not None})
    found = {}
    for kind in kinds:
        own = [[a for a in seed if a["category"] == kind and metric in a["scores"]] for seed in answers]
        if all(own):
            measured = [_measured(seed, metric, Path()) for seed in own]
            blind = [_measured(seed, metric, Path(), "blind_scores") for seed in own]
            found[kind] = (mean_of(measured), interval(measured), mean_of(blind))
    return found


def compare(entries: Sequence[Entry]) -> None:
    """Set the `p_value` of every entry except the best: that of its difference to the best, corrected for all pairs.

    The best is chosen from the same answers, so its differences are compared with the largest difference of all pairs,
    in a paired bootstrap of seeds and conversations, in units of each pair's standard error (the max-statistic of
    Westfall and Young, 1993). With `FEW_SEEDS` seeds or more, Tukey's studentized range with seeds as blocks is used
    too, because a bootstrap of a few seeds underestimates how much they differ. The larger p-value counts.
    """
    best = max(entries, key=lambda entry: entry.score)
    others = [entry for entry in entries if entry is not best]
    if not others:
        return
    p_values = _by_bootstrap(best, others)
    if len(best.measured) >= FEW_SEEDS:
        p_values = np.maximum(p_values, _by_seeds(best, others))
    best.p_value = None
    for entry, p_value in zip(others, p_values):
        entry.p_value = float(p_value)


def _by_bootstrap(best: Entry, others: Sequence[Entry]) -> np.ndarray:
    """p-values of the differences between the other entries and the best one."""
    means = np.array([mean_of(entry.measured) for entry in (best, *others)])
    off = np.stack([_draws(entry.measured) for entry in (best, *others)]) - means[:, None]
    largest = np.zeros(off.shape[1])
    observed = np.zeros(len(others))
    for i in range(len(others)):
        difference = off[i] - off[i + 1 :]
        error = difference.std(1)
        varies = error > ROUNDING
        if varies.any():
            largest = np.maximum(largest, (np.abs(difference[varies]) / error[varies, None]).max(0))
        if i == 0:
            apart = means[0] - means[1:]
            observed = np.where(apart > ROUNDING, apart / np.maximum(error, ROUNDING), 0.0)
    reached = (largest >= observed[:, None]).sum(1)
    return (1 + reached) / (1 + len(largest))


def _by_seeds(best: Entry, others: Sequence[Entry]) -> np.ndarray:
    """The same p-values, from the interaction between connectors and seeds."""
    means = np.array([[mean_of([seed]) for seed in entry.measured] for entry in (best, *others)])
    choices, seeds = means.shape
    own = means.mean(1)
    residuals = means - own[:, None] - means.mean(0) + means.mean()
    degrees = (choices - 1) * (seeds - 1)
    error = math.sqrt((residuals**2).sum() / degrees / seeds)
    apart = own[0] - own[1:]
    return studentized_range(np.where(apart > ROUNDING, apart / max(error, ROUNDING), 0.0), choices, degrees)


def studentized_range(values: np.ndarray, choices: int, degrees: int) -> np.ndarray:
    """Probability that the range of `choices` normal means, in standard errors of `degrees` degrees, is as large.

    Simulated, with an error of 0.002 where the probability is 0.05. Tukey (1953).
    """
    reached = RANGES - np.searchsorted(_ranges(choices, degrees), values)
    return (1 + reached) / (1 + RANGES)


@lru_cache
def _ranges(choices: int, degrees: int) -> np.ndarray:
    """Sorted ranges of `choices` standard normal numbers, each divided by an independent estimate of the error."""
    rng = np.random.default_rng(0)
    errors = np.sqrt(rng.chisquare(degrees, RANGES) / degrees)
    return np.sort(np.ptp(rng.standard_normal((RANGES, choices)), axis=1) / errors)


def _draws(measured: Sequence[Clusters]) -> np.ndarray:
    """Means of resampled seeds and conversations, `DRAWS` times; a draw has the same conversations for all seeds.

    Entries with equally many seeds and conversations have the same draws. All seeds answer the same questions of
    recorded data, so more seeds do not reduce the part of the error that comes from the questions (the pigeonhole
    bootstrap of Owen, 2007, whose intervals are if anything too wide). If the data is generated from the seed, a number
    is a different conversation for each seed; although they are drawn together, their differences average out.
    """
    sums, counts = _side_by_side(measured)
    seeds, conversations = sums.shape
    of_seeds, of_conversations = np.random.default_rng(1), np.random.default_rng(0)
    means = []
    for _ in range(0, DRAWS, BLOCK):
        drawn = _times(of_conversations, conversations)
        weights = _times(of_seeds, seeds)
        total, count = (((drawn @ values.T) * weights).sum(1) for values in (sums, counts))
        means.append(total[count > 0] / count[count > 0])
    return np.concatenate(means)


def _times(rng: np.random.Generator, number: int) -> np.ndarray:
    """How often each of `number` items is drawn in `number` draws with replacement: [BLOCK, number]."""
    drawn = rng.integers(number, size=(BLOCK, number)) + number * np.arange(BLOCK)[:, None]
    return np.bincount(drawn.ravel(), minlength=BLOCK * number).reshape(BLOCK, number).astype(float)


def _side_by_side(measured: Sequence[Clusters]) -> tuple[np.ndarray, np.ndarray]:
    """Sums and counts of the conversations of all seeds: [seeds, conversations], 0 where a seed has no value."""
    sums, counts = np.zeros((2, len(measured), max(len(seed.sums) for seed in measured)))
    for number, seed in enumerate(measured):
        sums[number, : len(seed.sums)], counts[number, : len(seed.counts)] = seed.sums, seed.counts
    has_any = counts.any(0)
    return sums[:, has_any], counts[:, has_any]


def mean_of(measured: Sequence[Clusters]) -> float:
    """Mean over all questions of all seeds."""
    return float(sum(seed.sums.sum() for seed in measured) / sum(seed.counts.sum() for seed in measured))


def interval(measured: Sequence[Clusters]) -> Interval:
    """95 % interval of the mean, over seeds and conversations."""
    low, high = np.quantile(_draws(measured), [0.025, 0.975])
    return float(low), float(high)


def _finished(stage: Path) -> dict:
    summary = read_summary(stage)
    if summary is None:
        raise ValueError(f"{stage} has no summary.json: the job has not finished; repeat the command to resume it")
    return summary
