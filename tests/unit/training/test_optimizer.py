"""Learning rates by hand, and which parameters decay."""

from __future__ import annotations

import math

import pytest
from torch import nn

from tests.stages import make_stage
from vlmtrain.model.fusion import build_fusion
from vlmtrain.settings.stage import OptimizerOptions, ScheduleOptions
from vlmtrain.training.optimizer import Schedule, moment_bytes, parameter_groups
from vlmtrain.training.trainable import Group, trained_groups


def options(**changes) -> ScheduleOptions:
    return ScheduleOptions(**{"name": "cosine", "warmup_ratio": 0.0, "warmup_steps": None, "min_lr": 0.0, **changes})


def test_warm_up_is_linear_and_reaches_the_peak():
    schedule = Schedule(options(warmup_steps=4), 100)
    assert [schedule.rate(step, 2.0) for step in range(4)] == [0.5, 1.0, 1.5, 2.0]


def test_warm_up_ratio_counts_steps():
    assert Schedule(options(warmup_ratio=0.03), 1000).warmup_steps == 30
    assert Schedule(options(warmup_ratio=0.03), 10).warmup_steps == 1


@pytest.mark.parametrize(
    "name, expected",
    [
        ("cosine", [0.1 + 0.9 * (1 + math.cos(math.pi * done / 4)) / 2 for done in (1, 2, 3, 4)]),
        ("linear", [0.775, 0.55, 0.325, 0.1]),
        ("constant", [1.0, 1.0, 1.0, 1.0]),
    ],
)
def test_decay_by_hand(name, expected):
    schedule = Schedule(options(name=name, min_lr=0.1), 4)
    assert [schedule.rate(step, 1.0) for step in range(4)] == pytest.approx(expected)


def test_wsd_is_stable_and_decays_linearly_at_the_end():
    schedule = Schedule(options(name="wsd", warmup_steps=2, decay_ratio=0.4, min_lr=0.1), 10)
    rates = [schedule.rate(step, 1.0) for step in range(10)]
    assert rates == pytest.approx([0.5, 1.0, *[1.0] * 4, 0.775, 0.55, 0.325, 0.1])


def test_a_group_has_its_own_warm_up_and_the_smallest_rate_is_a_share_of_its_peak():
    schedule = Schedule(options(warmup_steps=4, min_lr=0.1, min_lr_ratio=0.25), 8)
    assert [schedule.rate(step, 2.0, 2) for step in range(2)] == [1.0, 2.0]
    assert schedule.rate(4, 2.0, 2) == pytest.approx(0.5 + 1.5 * (1 + math.cos(math.pi / 2)) / 2)
    assert schedule.rate(7, 2.0, 2) == pytest.approx(0.5) and schedule.rate(7, 0.2) == pytest.approx(0.1)


def test_constant_has_the_name_that_transformers_gives_it_too():
    one, other = (Schedule(options(name=n, warmup_steps=2), 5) for n in ("constant", "constant_with_warmup"))
    assert [one.rate(i, 2.0) for i in range(5)] == [other.rate(i, 2.0) for i in range(5)] == [1.0, 2.0, 2.0, 2.0, 2.0]


def test_a_group_has_its_own_weight_decay():
    parts = {"connector": nn.Linear(3, 4)}
    trained = [Group("connector", "connector", 1e-3, 1.0, ("weight", "bias"), weight_decay=0.3)]
    groups = parameter_groups(parts, trained, OptimizerOptions("adamw", (0.9, 0.999), 1e-8, weight_decay=0.1))
    assert [group["weight_decay"] for group in groups] == [0.3, 0.0]


def test_groups_by_part_and_decay_without_empty_ones():
    layer, norm = nn.Linear(3, 4), nn.LayerNorm(4)
    frozen = nn.Linear(3, 3).requires_grad_(False)
    parts = {"connector": nn.Sequential(layer, norm), "llm": nn.Linear(2, 2, bias=False), "vision": frozen}
    names = tuple(name for name, _ in parts["connector"].named_parameters())
    trained = [Group("connector", "connector", 1e-3, 1.0, names), Group("llm", "llm", 4e-5, 0.5, ("weight",))]
    groups = parameter_groups(parts, trained, OptimizerOptions("adamw", (0.9, 0.999), 1e-8, weight_decay=0.1))
    found = [(g["label"], g["weight_decay"], g["lr"], len(g["params"])) for g in groups]
    assert found == [("connector", 0.1, 1e-3, 1), ("connector", 0.0, 1e-3, 3), ("llm", 0.1, 2e-5, 1)]
    assert groups[0]["params"][0] is layer.weight


def test_a_group_may_have_a_weight_decay_of_its_own():
    """As OpenFlamingo: only the matrices of the gated layers decay, without their gates."""
    llm = {"blocks": 2, "heads": 2, "intermediate_size": 8, "norm_eps": 1e-6}
    fusion = build_fusion("gated_cross_attention", width=4, media_width=4, llm=llm, every=1)
    parts = {"connector": nn.Linear(2, 2), "fusion": fusion}
    own = {"match": "fusion.layers[1:]", "lr": 1e-4, "weight_decay": 0.1}
    stage = make_stage(parts=[*parts], train={"connector": 1e-3, "fusion": 2e-4}, groups=[own])
    found = parameter_groups(parts, trained_groups(stage, parts), stage.optimizer)
    names = {id(parameter): name for name, parameter in fusion.named_parameters()}
    decay = {names[id(p)]: g["weight_decay"] for g in found for p in g["params"] if id(p) in names}
    matrices = ("q", "k", "v", "out", "feed_forward.0", "feed_forward.2")
    assert {name for name, value in decay.items() if value} == {f"layers.1.{name}.weight" for name in matrices}
    assert set(decay.values()) == {0.0, 0.1} and len(decay) == len(names)


@pytest.mark.parametrize(
    "name, weight, bias", [("adamw", 8, 8), ("adamw_8bit", 2 + 1 / 32, 2 + 1 / 32), ("muon", 4, 8)]
)
def test_the_bytes_of_the_moments_are_those_of_the_optimizer(name, weight, bias):
    """AdamW has two in fp32, or in 8 bits with two scales for each 256; Muon has one, for matrices."""
    parts = {"connector": nn.Linear(30, 10)}
    groups = [Group("connector", "connector", 1e-3, 1.0, ("weight", "bias"))]
    found = moment_bytes(parameter_groups(parts, groups, OptimizerOptions(name, (0.9, 0.999), 1e-8, 0.1)))
    assert found == pytest.approx((300 * weight + 10 * bias) / 310)
