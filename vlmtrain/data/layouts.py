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
from .records import BadSample, Conversation, Dropped
from .rendered import Rendered, SampleLength

LAYOUTS = ("padded", "packed")
MEASURED = 1024  # samples used to estimate the lengths in a stream


class Read(NamedTuple):
    """A record that was read and tokenized, without its images."""

    conversation: Conversation
    tokens: Rendered


class Planned(NamedTuple):
    """A sample of a step. `position` is its position in the stream; `read` is None if its length was known before.

    joins: whether it shares the images of the samples before it in its row.
    """

    position: int
    index: int
    length: SampleLength
    read: Read | None
    joins: bool = False


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
        """Return the sample at a position, or None for a broken record, which is appended to `bad`.

        A document that is left out gives its place to another one.
        """
        if self.lengths is not None and position >= self._measured:
            self.lengths.fill(self.processor, range(position, position + CHUNK))
            self._measured = position + CHUNK
        problem = "no document with several images was found"
        for index in self.mixture.candidates(position):
            known, read = None if self.lengths is None else self.lengths[index], None
            if known is None:
                try:
                    read = self.read(index, position)
                except Dropped as error:
                    problem = str(error)
                    continue
                except BadSample as error:
                    problem = str(error)
                    break
                known = read.tokens.length
                if self.lengths is not None:
                    self.lengths[index] = known
            if self.mixture.keeps(position, index, known.images):
                return Planned(position, index, known, read)
        bad.append(BadRecord(position, index, problem))
        return None

    def read(self, index: int, position: int) -> Read:
        """Read and tokenize the record at a position of the stream. Raises BadSample."""
        conversation, cuts = self.mixture[index], self.processor.renderer.template == "prefix"
        place = self.mixture.place(position) if cuts else None
        return Read(conversation, self.processor.render(conversation, None, place))

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
    share_images: whether waiting samples of a source that are equal up to their last image share it, in one tree.
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
        share_images: bool = False,
    ):
        super().__init__(mixture, processor, lengths, loss_per)
        assert lengths is None or not share_images, "only rendered samples can be compared"
        self.by_source, self.share_images = by_source, share_images
        kinds = len(mixture.sources) if by_source else 1
        self.ahead = min(kinds * lookahead(mixture.epoch_size), mixture.epoch_size)
        first = _Waiting(processor.max_length)
        for position in range(min(MEASURED, mixture.epoch_size)):
            self._wait_for(position, first, [])
        sizes = (processor.max_length, batch_size, micro_batch_size, self.ahead, world_size)
        self.budget: RowBudget = row_budget(first.pieces, *sizes)
        self.micro_rows = self.budget.micro_rows
        self.accumulation = math.ceil(self.budget.rows / (self.micro_rows * world_size))
        self.steps_per_epoch = math.ceil(mixture.epoch_size / self.budget.records)

    def __str__(self) -> str:
        budget = self.budget
        return f"{budget.rows} rows of {budget.row_length} tokens, about {budget.samples:.0f} samples"

    def steps(self, first: int, cursor: dict | None, worker: int, workers: int) -> Iterator[PlannedStep]:
        position, waiting = 0, _Waiting(self.budget.row_length)
        bad: list[BadRecord] = []
        if cursor:
            position = cursor["position"]
            for kept in cursor["waiting"]:
                self._wait_for(kept, waiting, [])  # bad ones were counted when they were first read
        skip = 0 if cursor else first
        for number in count():
            rows = []
            while len(rows) < self.budget.rows:
                while len(waiting) < self.ahead:
                    self._wait_for(position, waiting, bad)
                    position += 1
                rows.append(waiting.take_row(self.budget.image_share))
            if number >= skip and (number - skip) % workers == worker:
                yield PlannedStep(rows, bad, {"position": position, "waiting": waiting.positions})
            bad = []

    def _wait_for(self, position: int, waiting: _Waiting, bad: list[BadRecord]) -> None:
        sample = self.look(position, bad)
        if sample is None:
            return
        source = self.mixture.source_number(sample.index)
        waiting.add(sample, source if self.by_source else 0, source if self.share_images else None)

    def upcoming(self, first: int, last: int, cursor: dict | None) -> range:
        start = cursor["position"] if cursor else 0
        return range(start, start + math.ceil((last - first) * self.budget.records) + self.ahead)

    def order(self, row: list[Planned]) -> int:
        return sum(sample.length.images for sample in row if not sample.joins)

    def collate(self, rows: list[list[Sample]], calls: int, chunks: int) -> Batch:
        return self.processor.pack([sample for row in rows for sample in row], calls, chunks)


class _Waiting:
    """Samples that wait for rows of `row_length` tokens, oldest first; those that share their images are one piece."""

    def __init__(self, row_length: int):
        self.row_length = row_length
        self.pieces: list[Piece] = []
        self._samples: dict[int, list[Planned]] = {}  # of each piece, by its position
        self._shared: dict[int, tuple | None] = {}  # what the samples of each piece share, by its position

    def __len__(self) -> int:
        return sum(piece.records for piece in self.pieces)

    def add(self, sample: Planned, kind: int, source: int | None) -> None:
        """Add a sample, to the first piece with room that shows the same images, or as a piece of its own.

        source: whose samples it may share its images with; None to share nothing.
        """
        length, count, shared = sample.length, 1, None
        if sample.read is not None:
            count = sample.read.tokens.dialogues
        if source is not None and sample.read.tokens.shared:
            tokens = sample.read.tokens
            shared = source, sample.read.conversation.media, tokens.beginning
            for number, piece in enumerate(self.pieces):
                total = piece.length + length.tokens - tokens.shared
                if total <= self.row_length and self._shared[piece.position] == shared:
                    samples, records = piece.samples + count, piece.records + 1
                    self.pieces[number] = piece._replace(length=total, samples=samples, records=records)
                    self._samples[piece.position].append(sample._replace(joins=True))
                    return
        self.pieces.append(Piece(sample.position, length.tokens, length.image_tokens, kind, count))
        self._samples[sample.position], self._shared[sample.position] = [sample], shared

    def take_row(self, image_share: float) -> list[Planned]:
        """Remove the samples of the next row and return them. See `packing.take_row`."""
        row = take_row(self.pieces, self.row_length, image_share)
        for piece in row:
            del self._shared[piece.position]
        return [sample for piece in row for sample in self._samples.pop(piece.position)]

    @property
    def positions(self) -> list[int]:
        """Positions of the samples in the stream. Added again in this order, they form the same pieces."""
        return [sample.position for piece in self.pieces for sample in self._samples[piece.position]]
