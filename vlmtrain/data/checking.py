"""``vlmtrain check``: read all of a stage's data as training would, and say what is in it and what is wrong."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from .processor import Processor
from .records import BadSample
from .rendering import Rendered
from .sources import Source

CHUNK = 64


class Reading(NamedTuple):
    """What one record came to: its problem, or its counts."""

    index: int
    problem: str | None
    length: int = 0
    images: int = 0
    image_tokens: int = 0
    target_tokens: int = 0
    turns: int = 0


@dataclass
class DataReport:
    """Totals over a source, and every problem found."""

    records: int = 0
    samples: int = 0
    images: int = 0
    text_only: int = 0
    answers: int = 0
    tokens: int = 0
    image_tokens: int = 0
    target_tokens: int = 0
    length: dict[str, float] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


class _Readings(Dataset):
    def __init__(self, source: Source, processor: Processor):
        self.source, self.processor = source, processor

    def __len__(self) -> int:
        return -(-len(self.source) // CHUNK)

    def __getitem__(self, chunk: int) -> list[Reading]:
        end = min((chunk + 1) * CHUNK, len(self.source))
        return [self._read(index) for index in range(chunk * CHUNK, end)]

    def _read(self, index: int) -> Reading:
        try:
            sample = self.processor(self.source[index])
        except BadSample as error:
            return Reading(index, str(error))
        tokens = sample.tokens
        return Reading(
            index,
            None,
            len(tokens),
            len(sample.images) if sample.images.ndim == 4 else 0,
            int((tokens.image_index >= 0).sum()),
            int((tokens.weights > 0).sum()),
            len(tokens.answers),
        )


def check_data(source: Source, processor: Processor, workers: int, show_progress: bool) -> DataReport:
    """Render every record, decoding its pictures, with `workers` processes beside this one (0: none)."""
    report, lengths = DataReport(records=len(source)), []
    for reading in _read_all(source, processor, workers, show_progress):
        if reading.problem is not None:
            report.problems.append(reading.problem)
            continue
        lengths.append(reading.length)
        report.samples += 1
        report.images += reading.images
        report.text_only += reading.images == 0
        report.answers += reading.turns
        report.tokens += reading.length
        report.image_tokens += reading.image_tokens
        report.target_tokens += reading.target_tokens
    if lengths:
        report.length = {"shortest": min(lengths), "median": statistics.median(lengths), "longest": max(lengths)}
    return report


def _read_all(source: Source, processor: Processor, workers: int, show_progress: bool) -> Iterator[Reading]:
    loader = DataLoader(_Readings(source, processor), batch_size=None, num_workers=workers)
    with tqdm(total=len(source), unit="record", disable=not show_progress, leave=False) as bar:
        for readings in loader:
            bar.update(len(readings))
            yield from readings


def show_targets(tokens: Rendered, processor: Processor, color: bool) -> str:
    """A sample's text with what is trained on marked: green on a terminal, else in double angle brackets."""
    start, end = ("\x1b[32m", "\x1b[0m") if color else ("«", "»")
    out, position = [], 0
    while position < len(tokens):
        stop = position
        if tokens.image_index[position] >= 0:
            while stop < len(tokens) and tokens.image_index[stop] == tokens.image_index[position]:
                stop += 1
            out.append(f"[picture: {stop - position} tokens]")
        else:
            trained = _is_trained(tokens, position)
            while stop < len(tokens) and tokens.image_index[stop] < 0 and _is_trained(tokens, stop) == trained:
                stop += 1
            text = processor.tokenizer.decode(tokens.input_ids[position:stop])
            out.append(f"{start}{text}{end}" if trained else text)
        position = stop
    return "".join(out)


def _is_trained(tokens: Rendered, position: int) -> bool:
    return position > 0 and bool(tokens.weights[position - 1] > 0)
