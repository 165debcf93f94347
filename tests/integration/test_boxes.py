"""Boxes from the record to the scores: validation reads answers on the original image, and `check` their ceiling."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from PIL import Image

from vlmtrain.cli import main
from vlmtrain.data.shapes import Shapes
from vlmtrain.evaluation.scores import grade

from ..conftest import gpt, human
from .test_evaluation import built, validator


@pytest.mark.parametrize("line", [["boxes.format=llava"], ["boxes.format=qwen2_5_vl"], ["boxes.format=molmo"]])
def test_the_references_are_what_a_perfect_model_answers(line):
    model = built("recipe=quickstart", "stages.instruct.image_fit=pad", *line)
    source = Shapes("boxes", 4, sides=(48, 96))
    checked = validator(model, source, batch_size=2)
    with torch.no_grad():
        scores, shown = checked.scores(model[0], None)
        answers = checked.answers(model[0], None)
    metrics = {"point_accuracy", "unparsed_points"} if "molmo" in line[0] else {"iou", "box_accuracy", "unparsed_boxes"}
    assert metrics < scores.keys() and all(f"blind_{metric}" in scores for metric in metrics)
    assert len(shown) == 8 and all(metrics < one["scores"].keys() for one in shown)
    perfect = grade([replace(answer, prediction=answer.reference) for answer in answers]).total
    assert perfect.get("box_accuracy", perfect.get("point_accuracy")) == 1


def test_check_prints_the_accuracy_that_rounding_leaves(tmp_path, capsys):
    """Boxes of 2 % of the sides are lost in a grid of 32 x 32 but not in thousandths; user's boxes count as well."""
    Image.new("RGB", (500, 400)).save(tmp_path / "a.png")
    chat = [human("<image>\nWhat is in <box>?"), gpt("red"), human("Where is it?"), gpt("<box>")]
    record = {"image": "a.png", "conversations": chat, "boxes": [[100, 40, 110, 48], [50, 100, 450, 300]]}
    (tmp_path / "data.json").write_text(json.dumps([record]))
    data = ["data=llava_json", f"data.images={tmp_path}", f"data.instruct={tmp_path / 'data.json'}"]
    for name, kept in {"kosmos2": 1, "qwen3_vl": 2}.items():
        line = ["recipe=llava_1_5", "mini=true", "stage=instruct", f"boxes.format={name}", *data]
        main(["check", *line, "--workers", "0", "--json"])
        (report,) = json.loads(capsys.readouterr().out)["instruct"]["sources"].values()
        assert (report["boxes"], report["boxes_kept"], report["problems"]) == (2, kept, [])
    main(["check", *line, "--workers", "0"])
    assert "2 (100.0% have an IoU of at least 0.5" in capsys.readouterr().out


def test_the_frame_needs_a_format():
    from vlmtrain.settings import compose

    with pytest.raises(ValueError, match=r"boxes\.frame=seen has no effect without boxes\.format"):
        compose(["recipe=quickstart", "boxes.frame=seen"])
    with pytest.raises(ValueError, match=r"boxes\.format=qwen: expected one of qwen_vl"):
        compose(["recipe=quickstart", "boxes.format=qwen"])
