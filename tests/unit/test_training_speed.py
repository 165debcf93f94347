"""When the benchmark of training speed compares two runs, and when it reports that it cannot."""

from __future__ import annotations

import random
import re
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest

from benchmarks.speed_inputs import Case, talks
from benchmarks.training_speed import __doc__, case_rows, disagreement, watch


def case(precision: str = "fp32", **firsts: list[float | None]) -> Case:
    """The two sides, with the first losses of their runs."""
    made = Case("align", precision, Path(), Namespace())
    run = {"samples_per_second": 2.0, "targets_per_second": 9.0, "peak": 2**30}
    made.sides = {side: [{**run, "first": loss} for loss in losses] for side, losses in firsts.items()}
    return made


@pytest.mark.parametrize("side", ["ours", "packed"])
def test_the_same_first_loss_is_compared(side):
    assert disagreement(case(ours=[2.0, 2.0001], packed=[7.0], trainer=[2.0, 2.0]), side, "trainer") is None


@pytest.mark.parametrize(
    "ours, trainer",
    [([2.0, 2.001], [2.0]), ([2.0], [2.0, 2.001]), ([None], [2.0]), ([2.0], [None]), ([2.0, None], [2.0])],
)
def test_a_different_first_loss_in_any_run_invalidates_the_comparison(ours, trainer):
    assert "void: first losses" in disagreement(case(ours=ours, trainer=trainer), "ours", "trainer")
    assert "void: first losses" in disagreement(case(ours=ours, trainer=trainer, packed=[9.0]), "packed", "trainer")


def test_bf16_may_round_differently():
    assert disagreement(case("bf16", ours=[2.03], trainer=[2.0]), "ours", "trainer") is None
    assert "void" in disagreement(case("bf16", ours=[2.05], trainer=[2.0]), "ours", "trainer")


def test_packed_rows_are_compared_with_padded_ones():
    assert "void: packed requires ours" in disagreement(case(packed=[2.0], trainer=[2.0]), "packed", "trainer")


def test_a_row_has_ratios_of_speed_and_memory():
    made = case(trl=[2.0], trainer=[2.0])
    made.sides["trainer"][0].update(samples_per_second=4.0, peak=2**31)
    trl, trainer = case_rows(made)
    assert trl == "| align fp32 | trl | 2.00 | 0.50 | 9 |  |  | 1.00 GiB (0.50) |"
    assert trainer == "| align fp32 | trainer | 4.00 | 1 | 9 |  |  | 2.00 GiB |"


def test_the_mixture_is_as_the_page_says():
    words = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "a red circle"}]
    made = list(talks(random.Random(0), [{"image": "a.png", "conversations": words}], 20_000))
    questions = sum(len(record["conversations"]) // 2 for record in made) / len(made)
    assert float(re.search(r"geometric, mean (\S+)\)", __doc__)[1]) == round(questions, 1)
    assert sum("image" not in record for record in made) / len(made) == pytest.approx(0.06, abs=0.01)


WRITES = """
import sys, time
for step in range(int(sys.argv[2])):
    print('{"step": %d}' % step, file=open(sys.argv[1], "a"))
time.sleep(float(sys.argv[3]))
sys.exit("out of memory" if sys.argv[3] == "0" else 0)
"""


def test_a_run_is_ended_after_its_last_step_or_at_its_limit(tmp_path):
    def run(steps: int, sleep: str, **options) -> list[dict]:
        file = tmp_path / f"{steps}-{sleep}-{len(options)}"
        return watch([sys.executable, "-c", WRITES, str(file), str(steps), sleep], file, 1, **options)[0]

    started = time.monotonic()
    assert run(5, "60", lines=3) == [{"step": 0}, {"step": 1}, {"step": 2}]
    with pytest.raises(TimeoutError, match="2 steps after 1 s"):
        run(2, "60", lines=3, limit=1)
    with pytest.raises(RuntimeError, match="out of memory"):
        run(2, "0", lines=3)
    assert time.monotonic() - started < 30
