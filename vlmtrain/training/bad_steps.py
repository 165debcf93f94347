"""Steps whose numbers go wrong: found alike on every rank, written down with their samples, and not without limit."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from .log import logger
from .metrics import Metrics

WINDOW = 100  # losses that a spike is measured against
ENOUGH = 20  # of them, before any loss can be called a spike
LEAST_DEVIATION = 1e-3  # of the mean: losses that hardly move make no spike of a breath


class Fault(NamedTuple):
    """What is wrong with a step, and whether it makes no update."""

    problem: str
    skipped: bool


class BadSteps:
    """The bad steps of a stage so far. A skipped one leaves weights, moments and AdamW's counts as they are.

    options: `bad_steps` of the settings; file: ``bad_steps.jsonl`` on the main rank.
    saved: what `state` said when the stage was interrupted.
    """

    def __init__(self, stage: str, options: Mapping, file: Metrics | None, saved: Mapping | None = None):
        self.stage, self.file = stage, file
        self.limit, self.spike, self.skip_spikes = options.in_a_row, options.spike, options.skip_spikes
        saved = saved or {"skipped": 0, "in_a_row": 0, "spikes": 0, "losses": []}
        self.skipped, self.in_a_row, self.spikes = saved["skipped"], saved["in_a_row"], saved["spikes"]
        self.losses = list(saved["losses"])

    @property
    def state(self) -> dict:
        return {"skipped": self.skipped, "in_a_row": self.in_a_row, "spikes": self.spikes, "losses": self.losses}

    def judge(self, loss: float) -> Fault | None:
        """What a step's loss, the same number on every rank, says before its update is made."""
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
        """Take account of a step behind it. Raises ValueError where too many in a row made no update.

        samples: the ids of those that a fault is about.
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
            logger.warning(f"{told}; its samples are in bad_steps.jsonl")
            self.file.write({"step": step, "loss": loss, **fault._asdict(), "samples": list(samples)})
        if self.in_a_row >= self.limit:
            raise ValueError(
                f"{self.stage}: {self.in_a_row} steps in a row made no update (bad_steps.in_a_row={self.limit}); at "
                f"step {step} {fault.problem}, with the samples {', '.join(samples[:8])}; bad_steps.jsonl has all. The "
                f"checkpoint before them is kept: look at these samples, or begin another run_dir with lower rates in "
                f"stages.{self.stage}.train"
            )
