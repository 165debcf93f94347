"""From sources to the batches of an optimiser step.

    (seed, epoch) -> stream of samples -> cut into steps -> dealt to ranks -> micro-batches

Which samples make up a step depends on nothing but the seed and the position, so any number of ranks,
workers or accumulation steps trains on the same data, and a resumed run goes on exactly.
"""

from __future__ import annotations

import atexit
import math
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing import active_children, parent_process
from typing import NamedTuple, Protocol

from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from ..distributed.processes import die_with
from .mixture import Mixture
from .packing import Piece, RowBudget, lookahead, row_budget, take_row
from .processor import Batch, Processor, Sample
from .records import BadSample, Conversation
from .rendering import Rendered

LAYOUTS = ("padded", "packed")
MEASURED = 1024  # samples from which a stream's lengths are estimated


class Planned(NamedTuple):
    """A sample with its tokens; its pictures are still on disk. `position` is that in the stream."""

    position: int
    index: int
    conversation: Conversation
    tokens: Rendered


class BadRecord(NamedTuple):
    """A record that is left out: its place in the stream, its index, and why."""

    position: int
    index: int
    problem: str


class PlannedStep(NamedTuple):
    """The samples of one optimiser step, in rows, for all ranks.

    cursor: where the stream goes on behind this step, for `Batching.steps`.
    """

    rows: list[list[Planned]]
    bad: list[BadRecord]
    cursor: dict


class StepData(NamedTuple):
    """One rank's share of an optimiser step. Counts are this rank's.

    weight: sum of the targets' loss weights; padded_tokens: tokens and padding; drawn: samples of each source.
    """

    micro_batches: list[Batch]
    weight: float
    samples: int
    tokens: int
    image_tokens: int
    target_tokens: int
    padded_tokens: int
    drawn: list[int]
    bad: list[BadRecord]
    cursor: dict


class Batching(Protocol):
    """A layout: how the stream is cut into steps, and a step into the micro-batches of ranks."""

    steps_per_epoch: int
    accumulation: int
    micro_rows: int

    def steps(self, first: int, cursor: dict | None, worker: int, workers: int) -> Iterator[PlannedStep]:
        """Steps ``first + worker``, ``first + worker + workers``, ... without end."""
        ...

    def order(self, row: list[Planned]) -> int:
        """What rows that run at the same time should have in common."""
        ...

    def collate(self, processor: Processor, rows: list[list[Sample]]) -> Batch: ...


class _Reader:
    """Reads the stream's samples up to their tokens."""

    def __init__(self, mixture: Mixture, processor: Processor):
        self.mixture, self.processor = mixture, processor

    def read(self, position: int, bad: list[BadRecord]) -> Planned | None:
        """The sample at a position; None, and an entry in `bad`, for a broken record."""
        index = self.mixture.draw(position)
        try:
            conversation = self.mixture[index]
            return Planned(position, index, conversation, self.processor.render(conversation))
        except BadSample as error:
            bad.append(BadRecord(position, index, str(error)))
            return None


class PaddedBatching:
    """A sample a row, padded on the right; rows of about the same length run together."""

    def __init__(self, mixture: Mixture, processor: Processor, batch_size: int, accumulation: int, micro_rows: int):
        self.reader = _Reader(mixture, processor)
        self.batch_size, self.epoch_size = batch_size, mixture.epoch_size
        self.accumulation, self.micro_rows = accumulation, micro_rows
        self.steps_per_epoch = math.ceil(self.epoch_size / batch_size)

    def __str__(self) -> str:
        return f"{self.batch_size} samples"

    def steps(self, first: int, cursor: dict | None, worker: int, workers: int) -> Iterator[PlannedStep]:
        step = first + worker
        while True:
            bad: list[BadRecord] = []
            read = (self.reader.read(position, bad) for position in self.positions(step))
            yield PlannedStep([[sample] for sample in read if sample], bad, {})
            step += workers

    def positions(self, step: int) -> range:
        """The stream's positions that a step trains on. The last step of an epoch may have fewer than the others."""
        epoch, within = divmod(step, self.steps_per_epoch)
        start = within * self.batch_size
        end = min(start + self.batch_size, self.epoch_size)
        return range(epoch * self.epoch_size + start, epoch * self.epoch_size + end)

    def order(self, row: list[Planned]) -> int:
        return len(row[0].tokens)

    def collate(self, processor: Processor, rows: list[list[Sample]]) -> Batch:
        return processor.collate([row[0] for row in rows], rows=1)


