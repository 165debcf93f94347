"""Demonstrations: prompts compared with conversations built by hand, which records are drawn, and refused settings."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace

import pytest
import torch
from PIL import Image

from vlmtrain.data.actions import Binning
from vlmtrain.data.boxes import Writing
from vlmtrain.data.geometry import Geometry
from vlmtrain.data.images import ImageInMemory, ImageOnDisk
from vlmtrain.data.processor import Processor
from vlmtrain.data.records import BadSample, Conversation, Grading, Turn
from vlmtrain.data.regions import Region
from vlmtrain.data.sources import build_source
from vlmtrain.evaluation.few_shot import Demonstrations, first_exchange, preceded, why_zero_shot
from vlmtrain.evaluation.held_out import HeldOut
from vlmtrain.settings import compose, compose_evaluation, read_run
from vlmtrain.settings.data import read_data
from vlmtrain.settings.free_keys import completed

from ...conftest import gpt, human

GEOMETRY = Geometry((8, 12), "squash", (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), tokens=6)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Ten files of different colors."""
    folder = tmp_path_factory.mktemp("images")
    for number in range(10):
        Image.new("RGB", (16, 20), (20 * number, 255 - 20 * number, 40)).save(folder / f"{number}.png")
    return folder


def talk(id: str, *words: str, media=()) -> Conversation:
    roles = ("user", "assistant")
    return Conversation(id, tuple(Turn(roles[i % 2], text) for i, text in enumerate(words)), media)


@pytest.fixture
def pool(images) -> list[Conversation]:
    """One image, none, two in the first question, and one image whose second question shows another."""
    file = [ImageOnDisk(images / f"{number}.png") for number in range(10)]
    return [
        talk("one", "<image>\nWhat color?", "red", "And the shape?", "a circle", media=file[:1]),
        talk("text", "How many?", "two"),
        talk("two", "<image> or <image>?", "blue", media=file[1:3]),
        talk("later", "<image>\nWhat shape?", "square", "Now <image>?", "ring", media=file[3:5]),
    ]


FIRSTS = {
    "one": (("<image>\nWhat color?", "red"), (0,)),
    "text": (("How many?", "two"), ()),
    "two": (("<image> or <image>?", "blue"), (1, 2)),
    "later": (("<image>\nWhat shape?", "square"), (3,)),
}


@pytest.fixture
def processor(tokenizer) -> Processor:
    return Processor(tokenizer, GEOMETRY, "chat", max_length=1000)


def held(source, processor, demonstrations, shots: int, index: int = 0):
    given = {index: shots}
    return next(iter(HeldOut(source, processor, [[index]], 4, True, demonstrations, given)))


@pytest.mark.parametrize("shots", [1, 2, 4])
def test_prompts_are_those_of_one_dialogue_written_by_hand(shots, pool, processor, images):
    own = [ImageOnDisk(images / "8.png"), ImageOnDisk(images / "9.png")]
    question = talk("q", "<image>\nWhat is this?", "a ring", "<image> And this?", "a star", media=own)
    question = replace(question, turns=(Turn("system", "Answer."), *question.turns))
    shown = held([question], processor, Demonstrations(pool, "align", [0, 4]), shots)
    (ids,) = shown.demonstrations
    assert len(ids) == len(set(ids)) == shots
    before = [text for id in ids for text in FIRSTS[id][0]]
    media = [ImageOnDisk(images / f"{number}.png") for id in ids for number in FIRSTS[id][1]]
    system = Turn("system", "Answer.")
    (prompts,) = shown.prompts
    for row, turn in enumerate(prompts.turns):
        number = turn - shots
        said = [*before, *(turn.text for turn in question.turns[1 : 2 * number + 2])]
        by_hand = talk("hand", *said, media=(*media, *own[: number + 1]))
        expected = processor.prompt(replace(by_hand, turns=(system, *by_hand.turns)))
        length = int(prompts.batch.lengths[row])
        assert prompts.batch.input_ids[row, :length].equal(expected.tokens.input_ids)
        assert (prompts.batch.visual.index[row, :length] >= 0).equal(expected.tokens.index >= 0)
    assert sorted(prompts.turns) == [shots, shots + 1]
    assert [(a.turn, a.question, a.reference) for a in shown.questions[0].values()] == [
        (0, "What is this?", "a ring"),
        (1, "And this?", "a star"),
    ]
    whole = talk("hand", *before, *(turn.text for turn in question.turns[1:]), media=(*media, *own))
    expected = processor.collate([processor(replace(whole, turns=(system, *whole.turns)))])
    assert shown.batch.input_ids.equal(expected.input_ids)
    assert shown.batch.visual.pixels[0].equal(expected.visual.pixels[0])
    # only the answers of the question itself count for the loss
    alone = processor.collate([processor(question)])
    assert shown.batch.weights.sum() == alone.weights.sum()
    assert shown.batch.targets[shown.batch.weights > 0].equal(alone.targets[alone.weights > 0])


