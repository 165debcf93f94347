"""What a stage trains: patterns against hand-written lists of names, layer decay by hand."""

from __future__ import annotations

import pytest
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from vlmtrain.model.blocks import block_list
from vlmtrain.model.vision import build_vision
from vlmtrain.settings import Stage
from vlmtrain.training.trainable import freeze, trained_groups

from ...stages import make_stage

VISION = {
    "embed_dim": 12,
    "vision_cfg": {"image_size": 16, "layers": 6, "width": 24, "head_width": 12, "patch_size": 8},
    "text_cfg": {"context_length": 8, "vocab_size": 32, "width": 16, "heads": 2, "layers": 1},
}
LLAMA = LlamaConfig(
    vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=5, num_attention_heads=2, pad_token_id=0
)


@pytest.fixture(scope="module")
def parts() -> dict[str, nn.Module]:
    vision = build_vision("open_clip", model_config=VISION, layer=-1)
    llm = AutoModelForCausalLM.from_config(LLAMA)
    return {"vision": vision, "connector": nn.Linear(24, 16), "llm": llm}


def stage(*groups: dict, **train) -> Stage:
    return make_stage(train=train, groups=list(groups), max_steps=20)


def names(found: list, part: str) -> set[str]:
    return {name for group in found if group.part == part for name in group.names}


def test_blocks_are_found_whatever_they_are_called(parts):
    assert block_list(parts["vision"]) == ("visual.transformer.resblocks", 6)
    assert block_list(parts["llm"]) == ("model.layers", 5)


@pytest.mark.parametrize(
    "match, blocks",
    [
        ("llm.layers[3:]", (3, 4)),
        ("llm.layers[-2:]", (3, 4)),
        ("llm.blocks[:1]", (0,)),
        ("llm.layers[1]", (1,)),
        ("llm.layers[-1]", (4,)),
        ("llm.layers", range(5)),
        ("llm.layers[1:3].mlp", (1, 2)),
        ("llm.layers[1:3].*norm*", (1, 2)),
    ],
)
def test_slices_of_blocks(parts, match, blocks):
    found = names(trained_groups(stage({"match": match, "lr": 1e-4}), parts), "llm")
    wanted = {
        n for n, _ in parts["llm"].named_parameters() if n.startswith(tuple(f"model.layers.{b}." for b in blocks))
    }
    if match.endswith("mlp"):
        wanted = {n for n in wanted if ".mlp." in n}
    if match.endswith("*norm*"):
        wanted = {n for n in wanted if "norm" in n}
    assert found == wanted and found


def test_globs_and_whole_parts(parts):
    found = trained_groups(stage({"match": "llm.*norm*", "lr": 1e-4}, {"match": "vision", "lr": 1e-5}), parts)
    assert names(found, "llm") == {n for n, _ in parts["llm"].named_parameters() if "norm" in n}
    assert names(found, "vision") == {n for n, _ in parts["vision"].named_parameters()}


def test_groups_come_before_the_part_and_null_freezes(parts):
    entries = ({"match": "llm.lm_head", "lr": None}, {"match": "llm.layers[4]", "lr": 1e-3})
    found = trained_groups(stage(*entries, llm=2e-5), parts)
    by_label = {group.label: set(group.names) for group in found}
    everything = {n for n, _ in parts["llm"].named_parameters()}
    top = {n for n in everything if n.startswith("model.layers.4.")}
    assert by_label == {"llm.layers[4]": top, "llm": everything - top - {"lm_head.weight"}}
    assert {group.label: group.lr for group in found} == {"llm.layers[4]": 1e-3, "llm": 2e-5}


def test_of_two_patterns_the_first_decides(parts):
    entries = ({"match": "llm.*norm*", "lr": 1.0}, {"match": "llm.layers[0]", "lr": 2.0})
    rates = {name: g.lr for g in trained_groups(stage(*entries), parts) for name in g.names}
    assert rates["model.layers.0.input_layernorm.weight"] == 1.0 and rates["model.layers.0.mlp.up_proj.weight"] == 2.0


def test_layer_decay_by_hand(parts):
    entry = {"match": "vision", "lr": 1e-3, "layer_decay": 0.9}
    found = {name: g.lr * g.scale for g in trained_groups(stage(entry), parts) for name in g.names}
    assert found["visual.class_embedding"] == found["visual.conv1.weight"] == pytest.approx(1e-3 * 0.9**7)
    for block in range(6):
        name = f"visual.transformer.resblocks.{block}.mlp.c_fc.weight"
        assert found[name] == pytest.approx(1e-3 * 0.9 ** (6 - block))
    assert found["visual.ln_post.weight"] == pytest.approx(1e-3)


def test_exactly_the_selected_parameters_stay_trainable(parts):
    groups = trained_groups(stage({"match": "llm.layers[-1:]", "lr": 1e-4}, connector=1e-3), parts)
    freeze(parts, groups, checkpointing=False)
    trained = {f"{p}.{n}" for p, module in parts.items() for n, w in module.named_parameters() if w.requires_grad}
    wanted = {f"llm.{n}" for n, _ in parts["llm"].named_parameters() if n.startswith("model.layers.4.")}
    assert trained == wanted | {"connector.weight", "connector.bias"}
    assert not parts["vision"].training and parts["connector"].training and parts["llm"].training
    for module in parts.values():
        module.requires_grad_(True)


@pytest.mark.parametrize(
    "entry, said",
    [
        ({"match": "llm.layers[7]", "lr": 1e-4}, "block 7 does not exist, as there are 5 blocks"),
        ({"match": "llm.layers[9:]", "lr": 1e-4}, "matches no remaining parameter"),
        ({"match": "llm.nothing", "lr": 1e-4}, "matches no remaining parameter"),
        ({"match": "lmm", "lr": 1e-4}, "the stage has only"),
        ({"match": "llm", "lr": -1}, "groups.0..lr=-1"),
        ({"match": "llm", "rate": 1}, "unknown key 'stages.s.groups.0..rate'"),
        ({"match": "llm"}, "groups.0..lr is missing"),
        ({"match": "llm", "lr": 1e-4, "layer_decay": 2}, "layer_decay=2"),
        ({"match": "llm", "lr": 1e-4, "from_step": 20}, "from_step=20: expected a number of steps below max_steps=20"),
        ({"match": "llm", "lr": 1e-4, "from_step": -1}, "from_step=-1"),
        ({"match": "llm", "lr": 1e-4, "from_step": 3}, "would train nothing at first"),
    ],
)
def test_invalid_settings_are_named(parts, entry, said):
    with pytest.raises(ValueError, match=said):
        trained_groups(stage(entry), parts)


def test_a_stage_that_trains_nothing_is_refused(parts):
    with pytest.raises(ValueError, match="would train nothing"):
        stage()
    with pytest.raises(ValueError, match="would train nothing"):
        stage({"match": "llm", "lr": None})