class PackedBatching:
    """Several samples a row, rows filled to `row_length` tokens, the same number of rows every step.

    `batch_size` and `micro_batch_size` are samples in the mean, as the beginning of the stream tells. An epoch has no
    edge: the stream goes on into the next one, and what still waits for a row when a stage ends is not trained on.
    by_source: whether a row holds samples of one source only (Qwen-VL packs those of a task).
    """

    def __init__(
        self,
        mixture: Mixture,
        processor: Processor,
        batch_size: int,
        micro_batch_size: int | None,
        world_size: int,
        by_source: bool = False,
    ):
        self.reader = _Reader(mixture, processor)
        self.by_source = by_source
        kinds = len(mixture.sources) if by_source else 1
        self.ahead = min(kinds * lookahead(mixture.epoch_size), mixture.epoch_size)
        bad: list[BadRecord] = []
        read = (self._piece(position, bad) for position in range(min(MEASURED, mixture.epoch_size)))
        pieces = [piece for piece, _ in filter(None, read)]
        row_length = processor.max_length
        self.budget: RowBudget = row_budget(pieces, row_length, batch_size, micro_batch_size, self.ahead, world_size)
        self.micro_rows = self.budget.micro_rows
        self.accumulation = math.ceil(self.budget.rows / (self.micro_rows * world_size))
        self.steps_per_epoch = math.ceil(mixture.epoch_size / self.budget.samples)

    def __str__(self) -> str:
        budget = self.budget
        return f"{budget.rows} rows of {budget.row_length} tokens, about {budget.samples:.0f} samples"

    def steps(self, first: int, cursor: dict | None, worker: int, workers: int) -> Iterator[PlannedStep]:
        position, waiting = 0, []
        samples: dict[int, Planned] = {}
        bad: list[BadRecord] = []

        def wait_for(position: int) -> None:
            found = self._piece(position, bad)
            if found:
                piece, samples[position] = found
                waiting.append(piece)

        if cursor:
            position = cursor["position"]
            for kept in cursor["waiting"]:
                wait_for(kept)
            bad.clear()  # they were counted when they were met first
        number, skip = 0, 0 if cursor else first
        while True:
            rows = []
            while len(rows) < self.budget.rows:
                while len(waiting) < self.ahead:
                    wait_for(position)
                    position += 1
                row = take_row(waiting, self.budget.row_length, self.budget.image_share)
                rows.append([samples.pop(piece.position) for piece in row])
            if number >= skip and (number - skip) % workers == worker:
                yield PlannedStep(rows, bad, {"position": position, "waiting": [piece.position for piece in waiting]})
            bad = []
            number += 1

    def _piece(self, position: int, bad: list[BadRecord]) -> tuple[Piece, Planned] | None:
        sample = self.reader.read(position, bad)
        if sample is None:
            return None
        kind = self.reader.mixture.source_number(sample.index) if self.by_source else 0
        return Piece(position, len(sample.tokens), int((sample.tokens.image_index >= 0).sum()), kind), sample

    def order(self, row: list[Planned]) -> int:
        return sum(len(sample.conversation.images) for sample in row)

    def collate(self, processor: Processor, rows: list[list[Sample]]) -> Batch:
        return processor.pack([sample for row in rows for sample in row])


@dataclass
class StepStream(IterableDataset):
    """The steps of a stage as one rank sees them, from step `first` to ``last - 1``.

    cursor: that of the step before `first`, where a layout needs it.
    """

    plan: Batching
    mixture: Mixture
    processor: Processor
    rank: int
    world_size: int
    first: int
    last: int
    cursor: dict | None = None

    def __iter__(self) -> Iterator[StepData]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        steps = self.plan.steps(self.first, self.cursor, worker, workers)
        for _ in range(self.first + worker, self.last, workers):
            yield self._deal(next(steps))

    def _deal(self, step: PlannedStep) -> StepData:
        """This rank's micro-batches: like rows run at the same time on all ranks, and all have equally many."""
        plan, together = self.plan, self.plan.micro_rows * self.world_size
        # what the plan found is everyone's; one rank reports it
        bad = list(step.bad) if self.rank == 0 else []
        rows = sorted(step.rows, key=plan.order)
        batches, tokens, drawn = [], [], [0] * len(self.mixture.sources)
        for number in range(plan.accumulation):
            mine = rows[number * together : (number + 1) * together][self.rank :: self.world_size]
            loaded = []
            for row in mine:
                samples = [(planned, self._load(planned, bad)) for planned in row]
                for planned, sample in samples:
                    if sample:
                        tokens.append(planned.tokens)
                        drawn[self.mixture.source_number(planned.index)] += 1
                loaded.append([sample for _, sample in samples if sample])
            batches.append(plan.collate(self.processor, [row for row in loaded if row]))
        return StepData(
            batches,
            weight=sum(float(t.weights.sum()) for t in tokens),
            samples=len(tokens),
            tokens=sum(len(t) for t in tokens),
            image_tokens=sum(int((t.image_index >= 0).sum()) for t in tokens),
            target_tokens=sum(int((t.weights > 0).sum()) for t in tokens),
            padded_tokens=sum(batch.input_ids.numel() for batch in batches),
            drawn=drawn,
            bad=bad,
            cursor=step.cursor,
        )

    def _load(self, planned: Planned, bad: list[BadRecord]) -> Sample | None:
        try:
            return self.processor.load(planned.conversation, planned.tokens)
        except BadSample as error:
            bad.append(BadRecord(planned.position, planned.index, str(error)))
            return None


def step_loader(stream: StepStream, workers: int, pin_memory: bool) -> Iterator[StepData]:
    """A stage's steps, prepared ahead by `workers` processes (0: in this one)."""
    loader = DataLoader(
        stream,
        batch_size=None,
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        pin_memory=pin_memory,
        worker_init_fn=_follow_the_trainer,
    )
    steps = iter(loader)
    atexit.unregister(_end_workers)
    atexit.register(_end_workers)  # behind those of the libraries, so that it runs before them
    return steps


def _end_workers() -> None:
    """Where an error ends the trainer: its workers ignore the signal that Python would send them, and wait for."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch would take a worker's death for a failure
    for worker in active_children():
        worker.kill()


def _follow_the_trainer(worker: int) -> None:
    """A scheduler signals every process of a job; the trainer decides, and needs its workers until it has saved.

    A dead trainer's workers would hold its run folder's lock.
    """
    die_with(parent_process().pid)
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
