"""Builds the batches of each optimizer step from the data sources.

    (seed, epoch) -> stream of samples -> split into steps -> distributed to ranks -> micro-batches

The samples of a step depend only on the seed and the position in the stream. Any number of ranks, workers or
accumulation steps therefore trains on the same data, and a resumed run continues exactly.
"""

from __future__ import annotations

import atexit
import math
import signal
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from multiprocessing import active_children, parent_process
from typing import NamedTuple

from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from ..batch import Batch
from ..distributed.processes import die_with, ignore_stop_signals, is_first_on_machine, kill_with
from .layouts import BadRecord, Batching, Planned, PlannedStep
from .mixture import Mixture
from .processor import Processor, Sample
from .records import BadSample
from .step_planner import StepPlanner


class Work(NamedTuple):
    """What the FLOPs of a step depend on besides its tokens: sums over samples, views and encoded views.

    All views are encoded, except those whose features are cached.
    """

    squared_tokens: int = 0
    views: int = 0
    patches: int = 0
    squared_patches: int = 0
    encoded: int = 0
    encoded_patches: int = 0
    encoded_squared_patches: int = 0


class StepData(NamedTuple):
    """One rank's share of an optimizer step. Counts are this rank's.

    weight: sum of the loss weights of the target tokens. padded_tokens: tokens including padding. drawn,
    source_weights: numbers of samples, and sums of loss weights, by source. work: for FLOPs. plan: a checksum of
    the whole step, which all ranks must agree on.
    """

    micro_batches: list[Batch]
    weight: float
    samples: int
    tokens: int
    image_tokens: int
    target_tokens: int
    padded_tokens: int
    drawn: list[int]
    source_weights: list[float]
    bad: list[BadRecord]
    cursor: dict
    plan: int
    work: Work


@dataclass
class StepStream(IterableDataset):
    """One rank's share of the steps of a stage, from step `first` to ``last - 1``.

    cursor: the cursor of the step before `first`, for layouts that need it. planner: see `step_loader`.
    """

    batching: Batching
    mixture: Mixture
    processor: Processor
    rank: int
    world_size: int
    first: int
    last: int
    cursor: dict | None = None
    planner: StepPlanner[PlannedStep] | None = None

    def __iter__(self) -> Iterator[StepData]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        if self.planner is not None:
            steps = self.planner.steps(worker)
        else:
            steps = self.batching.steps(self.first, self.cursor, worker, workers)
        for _ in range(self.first + worker, self.last, workers):
            yield self._deal(next(steps))

    def load_row(self, row: list[Planned], bad: list[BadRecord]) -> list[Sample]:
        """The samples of a row, of which those that share their images are one. Appends broken ones to `bad`."""
        trees: list[list[Sample]] = []
        for planned in row:
            if not planned.joins:
                trees.append([])
            try:
                trees[-1].append(self.load(planned, *trees[-1][:1]))
            except BadSample as error:
                bad.append(BadRecord(planned.position, planned.index, str(error)))
        return [Sample.tree(tree) for tree in trees if tree]

    def load(self, planned: Planned, shown: Sample | None = None) -> Sample:
        """The sample of a row, with the images of `shown` if it shares them.

        Raises BadSample, and ValueError if its stored length was wrong.
        """
        conversation, tokens = planned.read or self.batching.read(planned.index, planned.position)
        if tokens.length != planned.length:
            self.batching.lengths.clear(planned.index)
            raise ValueError(
                f"{conversation.id}: its images have changed since an earlier run stored its length "
                f"({planned.length.tokens} tokens then, {tokens.length.tokens} now). The stored lengths of its source "
                "are deleted: run the same command again"
            )
        source = self.mixture.source_number(planned.index)
        per, scale = self.mixture.weighing[source]
        tokens = tokens.weighed(per or self.batching.loss_per, scale)
        if shown is not None:
            return shown._replace(id=conversation.id, tokens=tokens)
        return self.processor.load(conversation, tokens)._replace(source=source)

    def _chunks(self, rows: list[list[Planned]]) -> int:
        return self.processor.chunks(sum(planned.length.items for row in rows for planned in row if not planned.joins))

    def _deal(self, step: PlannedStep) -> StepData:
        """Build this rank's micro-batches. Similar rows run at the same time, and all ranks have equally many."""
        batching, together = self.batching, self.batching.micro_rows * self.world_size
        # all ranks find the same bad records while planning; only one reports them
        bad = list(step.bad) if self.rank == 0 else []
        rows = sorted(step.rows, key=batching.order)
        batches, used, drawn = [], [], [0] * len(self.mixture.sources)
        source_weights = [0.0] * len(drawn)
        for number in range(batching.accumulation):
            shared = rows[number * together : (number + 1) * together]
            by_rank = [shared[rank :: self.world_size] for rank in range(self.world_size)]
            mine, loaded = by_rank[self.rank], []
            for row in mine:
                samples = self.load_row(row, bad)
                used += samples
                for sample in samples:
                    drawn[sample.source] += sample.tokens.dialogues
                    source_weights[sample.source] += float(sample.tokens.weights.sum())
                loaded.append(samples)
            # the ranks agree without communication: all know the plans of all
            calls, chunks = max(map(_groups, by_rank)), max(map(self._chunks, by_rank))
            batches.append(batching.collate([row for row in loaded if row], calls, chunks))
        tokens = [sample.tokens for sample in used]
        return StepData(
            batches,
            weight=sum(float(t.weights.sum()) for t in tokens),
            samples=sum(t.dialogues for t in tokens),
            tokens=sum(len(t) for t in tokens),
            image_tokens=sum(int((t.index >= 0).sum()) for t in tokens),
            target_tokens=sum(int((t.weights > 0).sum()) for t in tokens),
            padded_tokens=sum(batch.input_ids.numel() for batch in batches),
            drawn=drawn,
            source_weights=source_weights,
            bad=bad,
            cursor=step.cursor,
            work=_work(used),
            plan=checksum(step.rows),
        )