def test_choices_are_those_of_the_question_after_demonstrations(pool, processor):
    turns = (Turn("user", "What?"), Turn("assistant", "red", Grading(choices=("red", "the large blue ring"))))
    shown = held([Conversation("q", turns)], processor, Demonstrations(pool, "align", [0, 4]), 4)
    before = [text for id in shown.demonstrations[0] for text in FIRSTS[id][0]]
    (choices,) = shown.choices
    assert sorted(choices.choices) == [0, 1] and choices.turns == [4, 4]
    for row, choice in enumerate(choices.choices):
        ids = choices.batch.input_ids[row, choices.starts[row] : int(choices.batch.lengths[row])]
        assert processor.renderer.decode(ids) == ("red", "the large blue ring")[choice]
        text = processor.tokenizer.decode(choices.batch.input_ids[row])
        assert all(answer in text for answer in before[1::2])


def drawn(pool, index: int, count: int, own: Conversation, **options) -> list[str]:
    shots = Demonstrations(pool, "align", [0, count], **options)
    return [shot.id for shot in shots.before(index, own, count)]


def test_demonstrations_depend_on_seed_and_question_and_fewer_are_the_first_of_more():
    pool, own = [talk(str(i), f"What is number {i}?", "red") for i in range(50)], talk("q", "What?", "red")
    eight = drawn(pool, 3, 8, own)
    assert len(set(eight)) == 8 and drawn(pool, 3, 8, own) == eight
    assert all(drawn(pool, 3, count, own) == eight[:count] for count in range(1, 8))
    assert drawn(pool, 4, 8, own) != eight != drawn(pool, 3, 8, own, seed=1)
    often = Counter(id for index in range(500) for id in drawn(pool, index, 5, own))
    assert len(often) == 50 and 20 < min(often.values()) <= max(often.values()) < 90  # 50 on average


def test_a_record_is_never_its_own_demonstration(images, tmp_path):
    """By its question and its image: also if the image is a copy or in memory, and with another answer."""
    (tmp_path / "copy.png").write_bytes((images / "0.png").read_bytes())
    same = [
        ImageOnDisk(images / "0.png"),
        ImageOnDisk(tmp_path / "copy.png"),
        ImageInMemory((images / "0.png").read_bytes(), "0"),
    ]
    other = ImageOnDisk(images / "1.png")
    own = talk("q", "<image>\nWhat color?", "red", "Why?", "because", media=same[:1])
    copies = [talk(f"copy {i}", "What color? <image>", "green", media=(each,)) for i, each in enumerate(same)]
    others = [
        talk("other image", "<image>\nWhat color?", "red", media=(other,)),
        talk("other question", "<image>\nWhat shape?", "circle", media=same[:1]),
        talk("no image", "What color?", "red"),
        talk("two images", "<image><image>\nWhat color?", "red", media=(same[0], other)),
    ]
    again = talk("the second question", "<image>\nWhy?", "because", media=same[:1])
    for index in range(20):
        assert sorted(drawn([*copies, again, *others], index, 4, own)) == sorted(each.id for each in others)
    with pytest.raises(ValueError, match=r"q needs 5 demonstrations, but data\.align has only 4"):
        drawn([*copies, again, *others], 0, 5, own)
    text = talk("q", "What color?", "red")
    assert drawn(others, 0, 3, text).count("no image") == 0


