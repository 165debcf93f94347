"""The miniatures of BLIP-2 and InstructBLIP: every stage learns, and changes only what it trains."""

from __future__ import annotations

import json

import pytest

from ..conftest import metrics, train

# Fewer steps than the default of mini=true, and only the images that the test needs.
SHORT = ["workers=0", "validation.samples=4", "validation.final_samples=4", "validation.max_new_tokens=4"]
RECIPES = {
    "blip2": {"represent": 25, "generate": 20, "finetune": 20},
    "blip2_flan_t5": {"represent": 15, "generate": 20, "finetune": 20},
    "instructblip": {"represent": 15, "generate": 20, "instruct": 20},
    "instructblip_flan_t5": {"represent": 15, "generate": 20, "instruct": 20},
}
SLOW = {"instructblip_flan_t5"}
TRAINED = {
    "represent": {"connector", "objective"},
    "generate": {"connector"},
    "finetune": {"vision", "connector"},
    "instruct": {"connector"},
}


@pytest.mark.parametrize(
    "recipe", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in RECIPES]
)
def test_every_stage_of_the_miniature_learns(recipe, tmp_path):
    steps = [f"stages.{stage}.max_steps={number}" for stage, number in RECIPES[recipe].items()]
    train(f"recipe={recipe}", "mini=true", *SHORT, *steps, f"run_dir={tmp_path}")
    frozen: dict[str, str] = {}
    for stage in RECIPES[recipe]:
        losses = [record["loss"] for record in metrics(tmp_path, stage)]
        assert sum(losses[-3:]) < 0.9 * sum(losses[:3]), stage
        summary = json.loads((tmp_path / stage / "summary.json").read_text())
        assert {name for name, part in summary["parts"].items() if part["trained"]} == TRAINED[stage]
        for name in ("vision", "llm"):
            part = summary["parts"].get(name)
            if part:
                assert part["trained"] == (part["sha256_before"] != part["sha256_after"])
                if not part["trained"]:  # parts that train have been resized before
                    assert part["sha256_before"] == frozen.setdefault(name, part["sha256_before"])
    last = json.loads((tmp_path / list(RECIPES[recipe])[-1] / "summary.json").read_text())
    assert last["validation"]["loss"] < last["validation"]["loss_at_start"]
