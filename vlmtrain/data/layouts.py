"""Layouts: how the stream of samples is split into steps, and each step into the micro-batches of the ranks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import count
from typing import NamedTuple

from ..batch import Batch
from .lengths import CHUNK, Lengths
from .mixture import Mixture
from .packing import Piece, RowBudget, lookahead, row_budget, take_row
from .processor import Processor, Sample
from .records import BadSample, Conversation
from .rendered import Rendered, SampleLength

LAYOUTS = ("padded", "packed")
MEASURED = 1024  # samples used to estimate the lengths in a stream


class Read(NamedTuple):
    """A record that was read and tokenized, without its images."""

    conversation: Conversation
    tokens: Rendered


class Planned(NamedTuple):
    """A sample of a step. `position` is its position in the stream; `read` is None if its length was known before."""

    position: int
    index: int
    length: SampleLength
    read: Read | None


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


class Batching:
    """A layout: how the stream is split into steps, and each step into the micro-batches of the ranks.

    plans_in_turn: whether a step can only be planned after the steps before it. lengths: of the samples, as far as they
    are known; None if this process renders all samples of a step in any case. loss_per: see `Rendered.weighed`.
    """

    plans_in_turn = False
    steps_per_epoch: int
    accumulation: int
    micro_rows: int

    def __init__(self, mixture: Mixture, processor: Processor, lengths: Lengths | None, loss_per: str):
        self.mixture, self.processor, self.lengths, self.loss_per = mixture, processor, lengths, loss_per
        self._measured = 0  # position in the stream up to which lengths were looked for

    def look(self, position: int, bad: list[BadRecord]) -> Planned | None:
        """Return the sample at a position, or None for a broken record, which is appended to `bad`."""
        if self.lengths is not None and position >= self._measured:
            self.lengths.fill(self.processor, range(position, position + CHUNK))
            self._measured = position + CHUNK
        index = self.mixture.draw(position)
        known = None if self.lengths is None else self.lengths[index]
        if known is not None:
            return Planned(position, index, known, None)
        try:
            read = self.read(index)
        except BadSample as error:
            bad.append(BadRecord(position, index, str(error)))
            return None
        length = read.tokens.length
        if self.lengths is not None:
            self.lengths[index] = length
        return Planned(position, index, length, read)

    def read(self, index: int) -> Read:
        """Read and tokenize a record. Raises BadSample."""
        conversation = self.mixture[index]
        return Read(conversation, self.processor.render(conversation))

    def steps(self, first: int, cursor: dict | None, worker: int, workers: int) -> Iterator[PlannedStep]:
        """Yield steps ``first + worker``, ``first + worker + workers``, ... indefinitely."""
        raise NotImplementedError

    def upcoming(self, first: int, last: int, cursor: dict | None) -> range:
        """The positions of the stream that steps `first` to ``last - 1`` are expected to use."""
        raise NotImplementedError

    def order(self, row: list[Planned]) -> int:
        """Sort key of a row: rows with similar keys run at the same time."""
        raise NotImplementedError

    def collate(self, rows: list[list[Sample]], calls: int, chunks: int) -> Batch:
        """Build a micro-batch. calls, chunks: see `vlmtrain.visual.Visual`."""
        raise NotImplementedError


class PaddedBatching(Batching):
    """A fixed number of samples per step. Samples of similar length run together, padded on the right.

    joined: whether those that run together are one row without padding.
    """

    def __init__(
        self,
        mixture: Mixture,
        processor: Processor,
        batch_size: int,
        accumulation: int,
        micro_rows: int,
        lengths: Lengths | None = None,
        loss_per: str = "token",
        joined: bool = False,
    ):
        super().__init__(mixture, processor, lengths, loss_per)
        self.joined = joined
        self.batch_size, self.epoch_size = batch_size, mixture.epoch_size
        self.accumulation, self.micro_rows = accumulation, micro_rows
        self.steps_per_epoch = math.ceil(self.epoch_size / batch_size)

    def __str__(self) -> str:
        return f"{self.batch_size} samples"

    def steps(self, first: int, cursor: dict | None, worker: int, workers: int) -> Iterator[PlannedStep]:
        for step in count(first + worker, workers):
            bad: list[BadRecord] = []
            read = (self.look(position, bad) for position in self.positions(step))
            yield PlannedStep([[sample] for sample in read if sample], bad, {})

    def positions(self, step: int) -> range:
        """Stream positions of a step. The last step of an epoch may have fewer samples than the others."""
        epoch, within = divmod(step, self.steps_per_epoch)
        start = within * self.batch_size
        end = min(start + self.batch_size, self.epoch_size)
        return range(epoch * self.epoch_size + start, epoch * self.epoch_size + end)

    def upcoming(self, first: int, last: int, cursor: dict | None) -> range:
        return range(self.positions(first).start, self.positions(last - 1).stop) if first < last else range(0)

    def order(self, row: list[Planned]) -> int:
        return row[0].length.tokens

    def collate(self, rows: list[list[Sample]], calls: int, chunks: int) -> Batch:
        samples, calls = [row[0] for row in rows], {"calls": calls, "chunks": chunks}
        return self.processor.pack(samples, **calls) if self.joined else self.processor.collate(samples, 1, **calls)


class PackedBatching(Batching):
    """Several samples per row. Rows are filled up to `row_length` tokens; every step has the same number of rows.

    `batch_size` and `micro_batch_size` are average numbers of samples, estimated from the beginning of the stream.
    Epochs have no boundary: the stream continues into the next one. Samples that are not in a row when a stage ends
    are not trained on.
    by_source: whether each row holds samples of a single source only (Qwen-VL packs samples of the same task).
    """

    plans_in_turn = True

    def __init__(
        self,
        mixture: Mixture,
        processor: Processor,
        batch_size: int,
        micro_batch_size: int | None,
        world_size: int,
        by_source: bool = False,
        lengths: Lengths | None = None,
        loss_per: str = "token",
    ):
        super().__init__(mixture, processor, lengths, loss_per)
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
        sample = self.look(position, bad)
        if sample is None:
            return None
        kind = self.mixture.source_number(sample.index) if self.by_source else 0
        return Piece(position, sample.length.tokens, sample.length.image_tokens, kind), sample

    def upcoming(self, first: int, last: int, cursor: dict | None) -> range:
        start = cursor["position"] if cursor else 0
        return range(start, start + math.ceil((last - first) * self.budget.samples) + self.ahead)

    def order(self, row: list[Planned]) -> int:
        return sum(sample.length.images for sample in row)

    def collate(self, rows: list[list[Sample]], calls: int, chunks: int) -> Batch:
        return self.processor.pack([sample for row in rows for sample in row], calls, chunks)