def test_broken_records_are_named_or_replaced_by_others(images, tmp_path):
    (tmp_path / "cut.png").write_bytes((images / "0.png").read_bytes()[:60])
    bad = [
        talk("missing", "<image>\nWhat?", "red", media=(ImageOnDisk(tmp_path / "none.png"),)),
        talk("cut", "<image>\nWhat?", "red", media=(ImageOnDisk(tmp_path / "cut.png"),)),
        talk("empty answer", "What?", " "),
    ]
    good, own = [talk(str(i), "Which?", str(i)) for i in range(3)], talk("q", "Why?", "red")
    assert sorted(drawn([*bad, *good], 0, 3, own, skip_bad=True)) == ["0", "1", "2"]
    with pytest.raises(BadSample, match=r"a demonstration of data\.align: empty answer: an answer is empty"):
        drawn(bad[2:], 0, 1, own)
    with pytest.raises(ValueError, match=r"validation\.shots=\[0, 4\] needs 4 records, but data\.align has 3"):
        Demonstrations(good, "align", [0, 4])


def test_boxes_of_demonstrations_and_of_the_question_refer_to_their_own_images(tokenizer, images):
    """With images of different sizes, written in pixels of the image."""
    processor = Processor(tokenizer, GEOMETRY, "chat", max_length=1000, boxes=Writing("qwen3_vl", "image"))
    wide = images / "wide.png"
    Image.new("RGB", (100, 20)).save(wide)
    shot = talk("shot", "<image>\nWhere?", "<box>", "What is <box>?", "red", media=(ImageOnDisk(images / "1.png"),))
    shot = replace(shot, regions=(Region((0, 0, 8, 10)), Region((1, 1, 2, 2))))
    own = talk("q", "<image>\nWhere?", "<box>", media=(ImageOnDisk(wide),))
    own = replace(own, regions=(Region((50, 5, 100, 20)),))
    shown = held([own], processor, Demonstrations([shot], "align", [0, 1]), 1)
    (answer,) = shown.questions[0].values()
    assert [place.medium for place in answer.grading.places] == [1] and answer.grading.places[0].frame.own == (100, 20)
    alone = processor.written(own).turns[-1].text
    assert answer.reference == alone
    said = processor.renderer.decode(shown.batch.input_ids[0])
    first = replace(shot, turns=shot.turns[:2], regions=shot.regions[:1])
    assert said.count(processor.written(first).turns[1].text) == 1


def test_demonstrations_bring_their_actions(tokenizer):
    binning = Binning(8, 0.0, 8.0)
    processor = Processor(tokenizer, None, "chat", 400, actions=binning)
    shot = replace(talk("shot", "Up?", "<action>", "Down?", "<action>"), actions=((1.0, 2.0), (3.0,)))
    own = replace(talk("q", "Left?", "<action>"), actions=((5.0, 6.0),))
    (answer,) = held([own], processor, Demonstrations([shot], "align", [0, 1]), 1).questions[0].values()
    assert answer.reference == "<action_5><action_6>" and answer.grading.actions == binning
    said = processor.written(preceded(own, [first_exchange(shot)])).turns
    assert [turn.text for turn in said[1::2]] == ["<action_1><action_2>", "<action_5><action_6>"]


def test_a_prompt_that_is_too_long_has_as_many_demonstrations_as_fit(tokenizer):
    pool, own = [talk(str(i), "What color is it?", "red") for i in range(8)], talk("q", "Why?", "red")
    one, alone = (len(Processor(tokenizer, None, "chat", 1000)(each).tokens) for each in (pool[0], own))
    for room, expected in ((0, 0), (one - 1, 0), (one, 1), (5 * one, 5), (6 * one - 1, 5), (8 * one, 8)):
        processor = Processor(tokenizer, None, "chat", alone + room)
        held_out = HeldOut([own], processor, [], 4, True, Demonstrations(pool, "align", [0, 8]))
        assert held_out.length(0, 8) == (alone + expected * one, expected)
    # a longer choice needs room too
    longer = (own.turns[0], replace(own.turns[1], grading=Grading(choices=("red", "the large blue ring"))))
    more = sum(len(tokenizer(text).input_ids) * sign for text, sign in ((" the large blue ring", 1), (" red", -1)))
    processor = Processor(tokenizer, None, "chat", alone + 2 * one + more - 1)
    held_out = HeldOut([replace(own, turns=longer)], processor, [], 4, True, Demonstrations(pool, "align", [0, 8]))
    assert more > 0 and held_out.length(0, 8)[1] == 1


