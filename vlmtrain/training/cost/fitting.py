"""Which micro-batch fits into the memory of a device, with and without recomputing activations."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from ...objectives import OBJECTIVES
from ...settings import AUTO, Engine, Run, Stage
from ..engine.zero import bucket_elements
from ..optimizer import moment_bytes, parameter_groups
from ..trainable import Group, frozen_encoders, part_size
from .measuring import PartCost
from .memory import States
from .stage import kept_bytes, quantized_sizes

RESERVED_BYTES = 3 * 2**30
"""The CUDA context, NCCL's buffers and fragmentation in the allocator."""
BUSY_TOKENS = 4096
"""Tokens in a micro-batch that keep a device busy."""


@dataclass(frozen=True)
class Fitting:
    """The memory of a stage on each of `gpus` devices.

    row: bytes of a row's activations, by whether those of the language model are recomputed. samples_in_row: on
    average. share: samples of a device in a step; least: the smallest micro-batch that the stage can train with.
    """

    states: States
    row: Mapping[bool, int]
    samples_in_row: float
    share: int
    least: int
    gpus: int

    @classmethod
    def of(
        cls,
        run: Run,
        stage: Stage,
        parts: Mapping[str, nn.Module],
        groups: list[Group],
        longest: Mapping[str, PartCost],
        tokens_per_sample: float,
        gpus: int,
        engine: Engine | None = None,
    ) -> Fitting:
        """The memory of a stage, given the costs of its longest sample. engine: what it offloads does not count."""
        trained = sum(group.size(parts[group.part]) for group in groups)
        frozen = sum(map(part_size, parts.values())) - trained
        vision = parts.get("vision")
        frozen_names = [] if vision is None else frozen_encoders(vision, groups)
        outside = sum(part_size(vision.encoders[name]) for name in frozen_names)
        moments = moment_bytes(parameter_groups(parts, groups, stage.optimizer)) + 4 * (stage.ema is not None)
        counts = (trained, frozen - outside, outside, run.precision == "bf16", *quantized_sizes(parts), moments)
        # a packed row holds several samples; objectives that compare samples need all samples of a rank at once
        in_row = max(1.0, stage.max_length / tokens_per_sample) if stage.layout == "packed" else 1.0
        media = in_row * stage.expected.images, in_row * stage.expected.videos
        row = {recompute: kept_bytes(longest, recompute, *media) for recompute in (False, True)}
        share = max(1, stage.batch_size // gpus)
        least = share if OBJECTIVES[stage.objective].compares_samples else 1
        offloads = engine is not None and (engine.offload_optimizer != "none", engine.offload_parameters != "none")
        states = States(*counts, *(offloads or ()), bucket=bucket_elements(parts))
        return cls(states, row, in_row, share, least, gpus)

    def bytes(self, zero_stage: int, micro_batch_size: int, recompute: bool) -> int:
        """Peak bytes of a device at a micro-batch size."""
        return self._of_rows(zero_stage, math.ceil(micro_batch_size / self.samples_in_row), recompute)

    def _of_rows(self, zero_stage: int, rows: int, recompute: bool) -> int:
        return self.states.bytes(zero_stage, self.gpus, self.row[recompute] * rows) + RESERVED_BYTES

    def largest(self, zero_stage: int, memory: float, recompute: bool) -> int:
        """The largest micro-batch that fits into `memory` bytes; 0 if none does."""
        counts = range(math.ceil(self.share / self.samples_in_row) + 1)
        rows = bisect_right(counts, memory, key=lambda rows: self._of_rows(zero_stage, rows, recompute)) - 1
        largest = max(0, min(self.share, int(rows * self.samples_in_row)))
        return largest if largest >= self.least else 0

    def divisor(self, limit: int) -> int:
        """The largest micro-batch up to `limit` that divides a device's share of the batch."""
        return next(size for size in range(min(self.share, limit), 0, -1) if self.share % size == 0)

    def recomputes(self, stage: Stage, zero_stage: int, memory: float) -> bool:
        """Whether a stage recomputes activations; with ``auto``, only if its micro-batch would not fit otherwise.

        With ``micro_batch_size=auto``, a micro-batch of `BUSY_TOKENS` tokens is sufficient.
        """
        if stage.gradient_checkpointing != AUTO:
            return stage.gradient_checkpointing
        wanted = stage.micro_batch_size or self.share
        if wanted == AUTO:
            tokens = stage.max_length / self.samples_in_row
            wanted = min(self.share, max(self.least, math.ceil(BUSY_TOKENS / tokens)))
        return self.largest(zero_stage, memory, recompute=False) < min(wanted, self.share)
