"""BLIP-2 and InstructBLIP: what trains and its size, compared with the papers; and what their stages refuse."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from vlmtrain.model import VLMWrapper
from vlmtrain.model.vision import build_vision
from vlmtrain.objectives import OBJECTIVES
from vlmtrain.planning.plan import Machine, plan_run
from vlmtrain.runs.folder import RunFolder
from vlmtrain.settings import Run, compose
from vlmtrain.training.assembly import build_parts, build_skeleton, build_tokenizer
from vlmtrain.training.checks import check_run, check_stages
from vlmtrain.training.processing import build_processor
from vlmtrain.training.trainable import trained_groups

# BLIP-2, sections 3.2 to 3.4 and appendix; InstructBLIP, section 2.5 (the rate, second hand)
FREEZE_TABLE = [
    ("blip2", "represent", {"connector": 1e-4, "objective": 1e-4}, 1680),
    ("blip2", "generate", {"connector": 1e-4}, 1920),
    ("blip2", "finetune", {"vision": 1e-5, "connector": 1e-5}, 128),
    ("blip2_flan_t5", "generate", {"connector": 1e-4}, 1520),
    ("instructblip", "represent", {"connector": 1e-4, "objective": 1e-4}, 1680),
    ("instructblip", "generate", {"connector": 1e-4}, 1920),
    ("instructblip", "instruct", {"connector": 1e-5}, 128),
    ("instructblip_flan_t5", "instruct", {"connector": 1e-5}, 192),
]


@pytest.mark.parametrize("recipe, stage, train, batch_size", FREEZE_TABLE)
def test_what_trains_is_what_the_papers_train(recipe, stage, train, batch_size):
    settings = compose([f"recipe={recipe}"])
    config = settings.stages[stage]
    assert {part: rate for part, rate in config.train.items() if rate is not None} == train
    assert (config.batch_size, config.optimizer.weight_decay, config.schedule.name) == (batch_size, 0.05, "cosine")
    small = compose([f"recipe={recipe}", "mini=true"])
    parts = build_skeleton(small, small.stages[stage], build_tokenizer(small))
    assert {group.part for group in trained_groups(small.stages[stage], parts)} == set(train)
    if "connector" in train:  # LAVIS's ln_vision, outside its frozen encoder
        names = {name for group in trained_groups(small.stages[stage], parts) for name in group.names}
        assert {"ln_vision.weight", "ln_vision.bias"} <= names


def test_sizes_are_the_published_ones():
    """Section 4: 188M in the first stage, heads included, and 107M in the second (here without rounding)."""
    represent, generate, finetune = plan_run(compose(["recipe=blip2"]), Machine())
    assert represent.trainable == pytest.approx(188e6, rel=0.01)
    assert generate.trainable == pytest.approx(107e6, rel=0.005)
    more_positions = (26**2 - 16**2) * 1408  # 364 pixels after 224
    assert represent.parts["vision"]["trainable"] == 0
    assert represent.parts["vision"]["frozen"] + more_positions == finetune.parts["vision"]["trainable"]
    assert generate.picture_tokens == (32, 32)
    instruct = plan_run(compose(["recipe=instructblip", "stage=instruct"]), Machine())[0]
    assert instruct.trainable == pytest.approx(188e6, rel=0.01)


def test_the_encoder_gives_257_tokens_of_its_second_to_last_layer():
    options = vars(compose(["recipe=blip2"]).vision)
    with torch.device("meta"):
        vision = build_vision(**options, weights=False)
        features = vision(torch.empty(1, 3, *vision.image_size))
    assert features.patches.shape == (1, 16, 16, 1408) and features.prefix.shape == (1, 1, 1408)
    assert (vision.num_blocks, vision.layer) == (40, -2)


# one stage after the other, without training


def small(recipe: str, *more: str) -> Run:
    return compose([f"recipe={recipe}", "mini=true", *more])


def hand_on(settings: Run, stage: str, previous: Path | None, folder: Path) -> Path:
    """A model folder as the stage would write it if it learned nothing."""
    parts = build_parts(settings, settings.stages[stage], previous, build_tokenizer(settings))
    kept = [parts.get(part) for part in ("vision", "connector", "llm")]
    VLMWrapper(*kept).save_pretrained(folder)
    return folder


def test_each_stage_starts_from_the_one_before(tmp_path):
    settings = small("instructblip")
    tokenizer = build_tokenizer(settings)
    first = hand_on(settings, "represent", None, tmp_path / "represent")
    second = hand_on(settings, "generate", first, tmp_path / "generate")
    parts = build_parts(settings, settings.stages["instruct"], second, tokenizer)
    config = json.loads((second / "connector" / "config.json").read_text())
    assert config["out_dim"] == 128 and config["text_vocab"] is None
    before = VLMWrapper.from_pretrained(first).connector.state_dict()
    between = VLMWrapper.from_pretrained(second).connector.state_dict()
    after = parts["connector"].state_dict()
    text = {name for name in before if "embedding" in name or "text_ffn" in name}
    assert set(between) == set(before) - text | {"proj.weight", "proj.bias"} and set(after) == set(between) | text
    for name in set(before) - text:
        assert before[name].equal(between[name]) and before[name].equal(after[name]), name
    for name in between:
        assert between[name].equal(after[name]), name
    again = build_parts(settings, settings.stages["instruct"], second, tokenizer)["connector"].state_dict()
    assert all(after[name].equal(again[name]) for name in after)


def test_a_stage_reads_what_it_should():
    settings = small("instructblip")
    tokenizer = build_tokenizer(settings)
    for stage, reads in (("represent", "answer"), ("generate", None), ("instruct", "instruction")):
        stage = settings.stages[stage]
        parts = build_skeleton(settings, stage, tokenizer)
        objective = OBJECTIVES[stage.objective]
        processor = build_processor(settings, stage, parts, objective, tokenizer)
        assert (processor.reader and processor.reader.reads) == reads
        assert processor.in_pairs == (stage.name == "represent")


def test_a_connector_that_reads_no_text_ignores_it(tmp_path):
    """One override can therefore replace it: only connectors that read text get the instruction."""
    settings = small("instructblip", "connector=mlp", "stages.instruct.fresh=[connector]")
    parts = build_skeleton(settings, settings.stages["instruct"], build_tokenizer(settings))
    assert not parts["connector"].reads_text


# settings that cannot work are refused before training


@pytest.mark.parametrize(
    "recipe, more, said",
    [
        ("blip2", ["connector=mlp"], "connector=mlp needs the width of a language model.*alone .qformer."),
        ("blip2", ["stages.represent.connector_text.read=null"], "connector_text.read=answer"),
        ("blip2", ["stages.represent.connector_text.read=question"], "connector_text.read=question: expected"),
        ("blip2", ["stages.generate.drops=[]"], "stages.generate.drops: core.embedding.positions.weight"),
        ("blip2", ["stages.generate.fresh=[]"], "not in stages.generate.fresh: proj.bias, proj.weight"),
        ("blip2", ["stages.generate.fresh=[llm.x]"], "stages.generate.fresh names llm.x"),
        ("blip2", ["connector.text_vocab=20"], "connector.text_vocab=20, but the vocabulary .* has size 350"),
        ("blip2", ["connector.text_positions=16"], "max_length=32 is longer than connector.text_positions=16"),
        ("blip2", ["stages.represent.micro_batch_size=4"], "compares the samples of a step.*micro_batch_size"),
        ("blip2", ["stages.represent.batch_size=1"], "stages.represent.batch_size=1"),
        ("blip2", ["stages.represent.image_fit=tiles"], "stages.represent.image_fit=tiles"),
        ("instructblip", ["stages.instruct.connector_text.read=answer"], "would show the connector what the language"),
        ("instructblip", ["stages.instruct.connector_text.read=null"], "no tensor of this name.*core.embedding"),
        ("instructblip", ["stage=instruct"], "instruct needs weights for its connector"),
    ],
)
def test_what_cannot_work_is_refused_before_training(recipe, more, said, tmp_path):
    with pytest.raises(ValueError, match=rf"(?s){said}"):
        settings = small(recipe, *more)
        check_run(settings, 1)
        check_stages(settings, RunFolder(tmp_path))


def test_the_connector_of_a_model_folder_is_checked_too(tmp_path):
    """The same command with a different Q-Former from the model folder's."""
    settings = small("instructblip")
    first = hand_on(settings, "represent", None, tmp_path / "first")
    build_processor(
        settings,
        settings.stages["represent"],
        build_skeleton(settings, settings.stages["represent"], build_tokenizer(settings)),
        OBJECTIVES["qformer_pretraining"],
        build_tokenizer(settings),
    ).save_pretrained(first)
    line = ["stage=generate", f"init_from={first}"]
    check_stages(small("instructblip", *line), RunFolder(tmp_path / "run"))
    with pytest.raises(ValueError, match=r"wrong shape: core\.query_tokens"):
        check_stages(small("instructblip", *line, "connector.num_queries=8"), RunFolder(tmp_path / "run"))
