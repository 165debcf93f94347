"""Annotations of records that only evaluation uses."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from tests.conftest import gpt, human
from vlmtrain.data.llava import LlavaJson
from vlmtrain.data.records import UNGRADED, BadSample, Grading, Turn
from vlmtrain.data.sources import build_source
from vlmtrain.data.turns import graded, read_grading

TALK = (Turn("user", "a?"), Turn("assistant", "b"), Turn("user", "c?"), Turn("assistant", "d"))


def test_a_record_speaks_of_all_its_turns_or_of_its_only_answer():
    assert [turn.grading.category for turn in graded(TALK, {"category": "x"}, "r")] == [None, "x", None, "x"]
    (_, only) = graded(TALK[:2], {"choices": ["b", "c"], "category": 3}, "r")
    assert only.grading == Grading(category="3", choices=("b", "c"))
    with pytest.raises(BadSample, match=r"r: the record has 2 answers: put answers, captions and choices"):
        graded(TALK, {"choices": ["b", "d"]}, "r")
    assert graded(TALK, {}, "r") is TALK
    with pytest.raises(BadSample, match=r"r: the answer 'b' is not one of its 'choices', \['B', 'c'\]"):
        graded(TALK[:2], {"choices": ["B", "c"]}, "r")
    with pytest.raises(BadSample, match=r"not one of its 'choices'"):
        graded((TALK[0], Turn("assistant", "b", Grading(choices=("c",)))), {}, "r")


def test_vqa_annotations_are_read_as_they_are():
    people = [{"answer": "red", "answer_confidence": "yes", "answer_id": i} for i in range(10)]
    assert read_grading({"answers": people}, "r").answers == ("red",) * 10


@pytest.mark.parametrize(
    "record, said",
    [
        ({"answers": ["a", "b", "c"]}, "'answers' must be of at least 4 annotators"),
        ({"answers": "red"}, "'answers' must be a non-empty list"),
        ({"choices": []}, "'choices' must be a non-empty list"),
        ({"captions": [1]}, "'captions' must be a list of strings, got 1"),
        ({"category": ["x"]}, "'category' must be a string"),
    ],
)
def test_what_cannot_be_read_names_the_record(record, said):
    with pytest.raises(BadSample, match=f"rec: {said}"):
        read_grading(record, "rec")


def test_the_formats_carry_it(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    talk = [human("<image>\nWhat?"), {**gpt("red"), "choices": ["red", "blue"]}]
    records = [
        {"image": "a.png", "conversations": talk, "category": "color"},
        {"conversations": [human("a"), gpt("b")]},
    ]
    (tmp_path / "a.json").write_text(json.dumps(records))
    source = LlavaJson(tmp_path / "a.json", tmp_path)
    assert source[0].turns[1].grading == Grading("color", choices=("red", "blue"))
    assert all(turn.grading == UNGRADED for turn in source[1].turns)

    rows = [{"question": "What?", "answer": "red", "answers": ["red"] * 10, "category": "color"}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    columns = {"answers": "answers", "category": "category"}
    data = {"format": "hf", "validation": {"path": str(tmp_path / "rows.jsonl"), "columns": columns}}
    turns = build_source(data, "validation", (8, 8), seed=0)[0].turns
    assert turns[1].grading == Grading("color", answers=("red",) * 10)
