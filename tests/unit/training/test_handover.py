"""Which weights a stage that rebuilds its connector takes from the stage before, by name, and what it refuses."""

from __future__ import annotations

import json

import pytest
import torch

from vlmtrain.connectors import build_connector
from vlmtrain.model.joining import JoiningConnector
from vlmtrain.settings import compose
from vlmtrain.training.handover import take_over, tensors_taken
from vlmtrain.training.init_from import adopt_connector, overruled_fit

from ...stages import make_stage

SIZES = {"num_queries": 3, "hidden_size": 8, "depth": 3, "num_heads": 2, "intermediate_size": 12, "vision_norm": True}
STAGES = {
    (recipe, name): stage
    for recipe in ("blip2", "instructblip")
    for name, stage in compose([f"recipe={recipe}"]).stages.items()
}
GENERATE = STAGES["blip2", "generate"]
INSTRUCT = STAGES["instructblip", "instruct"]
# Published code, lavis/models/blip2_models/blip2_opt.py: of the first stage's Q-Former, the second deletes
DROPPED = ("core.embedding.", *(f"core.layers.{layer}.text_ffn." for layer in range(3)))


def qformer(out_dim: int | None, words: int | None, **options):
    return build_connector("qformer", 6, out_dim, text_vocab=words, **{**SIZES, **options})


def test_the_second_stage_receives_all_but_the_text_path():
    first, second = qformer(None, 20), qformer(10, None)
    fresh = {name: tensor.clone() for name, tensor in second.state_dict().items()}
    take_over(second, first, GENERATE)
    before, after = first.state_dict(), second.state_dict()
    assert {name for name in before if name not in after} == {name for name in before if name.startswith(DROPPED)}
    for name, tensor in after.items():
        if name.startswith("proj."):
            assert tensor.equal(fresh[name]) and name not in before
        else:
            assert tensor.equal(before[name]), name
    assert after["ln_vision.weight"].shape == (6,)


def test_instructblip_gets_a_text_path_again():
    second, third = qformer(10, None), qformer(10, 20)
    fresh = {name: tensor.clone() for name, tensor in third.state_dict().items()}
    take_over(third, second, INSTRUCT)
    before = second.state_dict()
    for name, tensor in third.state_dict().items():
        assert tensor.equal(fresh[name] if name.startswith(DROPPED) else before[name]), name


def test_a_fresh_text_path_stays_fresh_even_if_the_stage_before_has_one():
    first, second = qformer(10, 20), qformer(10, 20)
    taken = tensors_taken(second, first, INSTRUCT)
    assert {name for name in second.state_dict() if name not in taken} == {
        name for name in second.state_dict() if name.startswith(DROPPED)
    }


def test_tiles_change_no_name():
    first, second = qformer(None, 20), JoiningConnector(qformer(10, None))
    newline = second.newline.clone()
    take_over(second, first, GENERATE)
    assert second.connector.core.query_tokens.equal(first.core.query_tokens) and second.newline.equal(newline)
    third = JoiningConnector(qformer(10, 20))
    take_over(third, second, INSTRUCT)
    assert third.newline.equal(newline)


@pytest.mark.parametrize(
    "first, second, stage, said",
    [
        ({}, {"num_queries": 4}, {}, r"wrong shape: core.query_tokens \(\(1, 3, 8\) becomes \(1, 4, 8\)\)"),
        ({}, {"depth": 4}, {}, r"not in the received connector and not in stages.s.fresh: core.layers.3"),
        ({"depth": 4}, {}, {}, r"not in the new connector and not in stages.s.drops: core.layers.3"),
        ({}, {}, {"drops": ["connector.core.embedding"]}, r"stages.s.drops: core.layers.0.text_ffn"),
        ({}, {}, {"fresh": []}, r"stages.s.fresh: proj.bias, proj.weight|stages.s.fresh: proj"),
        ({}, {}, {"fresh": ["connector.proj", "connector.projection"]}, "no tensor of this name.*connector.projection"),
        (
            {},
            {},
            {"drops": ["connector.foo"]},
            r"no tensor of this name in the received connector \(.*drops\): connector.foo",
        ),
        ({}, {"vision_norm": False}, {}, "stages.s.drops: ln_vision"),
    ],
)
def test_what_does_not_fit_is_named(first, second, stage, said):
    entries = make_stage(**{"fresh": GENERATE.fresh, "drops": GENERATE.drops, **stage})
    with torch.device("meta"), pytest.raises(ValueError, match=said):
        tensors_taken(qformer(10, None, **second), qformer(None, 20, **first), entries)


