"""Budgets of FLOPs and samples."""

from __future__ import annotations

import pytest

from vlmtrain.ablation import read_line
from vlmtrain.ablation.budget import _equal_steps
from vlmtrain.planning.plan import Machine, plan_run
from vlmtrain.settings import compose


def planned(ablation, choice) -> dict[str, tuple[float, float]]:
    """Samples and FLOPs of each stage with a connector, with the steps that the budget gives."""
    line = [f"stages.{name}.max_steps={steps}" for name, steps in _equal_steps(ablation, choice, None).items()]
    plans = plan_run(compose([*ablation.line, *choice.line, *line]), Machine())
    return {plan.name: (plan.steps * plan.batch_size, plan.flops) for plan in plans if "connector" in plan.parts}


def test_a_budget_of_flops_or_samples_is_kept():
    line = ["recipe=quickstart", "connectors=[linear,avgpool]"]
    flops = read_line([*line, "budget=flops"])
    first, other = (planned(flops, choice) for choice in flops.choices)
    for name in ("align", "instruct"):
        assert other[name][1] == pytest.approx(first[name][1], rel=0.02) and other[name][0] > first[name][0]
    samples = read_line([*line, "axis.stages.instruct.batch_size=[8,16]", "budget=samples"])
    assert len({planned(samples, choice)["instruct"][0] for choice in samples.choices}) == 1
