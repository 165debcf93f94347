"""The statistics of an ablation, compared with known cases."""

from __future__ import annotations

import numpy as np
import pytest

from vlmtrain.ablation import Entry, compare, read_line
from vlmtrain.ablation.results import Clusters, interval, studentized_range
from vlmtrain.ablation.show import main_table, note


def entry(label: str, exact: list[np.ndarray]) -> Entry:
    # five questions per image
    measured = [Clusters.of(seed, np.arange(len(seed)) // 5) for seed in exact]
    return Entry(label, float(np.concatenate(exact).mean()), (0, 0), measured)


def answers(rng, rate: float, seeds: int = 3, questions: int = 500) -> list[np.ndarray]:
    """Seeds with different numbers of questions."""
    return [(rng.random(questions + 5 * seed) < rate).astype(float) for seed in range(seeds)]


def test_equal_connectors_are_not_distinguished_and_different_ones_are():
    rng = np.random.default_rng(0)
    same, other, worse = (entry(name, answers(rng, rate)) for name, rate in (("a", 0.6), ("b", 0.6), ("c", 0.45)))
    compare([same, other, worse])
    best, second = sorted((same, other), key=lambda e: -e.score)
    assert best.p_value is None and not second.is_told_apart and second.p_value > 0.05
    assert worse.is_told_apart


def test_equal_connectors_are_rarely_distinguished():
    """Without a difference, about one comparison in twenty is called significant, corrected for five comparisons."""
    rng, called = np.random.default_rng(1), 0
    for _ in range(20):
        entries = [entry(str(i), answers(rng, 0.5, questions=200)) for i in range(3)]
        compare(entries)
        called += any(e.is_told_apart for e in entries)
    assert called <= 4


def test_differences_between_seeds_are_not_attributed_to_connectors():
    """Runs whose rates vary only by seed, by ten points up and down: a plain bootstrap of three seeds would call many
    of them different."""
    rng, called = np.random.default_rng(4), 0
    for _ in range(60):
        rates = 0.5 + 0.1 * rng.standard_normal((2, 3))
        entries = [
            entry(str(i), [(rng.random(400) < rate).astype(float) for rate in own]) for i, own in enumerate(rates)
        ]
        compare(entries)
        called += any(e.is_told_apart for e in entries)
    assert called <= 6  # 3 are expected of 60 at a level of 5 %; more than 6, one time in thirty


@pytest.mark.parametrize(
    "value, choices, degrees", [(6.085, 2, 2), (3.877, 3, 10), (4.199, 4, 12), (4.232, 5, 20), (5.008, 10, 20)]
)
def test_the_studentized_range_is_that_of_the_tables(value, choices, degrees):
    """5 % points of Tukey's distribution; of two choices, Student's times the root of two."""
    assert studentized_range(np.array([value]), choices, degrees) == pytest.approx(0.05, abs=0.0025)


def questions_of_their_own(rng, choices: int, seeds: int, conversations: int = 40) -> list[Entry]:
    """Equal choices, each of which is good at some conversations with every seed."""
    rates = np.clip(0.5 + 0.25 * rng.standard_normal((choices, conversations)), 0, 1).repeat(5, axis=1)
    return [
        entry(str(i), [(rng.random(len(own)) < own).astype(float) for _ in range(seeds)]) for i, own in enumerate(rates)
    ]


def test_repeating_a_seed_ten_times_changes_no_interval():
    rng = np.random.default_rng(6)
    once = questions_of_their_own(rng, 3, seeds=1)
    often = [entry(e.label, [e.measured[0].sums.repeat(5) / 5] * 10) for e in once]
    compare(once)
    compare(often)
    for a, b in zip(once, often):
        assert b.p_value == pytest.approx(a.p_value, abs=0.01)
        assert interval(b.measured) == pytest.approx(interval(a.measured), abs=1e-9)
    assert any(e.p_value and 0.01 < e.p_value < 0.9 for e in once)


@pytest.mark.parametrize("choices, seeds", [(2, 10), (6, 3), (6, 2)])
def test_the_best_of_equal_choices_is_rarely_distinguished(choices, seeds):
    """Seeds that answer the same questions, and the best of several choices: at most 5 % are called significant."""
    rng, called = np.random.default_rng(7), 0
    for _ in range(60):
        entries = questions_of_their_own(rng, choices, seeds)
        compare(entries)
        called += any(e.runs_differ for e in entries)
    assert called <= 6  # more, of 60 at a level of 5 %, one time in thirty


def test_among_many_choices_a_bad_one_is_distinguished():
    rng = np.random.default_rng(8)
    rates = [0.6] * 59 + [0.1]
    entries = [entry(str(i), answers(rng, rate, questions=200)) for i, rate in enumerate(rates)]
    compare(entries)
    assert entries[-1].is_told_apart and sum(e.is_told_apart for e in entries) == 1


def test_with_few_seeds_it_says_that_it_cannot_tell():
    rng = np.random.default_rng(5)
    two = [entry("good", answers(rng, 0.9, seeds=2)), entry("bad", answers(rng, 0.2, seeds=2))]
    compare(two)
    bad = min(two, key=lambda e: e.score)
    assert bad.runs_differ and not bad.is_told_apart
    ablation = read_line(["recipe=quickstart", "connectors=[linear]", "seeds=[0,1]"])
    assert main_table(ablation, two)[2][-1].endswith("runs differ")
    assert "cannot be estimated" in note(ablation, two)


def test_the_interval_is_that_of_a_share():
    rng = np.random.default_rng(2)
    exact = answers(rng, 0.7, seeds=1, questions=2000)
    low, high = interval([Clusters.of(exact[0], np.arange(2000))])
    half, mean = 1.96 * (0.7 * 0.3 / 2000) ** 0.5, float(exact[0].mean())
    assert (low, high) == pytest.approx((mean - half, mean + half), abs=0.005)


def test_questions_of_one_image_count_as_one_draw():
    """Five equal answers per image count as one: the interval is that of a fifth as many questions."""
    rng = np.random.default_rng(3)
    exact = [np.repeat(answers(rng, 0.5, 1, 400)[0], 5)]
    low, high = interval([Clusters.of(exact[0], np.arange(2000) // 5)])
    assert high - low == pytest.approx(2 * 1.96 * (0.25 / 400) ** 0.5, rel=0.15)
