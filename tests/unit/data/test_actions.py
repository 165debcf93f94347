"""Actions: bins by hand, records that are read or refused, and what is trained on."""

from __future__ import annotations

import json
import math

import datasets
import numpy as np
import pytest
from PIL import Image

from vlmtrain.data.actions import Binning
from vlmtrain.data.geometry import Geometry
from vlmtrain.data.hf_dataset import HFDataset
from vlmtrain.data.images import ImageInMemory
from vlmtrain.data.processor import Processor
from vlmtrain.data.reach import Reach
from vlmtrain.data.record_reader import read_record
from vlmtrain.data.records import BadSample, Conversation, Turn
from vlmtrain.data.rendered import IGNORE
from vlmtrain.data.shapes import COLORS, HELD_OUT
from vlmtrain.model.llm import add_tokens
from vlmtrain.model.tiny_tokenizer import END, build_tiny_tokenizer
from vlmtrain.settings import compose
from vlmtrain.training.assembly import build_tokenizer
from vlmtrain.training.processing import writings

from . import chat_formats

BINNING = Binning(16, (-1.0, 0.0, -3.0), (1.0, 5.0, -1.0))
FOUR = Binning(4, 0.0, 4.0)  # with centers 0.5, 1.5, 2.5 and 3.5


@pytest.fixture
def processor() -> Processor:
    tokenizer = build_tiny_tokenizer(("touch", "done"))
    add_tokens(tokenizer, BINNING.tokens)
    return Processor(tokenizer, None, "chat", 200, actions=BINNING)


def talk(answer: str, *actions: tuple[float, ...]) -> Conversation:
    return Conversation("x", (Turn("user", "touch"), Turn("assistant", answer)), actions=actions)


def test_bins_are_those_of_numpy():
    vectors = np.random.default_rng(0).uniform((-1.5, -1, -4), (1.5, 6, 0), (200, 3))
    edges = [np.linspace(low, high, 17) for low, high in zip(BINNING.low, BINNING.high)]
    for vector in vectors:
        expected = [int(np.clip(np.digitize(number, own) - 1, 0, 15)) for number, own in zip(vector, edges)]
        assert BINNING.encode(vector) == "".join(f"<action_{number}>" for number in expected)
    assert BINNING.encode(BINNING.low) == "<action_0>" * 3 and BINNING.encode(BINNING.high) == "<action_15>" * 3


def test_a_round_trip_loses_at_most_half_a_bin():
    low, high = np.array(BINNING.low), np.array(BINNING.high)
    for vector in np.random.default_rng(1).uniform(low, high, (200, 3)):
        assert np.all(abs(BINNING.decode(BINNING.encode(vector)) - vector) <= (high - low) / 32 + 1e-12)
    several = BINNING.encode((0, 1, -1)) + " then " + BINNING.encode((1, 0, -3))
    assert BINNING.decode(several) == pytest.approx([0.0625, 1.09375, -1.0625, 0.9375, 0.15625, -2.9375])
    assert FOUR.decode("<action_3>, <action_4>, <action_x>, <action>, <action_0>").tolist() == [3.5, 0.5]


def test_only_the_action_and_the_end_are_trained(processor):
    sample = processor(talk("<action>", (1.0, 0.0, -2.0)))
    targets = sample.tokens.targets[sample.tokens.targets != IGNORE].tolist()
    tokens = processor.tokenizer.convert_ids_to_tokens(targets)
    assert tokens == ["<action_15>", "<action_0>", "<action_8>", END]
    (written,) = (turn for turn in processor.written(talk("<action> done", (1, 0, -2))).turns if turn.role != "user")
    assert written.text == "<action_15><action_0><action_8> done" and written.grading.actions == BINNING


def test_the_prompt_of_openvla_is_the_published_one():
    """The image comes first; only the action and the end are trained."""
    tokenizer = chat_formats.llama_bpe()
    add_tokens(tokenizer, FOUR.tokens)
    settings = compose(["recipe=openvla"])
    geometry = Geometry((8, 8), "squash", (0.5,) * 3, (0.5,) * 3, tokens=4)
    processor = Processor(tokenizer, geometry, "chat", 200, settings.llm.chat_template, actions=FOUR)
    turns = Turn("user", "<image>\nopen the drawer"), Turn("assistant", "<action>")
    image = ImageInMemory(Image.new("RGB", (8, 8)), "an image")
    tokens = processor.render(Conversation("x", turns, (image,), actions=((0.5, 3.9),)))
    start = tokens.answers[0][0]
    assert tokens.input_ids[0] == tokenizer.bos_token_id and (tokens.index[1:5] >= 0).all()
    prompt = tokenizer.decode(tokens.input_ids[5:start])
    assert prompt.strip() == "In: What action should the robot take to open the drawer?\nOut:"
    assert tokenizer.convert_ids_to_tokens(tokens.targets[tokens.targets != IGNORE].tolist()) == [
        "<action_0>", "<action_3>", "</s>"
    ]  # fmt: skip


def test_what_does_not_fit_is_a_bad_sample(processor):
    for conversation, said in (
        (talk("<action>", (1.0, 2.0)), "x: an action has 2 numbers, expected the 3 of actions.low and actions.high"),
        (talk("<action><action>", (1, 2, 3)), "x: 2 <action> marks in the answers, but 1 actions"),
    ):
        with pytest.raises(BadSample, match=said):
            processor(conversation)
    without = Processor(processor.tokenizer, None, "chat", 200)
    with pytest.raises(BadSample, match=r"x: the sample has actions, but actions\.bins is not set"):
        without(talk("<action>", (1, 2, 3)))
    assert without(talk("<action>")).tokens.targets.max() >= 0  # ordinary text


