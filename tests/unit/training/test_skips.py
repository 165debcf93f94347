"""Bad samples are counted once, and up to a limit."""

from __future__ import annotations

import pytest

from vlmtrain.data.layouts import BadRecord
from vlmtrain.training.skips import Skips


def bad(*positions: int, index: int | None = None) -> list[BadRecord]:
    return [BadRecord(p, p if index is None else index, f"record {p} is broken") for p in positions]


def test_a_record_that_comes_again_each_epoch_is_one_bad_record():
    skips = Skips(records=100, share=0.01, in_a_row=100)
    for epoch in range(50):
        skips.add(bad(100 * epoch, index=7))
    assert skips.skipped == 50 and skips.records == {7}


def test_more_than_the_share_stops_and_says_so():
    skips = Skips(records=5000, share=0.01, in_a_row=100)
    skips.add(bad(*range(0, 100, 2)))
    with pytest.raises(ValueError, match=r"51 bad records.*share=0.01 allows \(50\).*record 200 is broken"):
        skips.add(bad(200))


def test_ten_are_allowed_however_small_the_set():
    skips = Skips(records=20, share=0.01, in_a_row=100)
    skips.add(bad(*range(0, 20, 2)))
    with pytest.raises(ValueError, match="11 bad records"):
        skips.add(bad(21))


@pytest.mark.parametrize("steps", [[range(4)], [range(2), range(2, 4)]])
def test_in_a_row_counts_across_steps(steps):
    skips = Skips(records=10**6, share=0.5, in_a_row=3)
    with pytest.raises(ValueError, match=r"4 bad samples in a row.*in_a_row=3.*record 3"):
        for positions in steps:
            skips.add(bad(*positions))


def test_a_good_sample_between_ends_a_row():
    skips = Skips(records=10**6, share=0.5, in_a_row=3)
    skips.add(bad(0, 1, 2))
    skips.add(bad(4, 5, 6, 8))
    assert skips.skipped == 7


def test_a_resumed_stage_continues_to_count():
    whole = Skips(records=1000, share=0.01, in_a_row=100)
    whole.add(bad(3, 4, 9))
    resumed = Skips(1000, 0.01, 100, saved=whole.state)
    for skips in (whole, resumed):
        skips.add(bad(10, 12))
    assert resumed.state == whole.state and resumed.run == 1 and resumed.skipped == 5