def checksum(rows: list[list[Planned]]) -> int:
    """A checksum of planned rows: of the samples in each, and of their lengths."""
    facts = [[(one.position, *one.length[:-1], sorted(one.length.sizes)) for one in row] for row in rows]
    return zlib.crc32(repr(facts).encode())


def _work(samples: list[Sample]) -> Work:
    shown, encoded = [], []
    for sample in samples:
        patches = [math.prod(item.grids[0]) if item.grids else 0 for item in sample.tokens.media.items]
        shown += patches
        read = [all(item.features is not None for item in found) for found in zip(*sample.cached)]
        encoded += [count for count, is_read in zip(patches, read or [False] * len(patches)) if not is_read]
    counts = [(len(each), sum(each), sum(n * n for n in each)) for each in (shown, encoded)]
    return Work(sum(sample.tokens.squared for sample in samples), *counts[0], *counts[1])


def _groups(rows: list[list[Planned]]) -> int:
    return len(frozenset().union(*(planned.length.sizes for row in rows for planned in row)))


def _plans(stream: StepStream) -> Iterator[PlannedStep]:
    """All steps of a stream, without what was read to plan them: the workers read only what they need."""
    for step in islice(stream.batching.steps(stream.first, stream.cursor, 0, 1), stream.last - stream.first):
        yield step._replace(rows=[[planned._replace(read=None) for planned in row] for row in step.rows])


def step_loader(stream: StepStream, workers: int, pin_memory: bool) -> Iterator[StepData]:
    """Iterate over the steps of a stage, prefetched by `workers` processes (0: loaded in the main process).

    If each step depends on those before it, a separate process plans them for several workers.
    """
    for source in stream.mixture.streams.values():
        source.close()  # a process must not be forked while threads of the library read in it
    batching, ahead = stream.batching, stream.batching.upcoming(stream.first, stream.last, stream.cursor)
    if batching.plans_in_turn and workers > 1 and not stream.mixture.streams:
        stream = replace(stream, planner=StepPlanner(partial(_plans, stream), workers))
    lengths, filling = batching.lengths, None
    if lengths is not None and lengths.are_stored and is_first_on_machine():
        filling = lengths.fill_in_background(stream.processor, ahead)
    steps = prefetched(stream, workers, pin_memory)
    if filling is not None:
        kill_with(steps, filling)
    return steps


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
    ignore_stop_signals()
