"""`validation.lmms_eval`: what cannot work is refused before anything is loaded."""

from __future__ import annotations

import sys

import pytest

from vlmtrain.evaluation.lmms_eval import Benchmarks
from vlmtrain.settings import compose
from vlmtrain.training.checks import check_run

LINE = ["recipe=llava_1_5", "mini=true"]


def test_without_lmms_eval_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "lmms_eval.tasks", None)
    with pytest.raises(ValueError, match=r"validation.lmms_eval needs lmms-eval .*pip install --no-deps lmms-eval"):
        Benchmarks(["pope"], 4, None)


@pytest.mark.parametrize("tasks", ["pope", "null", "[pope,3]"])
def test_tasks_are_a_list_of_names(tasks):
    with pytest.raises(ValueError, match=r"validation.lmms_eval=.* expected a list of names"):
        check_run(compose([*LINE, f"validation.lmms_eval={tasks}"]), 1)


def test_ranks_that_share_the_weights_cannot_ask_different_questions():
    line = [*LINE, "validation.lmms_eval=[pope]"]
    with pytest.raises(ValueError, match="zero3 on several processes does not support; train with zero2"):
        check_run(compose([*line, "engine=zero3"]), 2)
    check_run(compose([*line, "engine=zero3"]), 1)
    check_run(compose([*line, "engine=zero2"]), 2)
