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
    """Learning rate over a stage: linear warm-up to the peak, then `options.name` down to `options.min_lr`.

    ``constant`` (also called ``constant_with_warmup``) keeps the peak. ``wsd`` keeps it until the last
    `options.decay_ratio` of the steps, in which it decays linearly (MiniCPM, section 4).

    Step `s` (from 0) uses the rate at the end of that step, so the first step has a non-zero rate and the last one
    reaches `min_lr`.
    """

    options: ScheduleOptions
    total_steps: int

    @property
    def warmup_steps(self) -> int:
        given = self.options.warmup_steps
        return math.ceil(self.options.warmup_ratio * self.total_steps) if given is None else given

    def rate(self, step: int, peak: float) -> float:
        """Learning rate of optimizer step `step` for a group whose peak is `peak`."""
        done = step + 1
        if done <= self.warmup_steps:
            return peak * done / self.warmup_steps
        if self.options.name in ("constant", "constant_with_warmup"):
            return peak
        start = self.warmup_steps
        if self.options.name == "wsd":
            start = max(start, self.total_steps - math.ceil(self.options.decay_ratio * self.total_steps))
        progress = max(0, done - start) / max(1, self.total_steps - start)
        left = 0.5 * (1 + math.cos(math.pi * progress)) if self.options.name == "cosine" else 1 - progress
        return self.options.min_lr + (peak - self.options.min_lr) * left


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