@pytest.mark.parametrize("template", ["plain", "blip", "chat"])
def test_templates_of_one_exchange_cannot_be_shown_demonstrations(tokenizer, template):
    reason = why_zero_shot(Processor(tokenizer, GEOMETRY, template, 100))
    assert (reason is None) == (template == "chat")


FILES = ["data.validation=v.json", "data.instruct=i.json"]
REFUSED = {
    "shots=[]": "validation.shots",
    "shots=[4]": "0 and then increasing numbers",
    "shots=[0,4,4]": "0 and then increasing numbers",
    "shots=[0,4]": "needs validation.shots_from",
    "shots_from=instruct": "validation.shots_from=instruct has no effect",
    "shots_by=rices": "validation.shots_by=rices has no effect",
    "shots=[0,4] shots_from=instrct": "Did you mean 'instruct'",
    "shots=[0,4] shots_from=validation": "expected another split",
    "shots=[0,4] shots_from=align": "data.align is not set",
    "shots=[0,4] shots_from=instruct shots_by=nearest": "expected one of random, rices",
    "shots=[0,4] shots_from=instruct data=hf data.instruct={path: x, streaming: true, samples: 9}": "streaming=true",
}


@pytest.mark.parametrize("line", REFUSED)
def test_settings_without_effect_or_meaning_are_refused(line):
    keys, _, data = line.partition(" data=")
    data = ["data=hf", data.partition(" ")[2]] if data else ["data.instruct=i.json"]
    with pytest.raises(ValueError, match=REFUSED[line].replace("[", r"\[")):
        compose_evaluation([*data, "data.validation=v.json", *keys.split()])
    validation = [f"validation.{each}" for each in keys.split()]
    with pytest.raises(ValueError, match=REFUSED[line].replace("[", r"\[")):
        compose(["recipe=llava_1_5", "vision.name=x", "llm.path=x", *data, "data.validation=v.json", *validation])


def test_evaluate_takes_the_keys_with_or_without_their_group_and_any_split():
    line = ["data.validation=v.json", "+data.train=t.json", "shots=[0,4,8]", "validation.shots_from=train", "samples=9"]
    found = compose_evaluation(line)
    assert found.validation.shots == (0, 4, 8) and found.validation.samples == 9
    assert found.data.split("train").sources["train"].path == "t.json"


def test_settings_that_were_recorded_without_shots_are_read():
    recorded = json.loads(json.dumps(dict(compose(["recipe=quickstart"]).composed)))
    for key in ("shots", "shots_from", "shots_by"):
        del recorded["validation"][key]
    assert read_run(recorded).validation.shots == (0,)
    assert completed(recorded)["validation"]["shots"] == [0]


def test_files_give_the_same_demonstrations_in_every_process(images, tmp_path, processor):
    records = [
        {"id": i, "image": f"{i}.png", "conversations": [human(f"<image>\nWhat is {i}?"), gpt("red")]} for i in range(8)
    ]
    for name, some in (("instruct", records), ("validation", records[4:])):
        (tmp_path / f"{name}.json").write_text(json.dumps(some))
    data = read_data(
        {
            "format": "llava_json",
            "images": str(images),
            **{name: str(tmp_path / f"{name}.json") for name in ("instruct", "validation")},
        }
    )
    asked, pool = (build_source(data.split(name), (8, 12), 0) for name in ("validation", "instruct"))
    shots = Demonstrations(pool, "instruct", [0, 7])
    held_out = HeldOut(asked, processor, [[i] for i in range(4)], 1, True, shots, dict.fromkeys(range(4), 7))
    loader = torch.utils.data.DataLoader(held_out, batch_size=None, num_workers=2)
    for batch in loader:
        (index,) = batch.indices
        ids = [shot.id for shot in shots.before(index, asked[index], 7)]
        assert list(batch.demonstrations[0]) == ids and asked[index].id not in ids