def test_records_have_an_action_for_each_mark():
    turns = [("q", "go <action> and <action>"), ("an <action>?", "no")]
    messages = [{"user": asked, "assistant": answer} for asked, answer in turns]
    found = read_record({"messages": messages, "actions": [[1, 2], [3, 4]]})
    assert found.actions == ((1.0, 2.0), (3.0, 4.0)) and found.unused == ()
    assert read_record({"question": "q", "actions": [0.5, 1]}).turns[-1].text == "<action>"
    several = read_record({"question": "q", "actions": [[0.5, 1], [2, 3]]})
    assert several.turns[-1].text == "<action><action>" and several.actions[1] == (2, 3)
    assert read_record({"question": "q", "answer": "at <action>", "actions": [5]}).turns[-1].text == "at <action>"
    assert read_record({"question": "q", "answer": "<action>"}).actions == ()


@pytest.mark.parametrize(
    "more, said",
    [
        ({"actions": [[1, math.nan]]}, "'actions' must be a list of lists of finite numbers, got"),
        ({"actions": [[1, "2"]]}, "'actions' must be a list of lists of finite numbers"),
        ({"actions": [[1], 2]}, "'actions' must be a list of lists of finite numbers"),
        ({"actions": "up"}, "'actions' must be a list of lists of finite numbers, got 'up'"),
        ({"actions": [[1], [2]]}, r"1 <action> marks in the answers, but 2 'actions'; data.ignore=\[actions\] trains"),
        (
            {"answer": None, "dialogues": [[]], "question": None, "actions": [1]},
            r"'dialogues' does not support 'actions'; data.ignore=\[actions\]",
        ),
    ],
)
def test_bad_records_name_themselves_and_the_key(more, said):
    with pytest.raises(BadSample, match=rf"\(id arm\): {said}"):
        read_record({"id": "arm", "question": "q", "answer": "<action>", **more})


def test_a_column_of_vectors_is_the_answer(tmp_path):
    rows = {"task": ["open", "close"], "action": [[0.5, -1.0], [0.0, 1.0]], "answer": ["x", "y"]}
    datasets.Dataset.from_dict(rows).save_to_disk(tmp_path / "data")
    columns = {"question": "task", "actions": "action"}
    found = HFDataset(tmp_path / "data", columns=columns, ignored=["answer"])[1]
    assert [turn.text for turn in found.turns] == ["close", "<action>"] and found.actions == ((0.0, 1.0),)


def test_model_folders_keep_the_bins(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    again = Processor.from_pretrained(tmp_path)
    sample = talk("<action>", (0.3, 2.0, -2.9))
    assert (
        again.actions == BINNING
        and again(sample).tokens.input_ids.tolist() == processor(sample).tokens.input_ids.tolist()
    )
    settings = {"recipe=quickstart": BINNING, "actions.bins=4": Binning(4, -1.0, 1.0)}
    line = [f"init_from={tmp_path}"]
    for override, expected in settings.items():
        line.append(override)
        assert writings(compose(line))["actions"] == expected
    Processor(processor.tokenizer, None, "chat", 200).save_pretrained(tmp_path / "without")
    assert "actions" not in json.loads((tmp_path / "without" / "processor" / "processor.json").read_text())


def test_settings_add_a_token_per_bin():
    run = compose(["recipe=quickstart", "data=reach", "actions.bins=3", "actions.low=[-1,0]", "actions.high=2"])
    assert run.new_tokens == ("<action_0>", "<action_1>", "<action_2>") and run.actions.binning.dimensions == 2
    assert build_tokenizer(run).tokenize("<action_2><action_0>") == ["<action_2>", "<action_0>"]
    assert compose(["recipe=quickstart", "actions.bins=3"]).actions.binning == Binning(3, -1.0, 1.0)
    for line, said in (
        (["actions.high=2"], r"actions.low=None and actions.high=2 have no effect without actions.bins"),
        (["actions.bins=1"], "actions.bins=1: expected an integer"),
        (["actions.bins=3", "actions.low=1"], r"actions.low=1: expected less than actions.high=1"),
        (
            ["actions.bins=3", "actions.low=[0,0]", "actions.high=[1,1,1]"],
            "low has 2 dimensions, but actions.high has 3",
        ),
        (["actions.bins=3", "actions.low=[]"], "actions.low=.*: expected a number, a list of one number per dimension"),
    ):
        with pytest.raises(ValueError, match=said):
            compose(["recipe=quickstart", *line])


@pytest.mark.parametrize("index", range(12))
def test_the_action_of_generated_data_leads_from_the_center_to_the_target(index):
    split = "validation" if index % 2 else "instruct"
    conversation = Reach(split, 12, image_size=96)[index]
    (image,), ((right, down),) = conversation.images, conversation.actions
    color, shape = conversation.turns[0].text.split()[-2:]
    assert ((color, shape) in HELD_OUT) == (split == "validation")
    pixels = np.asarray(image.load()).astype(int)
    rows, columns = (abs(pixels - COLORS[color]).max(axis=2) < 12).nonzero()
    if sum(item.color == color for item in image.items) == 1:  # its pixels lie around its center
        assert ((columns.min() + columns.max()) / 2 / 96, (rows.min() + rows.max()) / 2 / 96) == pytest.approx(
            (0.5 + right, 0.5 + down), abs=0.1
        )
