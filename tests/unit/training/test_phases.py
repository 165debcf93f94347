"""The seconds of the phases of a step, on the host and on a GPU."""

from __future__ import annotations

import time

import pytest
import torch

from vlmtrain.training.phases import PhaseTimer


def test_an_inner_phase_does_not_count_for_the_outer_one(monkeypatch):
    clock = iter([0.0, 2.0, 7.0, 8.0, 20.0, 23.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    timer = PhaseTimer(torch.device("cpu"))
    with timer.phase("forward"), timer.phase("vision"):
        pass
    with timer.phase("backward"):
        pass
    assert timer.seconds() == {"forward": 2.0 + 1.0, "vision": 5.0, "backward": 3.0}
    assert timer.seconds() == {}


@pytest.mark.gpu
def test_phases_of_a_gpu_are_those_of_its_work():
    """The host only queues the work: its own clock would say almost nothing."""
    timer, matrix = PhaseTimer(torch.device("cuda")), torch.randn(4096, 4096, device="cuda")
    for name, products in (("warm-up", 5), ("forward", 20), ("backward", 60)):
        with timer.phase(name):
            for _ in range(products):
                matrix @ matrix
        torch.cuda.synchronize()
    seconds = timer.seconds()
    assert 2.4 <= seconds["backward"] / seconds["forward"] <= 3.6  # three times the products, at a clock that varies
