"""The miniatures of recipes other than BLIP-2 and InstructBLIP: stages learn, and train what their source states."""

from __future__ import annotations

import json

import pytest

from ..conftest import metrics, train

# What each stage trains, according to the papers and the released scripts.
TRAINED = {
    "llava_1_0": {"align": {"connector"}, "instruct": {"connector", "llm"}},
    "llava_1_5": {"align": {"connector"}, "instruct": {"connector", "llm"}},
    "llava_1_5_lora": {"align": {"connector"}, "instruct": {"connector", "llm"}},
    "llava_next": {"align": {"connector"}, "instruct": {"vision", "connector", "llm"}},
    "llava_onevision": {
        "align": {"connector"},
        "knowledge": {"vision", "connector", "llm"},
        "single_image": {"vision", "connector", "llm"},
        "onevision": {"vision", "connector", "llm"},
    },
    "honeybee": {"align": {"connector"}, "instruct": {"connector", "llm"}},
    "mobilevlm": {"align": {"connector", "llm"}, "instruct": {"connector", "llm"}},
    "qwen_vl": {
        "pretrain": {"vision", "connector"},
        "multitask": {"vision", "connector", "llm"},
        "instruct": {"connector", "llm"},
    },
    "internvl": {"warmup": {"connector"}, "instruct": {"vision", "connector", "llm"}},
    "nanovlm": {"train": {"vision", "connector", "llm"}},
    "kempnerforge": {"joint": {"connector", "llm"}},
    "qwen2_vl": {
        "pretrain": {"vision", "connector"},
        "multitask": {"vision", "connector", "llm"},
        "instruct": {"llm"},
    },
    "qwen2_5_vl": {
        "pretrain": {"vision", "connector"},
        "multitask": {"vision", "connector", "llm"},
        "long_context": {"vision", "connector", "llm"},
        "instruct": {"connector", "llm"},
    },
    "qwen3_vl": {
        "align": {"connector"},
        "pretrain": {"vision", "connector", "llm"},
        "long_context": {"vision", "connector", "llm"},
        "ultra_long_context": {"vision", "connector", "llm"},
    },
    "hunyuan_ocr": {
        "align": {"vision", "connector"},
        "pretrain": {"vision", "connector", "llm"},
        "long_context": {"vision", "connector", "llm"},
        "instruct": {"vision", "connector", "llm"},
    },
    "speedrun": {"align": {"connector"}, "instruct": {"connector", "llm"}},
    "prismatic": {"finetune": {"connector", "llm"}},
    "openvla": {"actions": {"vision", "connector", "llm"}},
    "eagle": {"align": {"connector"}, "instruct": {"vision", "connector", "llm"}},
    "cambrian": {"align": {"connector"}, "instruct": {"connector", "llm"}},
    "brave": {"pretrain": {"connector"}, "instruct": {"connector"}},
    "flamingo": {"pretrain": {"connector", "fusion", "llm"}},
    "otter": {"instruct": {"connector", "fusion", "llm"}},
    "idefics": {
        "pretrain": {"connector", "fusion", "llm"},
        "instruct": {"vision", "connector", "fusion", "llm"},
    },
    "molmo2": {stage: {"vision", "connector", "llm"} for stage in ("pretrain", "instruct", "long_context")},
    "llava_video": {"video": {"vision", "connector", "llm"}},
    "fuyu": {"align": {"connector"}, "pretrain": {"connector", "llm"}, "instruct": {"connector", "llm"}},
    "paligemma": {stage: {"vision", "connector", "llm"} for stage in ("pretrain", "high_resolution", "transfer")},
    "vl_mamba": {"align": {"connector", "llm"}, "instruct": {"connector", "llm"}},
    "mot": {"joint": {"connector", "llm"}},
    "cogvlm": {
        **{stage: {"connector", "llm"} for stage in ("pretrain", "grounding", "high_resolution")},
        "instruct": {"vision", "connector", "llm"},
    },
    "clip": {"contrast": {"vision", "objective"}},
}


# like others in what they use: kept for runs with --slow
SLOW = {
    "brave",
    "flamingo",
    "otter",
    "idefics",
    "llava_video",
    "molmo2",
    "openvla",
    "eagle",
    "internvl",
    "kempnerforge",
    "qwen2_vl",
    "qwen2_5_vl",
    "hunyuan_ocr",
    "speedrun",
    "fuyu",
    "paligemma",
    "vl_mamba",
    "mot",
    "cogvlm",
}


@pytest.mark.parametrize(
    "recipe", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in TRAINED]
)
def test_every_stage_of_the_miniature_learns_and_trains_what_it_should(recipe, tmp_path):
    stages = TRAINED[recipe]
    few = [f"stages.{stage}.{key}" for stage in stages for key in ("max_steps=15", "schedule.name=constant")]
    shown = ["validation.samples=4", "validation.final_samples=4", "validation.max_new_tokens=2", "workers=0"]
    train(f"recipe={recipe}", "mini=true", *few, *shown, f"run_dir={tmp_path}")
    for stage, trained in stages.items():
        losses = [record["loss"] for record in metrics(tmp_path, stage)]
        assert sum(losses[-3:]) < 0.95 * sum(losses[:3]), stage
        parts = json.loads((tmp_path / stage / "summary.json").read_text())["parts"]
        assert {name for name, part in parts.items() if part["trained"]} == trained, stage
        changed = {name for name, part in parts.items() if part["sha256_before"] != part["sha256_after"]}
        assert changed == trained, stage
