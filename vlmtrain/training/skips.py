"""Counts the bad samples that a run skips, identically on all ranks, and stops the run if there are too many."""

from __future__ import annotations

from collections.abc import Sequence

from ..data.layouts import BadRecord

ALWAYS_ALLOWED = 10  # in a small data set, a few bad records are a large share


class Skips:
    """The bad samples of a stage so far.

    records: number of records in the stage's data. share: share of them that may be bad. in_a_row: maximum number of
    consecutive bad samples. saved: the value of `state` when the stage was interrupted.
    """

    def __init__(self, records: int, share: float, in_a_row: int, saved: dict | None = None):
        self.limit = max(ALWAYS_ALLOWED, int(records * share))
        self.share, self.in_a_row = share, in_a_row
        saved = saved or {"skipped": 0, "records": [], "last": -1, "run": 0}
        self.skipped, self.records = saved["skipped"], set(saved["records"])
        self.last, self.run = saved["last"], saved["run"]

    @property
    def state(self) -> dict:
        return {"skipped": self.skipped, "records": sorted(self.records), "last": self.last, "run": self.run}

    def add(self, found: Sequence[BadRecord]) -> None:
        """Count the bad samples of a step, in the order of the stream. Raises ValueError if there are too many."""
        for bad in found:
            self.skipped += 1
            self.records.add(bad.index)
            self.run = self.run + 1 if bad.position == self.last + 1 else 1
            self.last = bad.position
            if self.run > self.in_a_row:
                raise ValueError(
                    f"{self.run} bad samples in a row, more than bad_sample_limit.in_a_row={self.in_a_row}; "
                    f"the last one: {bad.problem}"
                )
            if len(self.records) > self.limit:
                raise ValueError(
                    f"{len(self.records)} bad records, more than bad_sample_limit.share={self.share} allows "
                    f"({self.limit}); the last one: {bad.problem}"
                )
