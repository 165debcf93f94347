"""Detects steps with a non-finite loss or gradient and loss spikes, identically on all ranks.

Bad steps are recorded with their samples, and too many in a row stop the run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ..settings.run import BadStepOptions
from .log import logger
from .metrics import Metrics

WINDOW = 100  # number of losses that a spike is compared with
ENOUGH = 20  # minimum number of losses before spikes are detected
LEAST_DEVIATION = 1e-3  # relative to the mean, so that tiny changes of an almost constant loss are not spikes


class Fault(NamedTuple):
    """The problem with a step, and whether its update is skipped."""

    problem: str
    skipped: bool


class BadSteps:
    """The bad steps of a stage so far. A skipped step leaves weights, moments, averages and step counts unchanged.

    options: `bad_steps` of the settings. file: ``bad_steps.jsonl`` on the main rank.
    saved: the value of `state` when the stage was interrupted.
    """

    def __init__(self, stage: str, options: BadStepOptions, file: Metrics | None, saved: Mapping | None = None):
        self.stage, self.file = stage, file
        self.limit, self.spike, self.skip_spikes = options.in_a_row, options.spike, options.skip_spikes
        saved = saved or {"skipped": 0, "in_a_row": 0, "spikes": 0, "losses": []}
        self.skipped, self.in_a_row, self.spikes = saved["skipped"], saved["in_a_row"], saved["spikes"]
        self.losses = list(saved["losses"])

    @property
    def state(self) -> dict:
        return {"skipped": self.skipped, "in_a_row": self.in_a_row, "spikes": self.spikes, "losses": self.losses}

    def judge(self, loss: float) -> Fault | None:
        """Check the loss of a step, which is the same on all ranks, before the update."""
        if not math.isfinite(loss):
            return Fault("the loss is not finite", True)
        if self.spike is None or len(self.losses) < ENOUGH:
            return None
        mean = sum(self.losses) / len(self.losses)
        variance = sum((known - mean) ** 2 for known in self.losses) / (len(self.losses) - 1)
        deviations = (loss - mean) / max(math.sqrt(variance), LEAST_DEVIATION * abs(mean), 1e-12)
        if deviations <= self.spike:
            return None
        return Fault(f"the loss is {deviations:.1f} deviations above its mean, {mean:.4g}", self.skip_spikes)

    def count(self, step: int, loss: float, fault: Fault | None, samples: Sequence[str]) -> None:
        """Record the outcome of a step. Raises ValueError if too many steps in a row made no update.

        samples: the IDs of the samples involved in a fault.
        """
        if fault is None or not fault.skipped:
            self.in_a_row = 0
            self.losses = [*self.losses, loss][-WINDOW:]
        if fault is None:
            return
        self.skipped += fault.skipped
        self.in_a_row += fault.skipped
        self.spikes += math.isfinite(loss) and "deviations" in fault.problem
        if self.file:
            told = f"{self.stage} step {step}: {fault.problem}{': no update' if fault.skipped else ''}"
            logger.warning(f"{told}; see bad_steps.jsonl for its samples")
            self.file.write({"step": step, "loss": loss, **fault._asdict(), "samples": list(samples)})
        if self.in_a_row >= self.limit:
            raise ValueError(
                f"{self.stage}: {self.in_a_row} steps in a row made no update (bad_steps.in_a_row={self.limit}); at "
                f"step {step} {fault.problem}, with the samples {', '.join(samples[:8])}; bad_steps.jsonl lists all of "
                f"them. The checkpoint before these steps is kept: check the samples, or start in a new run_dir with "
                f"lower learning rates in stages.{self.stage}.train"
            )
