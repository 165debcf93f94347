"""Scores of actions in answers, by hand."""

from __future__ import annotations

import pytest

from vlmtrain.data.actions import Binning
from vlmtrain.data.records import Grading
from vlmtrain.evaluation.reading import Told
from vlmtrain.evaluation.scores import Answer, check_fits, grade, value_text
from vlmtrain.evaluation.unfinished import Unfinished

BINNING = Binning(4, (0.0, -10.0), (4.0, 10.0))  # centers 0.5, 1.5, 2.5, 3.5 and -7.5, -2.5, 2.5, 7.5


def answer(prediction: str) -> Answer:
    return Answer(0, 0, "q", "<action_1><action_3>", prediction, Grading(actions=BINNING))


@pytest.mark.parametrize(
    "prediction, accuracy, l1, unparsed",
    [
        ("<action_1><action_3>", 1, 0, 0),
        ("moves <action_1> and <action_3>", 1, 0, 0),
        ("<action_3><action_3>", 1 / 2, (2 + 0) / 2, 0),
        ("<action_3><action_1>", 0, (2 + 10) / 2, 0),
        ("<action_1>", 1 / 2, (0 + 15) / 2, 1),  # the second number counts as -7.5 instead of 7.5
        ("nothing", 0, (2 + 15) / 2, 1),  # and the first as 3.5 instead of 1.5
        ("<action_1><action_3><action_0>", 2 / 3, 0, 1),
        ("<action_1><action_9>", 1 / 2, (0 + 15) / 2, 1),
    ],
)
def test_actions_are_scored_by_hand(prediction, accuracy, l1, unparsed):
    found = grade([answer(prediction)]).total
    del found["exact_match"]
    assert found == pytest.approx({"action_accuracy": accuracy, "action_l1": l1, "unparsed_actions": unparsed})


def test_scores_are_means_over_answers_and_shown_in_the_units_of_the_data():
    total = grade([answer("<action_1><action_3>"), answer("<action_3><action_1>")]).total
    assert (total["action_accuracy"], total["action_l1"]) == (0.5, 3.0)
    assert (value_text("action_accuracy", 0.5), value_text("blind_action_l1", 3.0)) == ("50.0%", "3.0000")
    with pytest.raises(ValueError, match="names actions, which needs an action in its answer"):
        check_fits([Answer(0, 0, "q", "red", "")], ["actions"])


def test_unfinished_evaluations_keep_the_bins(tmp_path):
    told = [Told(1.0, 2.0, (answer("<action_1>"),))]
    Unfinished(tmp_path / "answers", {"model": "a"}).add({(0, 3): told})
    assert Unfinished(tmp_path / "answers", {"model": "a"}).found == {(0, 3): told}
