"""From a source to the batches of an optimiser step.

    (seed, epoch) -> order of samples -> cut into steps -> dealt to ranks -> micro-batches

Which samples make up a step depends on nothing but the seed and the position, so any number of ranks,
workers or accumulation steps trains on the same data, and a resumed run goes on exactly.
"""

from __future__ import annotations

import math
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset

from .processor import Batch, Processor, Sample
from .records import BadSample
from .sources import Source


@dataclass(frozen=True)
class StepOrder:
    """Which samples each optimiser step trains on.

    size: number of samples; batch_size: samples a step; the last step of an epoch may have fewer.
    """

    size: int
    batch_size: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.size / self.batch_size)

    def samples(self, step: int) -> list[int]:
        """Indices of the samples of optimiser step `step` (from 0)."""
        epoch, position = divmod(step, self.steps_per_epoch)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        order = torch.randperm(self.size, generator=generator)
        return order[position * self.batch_size : (position + 1) * self.batch_size].tolist()


class StepData(NamedTuple):
    """One rank's share of an optimiser step. Counts are this rank's.

    weight: sum of the targets' loss weights; positions: tokens and padding; bad: what is wrong with the
    samples that were left out.
    """

    micro_batches: list[Batch]
    weight: float
    samples: int
    tokens: int
    image_tokens: int
    target_tokens: int
    positions: int
    bad: list[str]


class StepDataset(Dataset):
    """The steps of a stage, as one rank sees them: item `s` is its `StepData` of step `s`."""

    def __init__(
        self,
        source: Source,
        processor: Processor,
        order: StepOrder,
        micro_batch_size: int,
        rank: int,
        world_size: int,
    ):
        self.source, self.processor, self.order = source, processor, order
        self.micro_batch_size, self.rank, self.world_size = micro_batch_size, rank, world_size
        self.accumulation = order.batch_size // (micro_batch_size * world_size)

    def __getitem__(self, step: int) -> StepData:
        samples: list[Sample] = []
        bad: list[str] = []
        for index in self.order.samples(step)[self.rank :: self.world_size]:
            try:
                samples.append(self.processor(self.source[index]))
            except BadSample as error:
                bad.append(str(error))
        # neighbours in length share a micro-batch, so little is padded
        samples.sort(key=lambda sample: len(sample.tokens))
        size = self.micro_batch_size
        batches = [self.processor.collate(samples[i * size : (i + 1) * size], rows=1) for i in range(self.accumulation)]
        return StepData(
            batches,
            weight=sum(float(s.tokens.weights.sum()) for s in samples),
            samples=len(samples),
            tokens=sum(len(s.tokens) for s in samples),
            image_tokens=sum(int((s.tokens.image_index >= 0).sum()) for s in samples),
            target_tokens=sum(int((s.tokens.weights > 0).sum()) for s in samples),
            positions=sum(batch.input_ids.numel() for batch in batches),
            bad=bad,
        )


def step_loader(dataset: StepDataset, first: int, last: int, workers: int, pin_memory: bool) -> Iterator[StepData]:
    """Steps `first` to ``last - 1``, prepared ahead by `workers` processes (0: in this one)."""
    loader = DataLoader(
        dataset,
        sampler=range(first, last),
        batch_size=None,
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        pin_memory=pin_memory,
        worker_init_fn=_leave_signals_to_the_trainer,
    )
    return iter(loader)


def _leave_signals_to_the_trainer(worker: int) -> None:
    """A scheduler signals every process of a job; the trainer decides, and needs its workers until it has saved."""
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
