"""FLOPs of steps, compared with those of their samples measured one by one, and with counts by hand."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from vlmtrain.data.loader import Work
from vlmtrain.objectives import OBJECTIVES
from vlmtrain.planning.plan import _Vocabulary
from vlmtrain.settings import compose
from vlmtrain.training.assembly import build_skeleton
from vlmtrain.training.cost import stage as costs
from vlmtrain.training.cost.flops import StepFlops
from vlmtrain.training.processing import build_geometry
from vlmtrain.training.trainable import Group, freeze, trained_groups

from ...stages import make_stage

LLAMA = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 12,
    "num_attention_heads": 4,
    "vocab_size": 50,
}


def llama(**options) -> LlamaForCausalLM:
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(**{**LLAMA, **options}))


def whole(llm, first: int = 0) -> list[Group]:
    names = [
        n
        for n, _ in llm.named_parameters()
        if first == 0 or (n.startswith("model.layers.") and int(n.split(".")[2]) >= first)
    ]
    return [Group("llm", "llm", 1e-3, 1.0, tuple(names))]


@pytest.mark.parametrize("first", [0, 5])
def test_blocks_that_are_alike_cost_the_same_whether_or_not_all_run(monkeypatch, first):
    llm = llama()
    groups = whole(llm, first)
    freeze({"llm": llm}, groups, checkpointing=False)
    quick = costs.measure_text({"llm": llm}, groups, 40, 10)
    monkeypatch.setattr(costs, "WORTHWHILE", 10**9)
    slow = costs.measure_text({"llm": llm}, groups, 40, 10)
    assert quick == slow and len(quick.block_flops) == 12


def test_text_by_hand():
    llm = llama()
    freeze({"llm": llm}, whole(llm), checkpointing=False)
    flops = StepFlops({"llm": llm}, whole(llm), make_stage(parts=["llm"], train={"llm": 1e-3}), None)
    lengths, targets = (7, 300, 41), (3, 100, 20)
    blocks = 12 * (4 * 64 * 64 + 3 * 64 * 160)
    by_hand = 0
    for length, count in zip(lengths, targets):
        by_hand += 6 * (length * blocks + count * 64 * 50)  # two per weight, forward and twice backward
        by_hand += 3 * 12 * 2 * (2 * length * length * 64) / 2  # scores and their product with the values, causal
    work = Work(squared_tokens=sum(n * n for n in lengths))
    assert flops(3, sum(lengths), sum(targets), work) == pytest.approx(by_hand, rel=1e-6)


@pytest.mark.parametrize("recipe", ["llava_1_5", "qwen_vl", "blip2", "clip", "qwen2_5_vl"])
def test_flops_of_a_step_are_those_of_its_samples(recipe):
    run = compose([f"recipe={recipe}", "mini=true"])
    for stage in run.stages.values():
        parts = build_skeleton(run, stage, _Vocabulary(run))
        groups = trained_groups(stage, parts)
        geometry = build_geometry(stage, parts, OBJECTIVES[stage.objective])
        freeze(parts, groups, checkpointing=False)
        flops = StepFlops(parts, groups, stage, geometry)
        total, work, patches = 0.0, [0] * 7, math.prod(parts["vision"].grid_of(geometry.largest))
        lengths = (30, 5), (90, 40)
        for (tokens, _), measured in zip(lengths, costs.measure(parts, groups, stage, geometry, *lengths)):
            total += sum(cost.all_flops for cost in measured.values())
            views = geometry.most_items * stage.expected.images
            counts = [views, views * patches, views * patches**2]
            work = [a + b for a, b in zip(work, [tokens**2, *counts, *counts])]
        assert flops(2, 120, 45, Work(*work)) == pytest.approx(total, rel=1e-6)


def test_cached_features_cost_nothing():
    run = compose(["recipe=llava_1_5", "mini=true"])
    stage = run.stages["align"]
    parts = build_skeleton(run, stage, _Vocabulary(run))
    groups = trained_groups(stage, parts)
    freeze(parts, groups, checkpointing=False)
    geometry = build_geometry(stage, parts, OBJECTIVES[stage.objective])
    flops = StepFlops(parts, groups, stage, geometry)
    vision = costs.measure_views(parts, groups, stage, 1, [geometry.size])["vision"].all_flops
    patches = math.prod(parts["vision"].grid)
    shown = Work(0, 3, 3 * patches, 3 * patches**2)
    everything = shown._replace(encoded=3, encoded_patches=3 * patches, encoded_squared_patches=3 * patches**2)
    assert flops(0, 0, 0, everything) - flops(0, 0, 0, shown) == pytest.approx(3 * vision)
