"""Builds the batches of each optimizer step from the data sources.

    (seed, epoch) -> stream of samples -> split into steps -> distributed to ranks -> micro-batches

The samples of a step depend only on the seed and the position in the stream. Any number of ranks, workers or
accumulation steps therefore trains on the same data, and a resumed run continues exactly.
"""

from __future__ import annotations

import atexit
import math
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from multiprocessing import active_children, parent_process
from typing import NamedTuple

from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from ..batch import Batch
from ..distributed.processes import die_with
from ..visual import groups
from .mixture import Mixture
from .packing import Piece, RowBudget, lookahead, row_budget, take_row
from .processor import Processor, Sample
from .records import BadSample, Conversation
from .rendering import Rendered

LAYOUTS = ("padded", "packed")
MEASURED = 1024  # samples used to estimate the lengths in a stream


class Planned(NamedTuple):
    """A tokenized sample whose images are not loaded yet. `position` is its position in the stream."""

    position: int
    index: int
    conversation: Conversation
    tokens: Rendered


class BadRecord(NamedTuple):
    """A skipped record: its position in the stream, its index, and the reason."""

    position: int
    index: int
    problem: str


class PlannedStep(NamedTuple):
    """The samples of one optimizer step, in rows, for all ranks.

    cursor: where the stream continues after this step, for `Batching.steps`.
    """

    rows: list[list[Planned]]
    bad: list[BadRecord]
    cursor: dict


class StepData(NamedTuple):
    """One rank's share of an optimizer step. Counts are this rank's.

    weight: sum of the loss weights of the target tokens. padded_tokens: tokens including padding. drawn: number of
    samples from each source.
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


class Batching:
    """A layout: how the stream is split into steps, and each step into the micro-batches of the ranks."""

    steps_per_epoch: int
    accumulation: int
    micro_rows: int

    def __init__(self, mixture: Mixture, processor: Processor):
        self.mixture, self.processor = mixture, processor

    def read(self, position: int, bad: list[BadRecord]) -> Planned | None:
        """Return the sample at a position, or None for a broken record, which is appended to `bad`."""
        index = self.mixture.draw(position)
        try:
            conversation = self.mixture[index]
            return Planned(position, index, conversation, self.processor.render(conversation))
        except BadSample as error:
            bad.append(BadRecord(position, index, str(error)))
            return None

    def steps(self, first: int, cursor: dict | None, worker: int, workers: int) -> Iterator[PlannedStep]:
        """Yield steps ``first + worker``, ``first + worker + workers``, ... indefinitely."""
        raise NotImplementedError

    def order(self, row: list[Planned]) -> int:
        """Sort key of a row: rows with similar keys run at the same time."""
        raise NotImplementedError

    def collate(self, rows: list[list[Sample]], calls: int) -> Batch:
        """Build a micro-batch. calls: see `vlmtrain.visual.Visual`."""
        raise NotImplementedError


class PaddedBatching(Batching):
    """One sample per row, padded on the right. Rows of similar length run together."""

    def __init__(self, mixture: Mixture, processor: Processor, batch_size: int, accumulation: int, micro_rows: int):
        super().__init__(mixture, processor)
        self.batch_size, self.epoch_size = batch_size, mixture.epoch_size
        self.accumulation, self.micro_rows = accumulation, micro_rows
        self.steps_per_epoch = math.ceil(self.epoch_size / batch_size)

    def __str__(self) -> str:
        return f"{self.batch_size} samples"

    def steps(self, first: int, cursor: dict | None, worker: int, workers: int) -> Iterator[PlannedStep]:
        for step in count(first + worker, workers):
            bad: list[BadRecord] = []
            read = (self.read(position, bad) for position in self.positions(step))
            yield PlannedStep([[sample] for sample in read if sample], bad, {})

    def positions(self, step: int) -> range:
        """Stream positions of a step. The last step of an epoch may have fewer samples than the others."""
        epoch, within = divmod(step, self.steps_per_epoch)
        start = within * self.batch_size
        end = min(start + self.batch_size, self.epoch_size)
        return range(epoch * self.epoch_size + start, epoch * self.epoch_size + end)

    def order(self, row: list[Planned]) -> int:
        return len(row[0].tokens)

    def collate(self, rows: list[list[Sample]], calls: int) -> Batch:
        return self.processor.collate([row[0] for row in rows], rows=1, calls=calls)


class PackedBatching(Batching):
    """Several samples per row. Rows are filled up to `row_length` tokens; every step has the same number of rows.

    `batch_size` and `micro_batch_size` are average numbers of samples, estimated from the beginning of the stream.
    Epochs have no boundary: the stream continues into the next one. Samples that are not in a row when a stage ends
    are not trained on.
    by_source: whether each row holds samples of a single source only (Qwen-VL packs samples of the same task).
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
        super().__init__(mixture, processor)
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
            bad.clear()  # already counted when they were first read
        skip = 0 if cursor else first
        for number in count():
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

    def _piece(self, position: int, bad: list[BadRecord]) -> tuple[Piece, Planned] | None:
        sample = self.read(position, bad)
        if sample is None:
            return None
        kind = self.mixture.source_number(sample.index) if self.by_source else 0
        return Piece(position, len(sample.tokens), int((sample.tokens.index >= 0).sum()), kind), sample

    def order(self, row: list[Planned]) -> int:
        return sum(len(sample.conversation.media) for sample in row)

    def collate(self, rows: list[list[Sample]], calls: int) -> Batch:
        return self.processor.pack([sample for row in rows for sample in row], calls)


