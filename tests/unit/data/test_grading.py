"""Annotations of records that only evaluation uses."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from tests.conftest import gpt, human
from vlmtrain.data.grading import check_grading, graded, read_grading
from vlmtrain.data.llava import LlavaJson
from vlmtrain.data.records import UNGRADED, BadSample, Grading, Turn
from vlmtrain.data.sources import build_source
from vlmtrain.settings.data import read_data

TALK = (Turn("user", "a?"), Turn("assistant", "b"), Turn("user", "c?"), Turn("assistant", "d"))


def problems(turns: tuple[Turn, ...], record: dict) -> list[str | None]:
    return [turn.grading.problem for turn in graded(turns, record) if turn.role == "assistant"]


def test_a_record_describes_all_its_turns_or_its_only_answer():
    assert [turn.grading.category for turn in graded(TALK, {"category": "x"})] == [None, "x", None, "x"]
    (_, only) = graded(TALK[:2], {"choices": ["b", "c"], "category": 3})
    assert only.grading == Grading(category="3", choices=("b", "c"))
    two = "the record has 2 answers: put answers, captions and choices into its turns"
    assert problems(TALK, {"choices": ["b", "d"]}) == [two, two]
    assert graded(TALK, {}) == TALK
    assert problems(TALK[:2], {"choices": ["B", "c"]}) == ["the answer 'b' is not one of its 'choices', ['B', 'c']"]
    assert problems((TALK[0], Turn("assistant", "b", Grading(choices=("c",)))), {}) != [None]


def test_vqa_annotations_are_read_as_they_are():
    people = [{"answer": "red", "answer_confidence": "yes", "answer_id": i} for i in range(10)]
    assert read_grading({"answers": people}).answers == ("red",) * 10


@pytest.mark.parametrize(
    "record, said",
    [
        ({"answers": ["a", "b", "c"]}, "'answers' must be of at least 4 annotators"),
        ({"answers": "red"}, "'answers' must be a non-empty list"),
        ({"choices": []}, "'choices' must be a non-empty list"),
        ({"captions": [True]}, "'captions' must be a list of strings, got True"),
        ({"category": ["x"]}, "'category' must be a string"),
    ],
)
def test_annotations_that_evaluation_cannot_use_are_a_problem_only_of_evaluation(record, said):
    turns = graded(TALK[:2], record)
    with pytest.raises(BadSample, match=f"rec: {said}"):
        check_grading("rec", turns)
    assert [(turn.role, turn.text) for turn in turns] == [("user", "a?"), ("assistant", "b")]


def test_all_formats_read_annotations(tmp_path):
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
    turns = build_source(read_data(data).split("validation"), (8, 8), seed=0)[0].turns
    assert turns[1].grading == Grading("color", answers=("red",) * 10)
