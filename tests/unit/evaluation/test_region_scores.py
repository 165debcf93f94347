"""Scores of boxes and points in answers, on the original image."""

from __future__ import annotations

import random

import pytest

from vlmtrain.data.boxes import Writing, text_of
from vlmtrain.data.geometry import Geometry
from vlmtrain.data.records import Grading
from vlmtrain.data.regions import Frame, Place, Region, iou
from vlmtrain.evaluation.scores import Answer, check_fits, grade
from vlmtrain.evaluation.unfinished import Unfinished

WHOLE = Frame((1000, 500), (1000, 500))


def answer(prediction: str, place: Place) -> Answer:
    return Answer(0, 0, "Where?", "", prediction, Grading(places=(place,)))


def test_overlap_is_intersection_over_union():
    assert iou((0, 0, 10, 10), (0, 0, 10, 10)) == 1
    assert iou((0, 0, 10, 10), (5, 0, 15, 10)) == pytest.approx(50 / 150)
    assert iou((0, 0, 10, 10), (2, 2, 4, 7)) == pytest.approx(10 / 100)
    assert iou((0, 0, 10, 10), (10, 0, 20, 10)) == iou((0, 0, 10, 10), (30, 30, 40, 40)) == 0


def test_boxes_are_scored_by_hand():
    place = Place((100, 100, 300, 200), "qwen3_vl", WHOLE, 0)  # thousandths: 100 200 300 400
    answers = [
        answer('{"bbox_2d": [100, 200, 300, 400]}', place),  # 1
        answer('{"bbox_2d": [300, 400, 100, 300]}', place),  # its lower half: 0.5, which is enough
        answer('{"bbox_2d": [200, 200, 400, 400]}', place),  # half of it and as much beside: 1/3
        answer("I see no cat [100, 200, 300, 400]", place),  # 0, unparsed
    ]
    found = grade(answers)
    assert found.total["iou"] == pytest.approx((1 + 0.5 + 1 / 3) / 4)
    assert found.total["box_accuracy"] == 0.5 and found.total["unparsed_boxes"] == 0.25
    assert [values["iou"] for values in found.each] == pytest.approx([1, 0.5, 1 / 3, 0])
    assert "point_accuracy" not in found.total


def test_points_are_scored_by_hand():
    box = Place((100, 100, 300, 200), "molmo", WHOLE, 0)
    hits = [answer(f'<point x="{x}" y="{y}">', box) for x, y in ((20.0, 30.0), (10.0, 40.0), (9.0, 30.0))]
    found = grade([*hits, answer("none", box)]).total
    assert found["point_accuracy"] == 0.5 and found["unparsed_points"] == 0.25 and "iou" not in found
    # 5 % of the diagonal of 1118 pixels
    point = Place((500.0, 250.0), "qwen3_vl", WHOLE, 0)
    assert grade([answer('{"point_2d": [550, 500]}', point)]).total["point_accuracy"] == 1
    assert grade([answer('{"point_2d": [560, 500]}', point)]).total["point_accuracy"] == 0


def test_named_metrics_need_one_region():
    box, point = Place((0, 0, 9, 9), "qwen3_vl", WHOLE, 0), Place((3, 3), "qwen3_vl", WHOLE, 0)
    check_fits([answer("", box)], ["iou", "box_accuracy"])
    several = Answer(0, 0, "Where?", "", "", Grading(places=(box, box)))
    for name, wrong in (("iou", point), ("box_accuracy", point), ("point_accuracy", box)):
        with pytest.raises(ValueError, match=rf"validation.metrics names {name}, which needs one"):
            check_fits([answer("", wrong)], [name])
    with pytest.raises(ValueError, match="needs one box in its answer"):
        check_fits([several], ["iou"])
    assert grade([several]).total == {"exact_match": 1}


@pytest.mark.parametrize("size", [(480, 640), (600, 900), (300, 600)])
def test_padding_costs_a_perfect_model_nothing(size):
    """Coordinates of the padded image that are read as those of the original one miss many boxes."""
    geometry = Geometry((336, 336), "pad", (0.5,) * 3, (0.5,) * 3, tokens=4)
    draw, answers, naive = random.Random(0), [], []
    height, width = size
    for _ in range(300):
        w, h = draw.uniform(0.1, 0.5) * width, draw.uniform(0.1, 0.5) * height
        x, y = draw.uniform(0, width - w), draw.uniform(0, height - h)
        region = Region((x, y, x + w, y + h))
        for found, frame in ((answers, "seen"), (naive, "image")):
            seen = Writing("llava", "seen").place(region, geometry.map(size))
            found.append(answer(text_of(seen), Writing("llava", frame).place(region, geometry.map(size))))
    assert grade(answers).total["box_accuracy"] == 1
    assert grade(naive).total["box_accuracy"] < 0.9


def test_unfinished_evaluations_keep_the_places(tmp_path):
    from vlmtrain.evaluation.reading import Told

    place = Place((100.0, 100.0, 300.0, 200.0), "llava", Frame((9, 8), (7, 6), (0.5, 0.25), (0.0, 1.5)), 1)
    told = [Told(1.0, 2.0, (answer("[0.1, 0.2, 0.3, 0.4]", place),))]
    Unfinished(tmp_path / "answers", {"model": "a"}).add({(0, 3): told})
    assert Unfinished(tmp_path / "answers", {"model": "a"}).found == {(0, 3): told}
