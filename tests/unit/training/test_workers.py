"""The number of data processes with ``workers=auto``."""

from __future__ import annotations

import os

import pytest

from vlmtrain.training.workers import STARTING, WINDOW, Workers


@pytest.fixture
def nine_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(18)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")


def steps_until_growth(workers: Workers, waited: float, most: int = 100) -> int | None:
    return next((step for step in range(1, most + 1) if workers.grow(waited, 1.0)), None)


def test_processes_double_while_a_rank_waits_up_to_its_cores(nine_cores):
    workers, counts = Workers("auto"), []
    assert (workers.count, workers.most) == (1, 8)
    while steps_until_growth(workers, 0.5) == STARTING + WINDOW:
        counts.append(workers.count)
    assert counts == [2, 4, 8] and not workers.grow(0.9, 1.0)


def test_a_rank_that_does_not_wait_keeps_its_processes(nine_cores):
    workers = Workers("auto")
    assert steps_until_growth(workers, 0.04) is None and workers.count == 1
    assert steps_until_growth(workers, 0.2) is not None


def test_the_wait_for_the_first_batches_does_not_count(nine_cores):
    workers = Workers("auto")
    for _ in range(STARTING):
        assert not workers.grow(30.0, 31.0)
    assert steps_until_growth(workers, 0.01) is None and workers.count == 1


def test_a_given_number_does_not_change(nine_cores):
    workers = Workers(3)
    assert steps_until_growth(workers, 0.9) is None and workers.count == workers.most == 3