@dataclass
class StepStream(IterableDataset):
    """One rank's share of the steps of a stage, from step `first` to ``last - 1``.

    cursor: the cursor of the step before `first`, for layouts that need it.
    """

    batching: Batching
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
        steps = self.batching.steps(self.first, self.cursor, worker, workers)
        for _ in range(self.first + worker, self.last, workers):
            yield self._deal(next(steps))

    def _deal(self, step: PlannedStep) -> StepData:
        """Build this rank's micro-batches. Similar rows run at the same time, and all ranks have equally many."""
        batching, together = self.batching, self.batching.micro_rows * self.world_size
        # all ranks find the same bad records while planning; only one reports them
        bad = list(step.bad) if self.rank == 0 else []
        rows = sorted(step.rows, key=batching.order)
        batches, tokens, drawn = [], [], [0] * len(self.mixture.sources)
        for number in range(batching.accumulation):
            shared = rows[number * together : (number + 1) * together]
            by_rank = [shared[rank :: self.world_size] for rank in range(self.world_size)]
            mine, loaded = by_rank[self.rank], []
            for row in mine:
                samples = []
                for planned in row:
                    try:
                        samples.append(self.processor.load(planned.conversation, planned.tokens))
                    except BadSample as error:
                        bad.append(BadRecord(planned.position, planned.index, str(error)))
                    else:
                        tokens.append(planned.tokens)
                        drawn[self.mixture.source_number(planned.index)] += 1
                loaded.append(samples)
            calls = max(map(_groups, by_rank))  # the ranks agree without communication: all know the plans of all
            batches.append(batching.collate([row for row in loaded if row], calls))
        return StepData(
            batches,
            weight=sum(float(t.weights.sum()) for t in tokens),
            samples=len(tokens),
            tokens=sum(len(t) for t in tokens),
            image_tokens=sum(int((t.index >= 0).sum()) for t in tokens),
            target_tokens=sum(int((t.weights > 0).sum()) for t in tokens),
            padded_tokens=sum(batch.input_ids.numel() for batch in batches),
            drawn=drawn,
            bad=bad,
            cursor=step.cursor,
        )


def _groups(rows: list[list[Planned]]) -> int:
    return groups([item for row in rows for planned in row for item in planned.tokens.media.items])


def step_loader(stream: StepStream, workers: int, pin_memory: bool) -> Iterator[StepData]:
    """Iterate over the steps of a stage, prefetched by `workers` processes (0: loaded in the main process)."""
    for source in stream.mixture.streams.values():
        source.close()  # a process must not be forked while threads of the library read in it
    return prefetched(stream, workers, pin_memory)


def prefetched(dataset: IterableDataset, workers: int, pin_memory: bool, ahead: int = 4) -> Iterator:
    """Iterate over a dataset whose items are made by `workers` processes (0: in this process).

    Each process keeps up to `ahead` items ready, and ends with this process.
    """
    loader = DataLoader(
        dataset,
        batch_size=None,
        num_workers=workers,
        prefetch_factor=ahead if workers else None,
        pin_memory=pin_memory,
        worker_init_fn=_follow_the_trainer,
    )
    steps = iter(loader)
    atexit.unregister(_end_workers)
    atexit.register(_end_workers)  # registered after the handlers of the libraries, so that it runs before them
    return steps


def _end_workers() -> None:
    """Kill the workers when an error ends the trainer. They ignore SIGTERM, so Python would wait for them at exit."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # otherwise PyTorch reports the killed workers as a failure
    for worker in active_children():
        worker.kill()


def _follow_the_trainer(worker: int) -> None:
    """Make a worker end with the trainer and ignore stop signals.

    A scheduler signals every process of a job. Only the trainer handles the signal, and it needs its workers until it
    has saved a checkpoint. Workers that outlive the trainer would keep the lock of the run folder.
    """
    die_with(parent_process().pid)
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
