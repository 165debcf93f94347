"""Parameter groups of the optimizer, and the learning rate as a function of the step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..settings.stage import OptimizerOptions, ScheduleOptions
from .trainable import Group


@dataclass(frozen=True)
class Schedule:
    """Learning rate over a stage: linear warm-up to the peak, then `options.name` down to the smallest rate.

    That is `options.min_lr`, or if larger `options.min_lr_ratio` times the peak.

    ``constant`` (also called ``constant_with_warmup``) keeps the peak. ``wsd`` keeps it until the last
    `options.decay_ratio` of the steps, in which it decays linearly (MiniCPM, section 4).

    Step `s` (from 0) uses the rate at the end of that step, so the first step has a non-zero rate and the last one
    reaches the smallest one.
    """

    options: ScheduleOptions
    total_steps: int

    @property
    def warmup_steps(self) -> int:
        given = self.options.warmup_steps
        return math.ceil(self.options.warmup_ratio * self.total_steps) if given is None else given

    def rate(self, step: int, peak: float, warmup_steps: int | None = None) -> float:
        """Learning rate of optimizer step `step` for a group whose peak is `peak`.

        warmup_steps: of the group; None for those of the schedule.
        """
        done, start = step + 1, self.warmup_steps if warmup_steps is None else warmup_steps
        if done <= start:
            return peak * done / start
        if self.options.name in ("constant", "constant_with_warmup"):
            return peak
        if self.options.name == "wsd":
            start = max(start, self.total_steps - math.ceil(self.options.decay_ratio * self.total_steps))
        progress = max(0, done - start) / max(1, self.total_steps - start)
        left = 0.5 * (1 + math.cos(math.pi * progress)) if self.options.name == "cosine" else 1 - progress
        least = max(self.options.min_lr, self.options.min_lr_ratio * peak)
        return least + (peak - least) * left


ADAMW_MOMENTS = ("exp_avg", "exp_avg_sq")
MUON_MOMENTS = ("momentum_buffer",)
EIGHT_BIT = ()  # quantized in blocks, which are not those of single parameters


def parameter_groups(
    parts: Mapping[str, nn.Module], groups: Sequence[Group], options: OptimizerOptions
) -> list[dict[str, Any]]:
    """Build the optimizer's parameter groups: up to three per group.

    Weight decay applies to matrices, but not to biases, 1-D tensors and selected rows of embeddings. Muon updates the
    weights of linear layers except the output embeddings. Each group carries its `label`, `peak_lr`, `scale` and
    `warmup_steps`, because ZeRO replaces the parameters themselves, and `moments`, the names of the optimizer's tensors
    for each parameter.
    """
    found = []
    for group in groups:
        named = dict(parts[group.part].named_parameters())
        trained = [named[name] for name in group.names]
        matrices = [p for p in trained if p.ndim >= 2 and group.rows is None]
        others = [p for p in trained if p.ndim < 2 or group.rows is not None]
        hidden = _hidden_matrices(parts[group.part]) if options.name == "muon" else set()
        adamw = EIGHT_BIT if options.name == "adamw_8bit" else ADAMW_MOMENTS
        facts = {"label": group.label, "peak_lr": group.lr, "scale": group.scale, "lr": group.lr * group.scale}
        facts["warmup_steps"] = group.warmup_steps
        own_decay = options.weight_decay if group.weight_decay is None else group.weight_decay
        for decay, moments, members in (
            (own_decay, MUON_MOMENTS, [p for p in matrices if id(p) in hidden]),
            (own_decay, adamw, [p for p in matrices if id(p) not in hidden]),
            (0.0, adamw, others),
        ):
            if members:  # ZeRO-2 fails on an empty group
                found.append({"params": members, "weight_decay": decay, "moments": moments, **facts})
    return found


def moment_bytes(groups: Sequence[Mapping[str, Any]]) -> float:
    """Mean bytes of the optimizer's tensors for a parameter of these groups."""
    sizes = {ADAMW_MOMENTS: 8, MUON_MOMENTS: 4, EIGHT_BIT: 2 + 8 / 256}  # 8-bit: two scales per block of 256
    numbers = [(sizes[group["moments"]], p.numel()) for group in groups for p in group["params"]]
    return sum(size * number for size, number in numbers) / sum(number for _, number in numbers)


def _hidden_matrices(part: nn.Module) -> set[int]:
    """IDs of the weights of linear layers, except the output embeddings of a language model."""
    output = part.get_output_embeddings() if hasattr(part, "get_output_embeddings") else None
    return {id(module.weight) for module in part.modules() if isinstance(module, nn.Linear) and module is not output}
