"""Parameter groups of the optimizer, and the learning rate as a function of the step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from ..settings.stage import ScheduleOptions
from .trainable import Group


@dataclass(frozen=True)
class Schedule:
    """Learning rate over a stage: linear warm-up to the peak, then `name` down to `min_lr`.

    Step `s` (from 0) uses the rate at the end of that step, so the first step has a non-zero rate and the last one
    reaches `min_lr`.
    """

    name: str
    total_steps: int
    warmup_steps: int
    min_lr: float

    @classmethod
    def of(cls, options: ScheduleOptions, total_steps: int) -> Schedule:
        """Build the schedule of a stage with `total_steps` steps."""
        warmup = options.warmup_steps
        if warmup is None:
            warmup = math.ceil(options.warmup_ratio * total_steps)
        return cls(options.name, total_steps, warmup, options.min_lr)

    def rate(self, step: int, peak: float) -> float:
        """Learning rate of optimiser step `step` for a group whose peak is `peak`."""
        done = step + 1
        if done <= self.warmup_steps:
            return peak * done / self.warmup_steps
        if self.name == "constant":
            return peak
        progress = (done - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
        left = 1 - progress if self.name == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
        return self.min_lr + (peak - self.min_lr) * left


def parameter_groups(parts: Mapping[str, nn.Module], groups: Sequence[Group], weight_decay: float) -> list[dict]:
    """Build AdamW's parameter groups: up to two per group, with and without weight decay.

    Weight decay applies to matrices, but not to biases, 1-D tensors and selected rows of embeddings. Each group carries
    its `label`, `peak_lr` and `scale`, because ZeRO replaces the parameters themselves.
    """
    found = []
    for group in groups:
        named = dict(parts[group.part].named_parameters())
        trained = [named[name] for name in group.names]
        facts = {"label": group.label, "peak_lr": group.lr, "scale": group.scale, "lr": group.lr * group.scale}
        for decay, members in (
            (weight_decay, [p for p in trained if p.ndim >= 2 and group.rows is None]),
            (0.0, [p for p in trained if p.ndim < 2 or group.rows is not None]),
        ):
            if members:  # ZeRO-2 fails on an empty group
                found.append({"params": members, "weight_decay": decay, **facts})
    return found