def test_a_name_ends_where_a_name_ends():
    """``connector.proj`` is not the beginning of another name."""
    entries = make_stage(fresh=["connector.proj", "connector.core.layers.1"])
    taken = tensors_taken(qformer(10, None, depth=12), qformer(10, None, depth=12), entries)
    assert any(name.startswith("core.layers.11.") for name in taken)
    assert not any(name.startswith("core.layers.1.") for name in taken)


def test_only_names_within_the_connector_can_be_given():
    with pytest.raises(ValueError, match=r"stages\.s\.drops names llm\.lm_head"):
        make_stage(drops=["llm.lm_head"])
    assert GENERATE.builds_connector and INSTRUCT.builds_connector
    assert not STAGES["blip2", "represent"].builds_connector and not STAGES["blip2", "finetune"].builds_connector


# a run that starts from a model folder

INSTRUCT_ON = ("recipe=llava_1_5", "mini=true", "stage=instruct")


def held(folder, **config):
    (folder / "connector").mkdir()
    (folder / "connector" / "config.json").write_text(json.dumps({"in_dim": 8, "out_dim": 8, **config}))
    return f"init_from={folder}"


def test_the_connector_of_a_model_folder_is_kept(tmp_path):
    start = held(tmp_path, name="qformer", num_queries=3, newline=True)
    settings, said = adopt_connector(compose([*INSTRUCT_ON, start]), [])
    options = settings.connector.options
    assert (settings.connector.name, options["num_queries"], options["dropout"]) == ("qformer", 3, 0.1)
    assert "connector=mlp (qformer is used)" in said[0] and start in said[0]
    named = compose([*INSTRUCT_ON, start, "connector=qformer"])
    assert adopt_connector(named, [])[0].connector.options["num_queries"] == 3


def test_a_command_that_names_another_connector_than_the_folder_is_refused(tmp_path):
    start = held(tmp_path, name="mlp", depth=3)
    with pytest.raises(ValueError, match=f"connector=qformer, but {start} holds the connector mlp"):
        adopt_connector(compose([*INSTRUCT_ON, start, "connector=qformer"]), [])
    with pytest.raises(ValueError, match=rf"connector\.depth=2, but the connector in {start} has 3"):
        adopt_connector(compose([*INSTRUCT_ON, start, "connector.depth=2"]), [])
    _, said = adopt_connector(compose([*INSTRUCT_ON, start]), [])  # from the recipe, not from the command
    assert "connector.depth=2 (3 is used)" in said[0]
    assert adopt_connector(compose([*INSTRUCT_ON, start, "connector.depth=3"]), [])[1] == []


def test_a_change_of_preprocessing_is_reported(tmp_path):
    start = held(tmp_path, name="mlp")
    (tmp_path / "processor").mkdir()
    (tmp_path / "processor" / "processor.json").write_text(json.dumps({"geometry": {"fit": "crop"}}))
    line = [*INSTRUCT_ON, start, "stages.instruct.image_fit=pad"]
    (said,) = overruled_fit(compose(line), [])
    expected = f"stages.instruct.image_fit=pad, but the model in {start} was trained with crop; set "
    assert expected + "stages.instruct.image_fit=crop to keep its preprocessing" in said
    assert overruled_fit(compose([*line[:-1], "stages.instruct.image_fit=crop"]), []) == []
    assert overruled_fit(compose(line), ["align"]) == []  # the stage before then belongs to the run itself
    assert overruled_fit(compose(["recipe=llava_1_5", "mini=true"]), []) == []
    file = tmp_path / "processor" / "processor.json"
    file.write_text(json.dumps({"geometry": {"fit": "tiles"}}))  # of an earlier version, without a style
    tiles = [*line[:-1], "stages.instruct.image_fit=tiles"]
    assert overruled_fit(compose(tiles), []) == []
    (said,) = overruled_fit(compose([*tiles, "stages.instruct.image_tile_style=internvl"]), [])
    assert said.startswith("stages.instruct.image_tile_style=internvl, but") and "trained with llava_next" in said


def test_a_fresh_connector_is_the_one_that_the_command_names(tmp_path):
    start = held(tmp_path, name="mlp")
    for line in (["recipe=llava_1_5", "mini=true"], [*INSTRUCT_ON, "stages.instruct.fresh=[connector]"]):
        settings = compose([*line, start, "connector=qformer"])
        assert adopt_connector(settings, []) == (settings, [])
    with pytest.raises(ValueError, match=f"connector=qformer, but {start} holds the connector mlp"):
        adopt_connector(compose(["recipe=instructblip", "stage=instruct", start]), [])
