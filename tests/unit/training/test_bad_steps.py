"""`BadSteps`: what counts as a spike, and that an interruption changes nothing."""

from __future__ import annotations

import json
import statistics

import pytest

from vlmtrain.settings.run import BadStepOptions
from vlmtrain.training.bad_steps import ENOUGH, WINDOW, BadSteps

OPTIONS = {"in_a_row": 3, "spike": 4.0, "skip_spikes": False}


def fed(losses, **options) -> BadSteps:
    steps = BadSteps("instruct", BadStepOptions(**{**OPTIONS, **options}), None)
    for step, loss in enumerate(losses):
        steps.count(step, loss, steps.judge(loss), ["a"])
    return steps


def test_a_spike_is_measured_in_deviations_of_the_last_losses():
    losses = [2 + 0.1 * (-1) ** i for i in range(WINDOW + 30)]
    steps = fed(losses)
    mean, deviation = statistics.mean(losses[-WINDOW:]), statistics.stdev(losses[-WINDOW:])
    assert steps.judge(mean + 3.99 * deviation) is None
    fault = steps.judge(mean + 4.5 * deviation)
    assert fault.problem == "the loss is 4.5 deviations above its mean, 2" and not fault.skipped
    assert steps.judge(mean - 100 * deviation) is None, "a low loss is not a fault"
    assert fed(losses, skip_spikes=True).judge(mean + 4.5 * deviation).skipped
    assert fed(losses, spike=None).judge(1e9) is None


def test_no_loss_is_a_spike_before_there_are_enough_to_compare_with():
    assert fed([1.0] * (ENOUGH - 1)).judge(100.0) is None
    assert fed([1.0] * ENOUGH).judge(100.0) is not None
    assert fed([1.0] * ENOUGH).judge(1.001) is None, "with constant losses, a tiny increase is not a spike"


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_steps_are_skipped_at_once(loss):
    assert fed([]).judge(loss).skipped


def test_only_steps_in_a_row_stop_a_run():
    nan = float("nan")
    steps = fed([nan, nan, 1.0, nan, nan])
    assert (steps.skipped, steps.in_a_row, steps.losses) == (4, 2, [1.0])
    with pytest.raises(ValueError, match=r"3 steps in a row .*bad_steps.in_a_row=3.* at step 9 .*not finite.* a;"):
        steps.count(9, nan, steps.judge(nan), ["a"])


def test_the_state_survives_a_checkpoint():
    losses = [1 / 3 + 0.01 * i % 0.07 for i in range(50)]
    steps = fed(losses)
    again = BadSteps("instruct", BadStepOptions(**OPTIONS), None, json.loads(json.dumps(steps.state)))
    for loss in (0.4, 0.5, 1.0, float("nan")):
        assert again.judge(loss) == steps.judge(loss)
    assert again.state == steps.state
