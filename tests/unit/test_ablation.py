"""An ablation's line, and its statistics against cases that are known."""

from __future__ import annotations

import numpy as np
import pytest

from vlmtrain.ablation import Entry, compare, read_line
from vlmtrain.ablation.results import _interval
from vlmtrain.charts import scatter_chart


def entry(label: str, exact: list[np.ndarray]) -> Entry:
    conversation = [np.arange(len(seed)) // 5 for seed in exact]  # five questions a picture
    score = float(np.concatenate(exact).mean())
    return Entry(label, score, (0, 0), 0, 0, 1, 1, 1, 1, 1, exact, conversation)


def answers(rng, rate: float, seeds: int = 3, questions: int = 500) -> list[np.ndarray]:
    """Seeds with different numbers of questions."""
    return [(rng.random(questions + 5 * seed) < rate).astype(float) for seed in range(seeds)]


def test_a_line_becomes_choices_seeds_and_what_all_share():
    ablation = read_line(
        ["recipe=quickstart", "connectors=[linear,{qformer:{num_queries:8}}]", "seeds=[0,2]", "jobs=2", "workers=0"]
    )
    assert [choice.label for choice in ablation.choices] == ["linear", "qformer-num_queries-8"]
    assert ablation.seeds == (0, 2) and ablation.jobs == 2 and ablation.line == ("recipe=quickstart", "workers=0")
    assert ablation.settings(ablation.choices[1]).connector.num_queries == 8
    assert str(ablation.folder) == "runs/ablation-quickstart"


@pytest.mark.parametrize(
    "line, said",
    [
        (["recipe=quickstart"], r"connectors=\[...\] is not set"),
        (["recipe=quickstart", "connectors=[linear,linear]"], "named twice"),
        (["recipe=quickstart", "connectors=[]"], "not empty"),
        (["recipe=quickstart", "connectors=[linear]", "seeds=[a]"], "seeds=a"),
        (["recipe=quickstart", "connectors=[linear]", "jobs=0"], "jobs=0"),
        (["recipe=quickstart", "connectors=[linear]", "connector=mlp"], "connector=mlp"),
        (["recipe=quickstart", "connectors=[lineal]"], "Did you mean 'linear'"),
        (["recipe=quickstart", "connectors=[[linear]]"], "expected a name"),
    ],
)
def test_what_cannot_be_meant_is_named(line, said):
    with pytest.raises(ValueError, match=said):
        ablation = read_line(line)
        ablation.settings(ablation.choices[0])


def test_equal_connectors_are_not_told_apart_and_different_ones_are():
    rng = np.random.default_rng(0)
    same, other, worse = (entry(name, answers(rng, rate)) for name, rate in (("a", 0.6), ("b", 0.6), ("c", 0.45)))
    compare([same, other, worse])
    best, second = sorted((same, other), key=lambda e: -e.score)
    assert best.p_value is None and not second.is_told_apart and second.p_value > 0.05
    assert worse.is_told_apart and worse.p_value < 0.01


def test_equal_connectors_are_rarely_told_apart():
    """Under no difference, about one comparison in twenty, corrected for five of them, is called one."""
    rng, called = np.random.default_rng(1), 0
    for _ in range(20):
        entries = [entry(str(i), answers(rng, 0.5, questions=200)) for i in range(3)]
        compare(entries)
        called += any(e.is_told_apart for e in entries)
    assert called <= 4


def test_the_interval_is_that_of_a_share():
    rng = np.random.default_rng(2)
    exact = answers(rng, 0.7, seeds=1, questions=2000)
    low, high = _interval(exact, [np.arange(2000)])
    half, mean = 1.96 * (0.7 * 0.3 / 2000) ** 0.5, float(exact[0].mean())
    assert (low, high) == pytest.approx((mean - half, mean + half), abs=0.005)


def test_questions_of_one_picture_count_as_one_draw():
    """Five equal answers a picture are worth one: the interval is that of a fifth as many questions."""
    rng = np.random.default_rng(3)
    exact = [np.repeat(answers(rng, 0.5, 1, 400)[0], 5)]
    low, high = _interval(exact, [np.arange(2000) // 5])
    assert high - low == pytest.approx(2 * 1.96 * (0.25 / 400) ** 0.5, rel=0.15)


def test_the_front_joins_what_no_other_beats():
    points = [("cheap", 1.0, 0.2), ("beaten", 2.0, 0.1), ("good", 3.0, 0.5), ("dear", 4.0, 0.5)]
    chart = scatter_chart("t", points, "x", front=True)
    line = chart.split('<polyline points="')[1].split('"')[0]
    assert len(line.split()) == 2 and chart.count('fill="#fff"') == 2
