"""``vlmtrain check``: read all data of a stage as training does, and report statistics and problems."""

from __future__ import annotations

import hashlib
import json
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, groupby
from pathlib import Path
from typing import NamedTuple

from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from .boxes import is_box, read_answer, text_of
from .mixture import Mixture
from .processor import Processor
from .records import BadSample, Dropped, is_video
from .regions import ENOUGH_IOU, iou
from .rendered import Rendered

CHUNK = 64
BINS = 8


class Reading(NamedTuple):
    """Result of one record: its problem or its counts. `content` is equal for equal samples."""

    index: int
    problem: str | None
    length: int = 0
    images: int = 0
    image_tokens: int = 0
    videos: int = 0
    frames: int = 0
    video_tokens: int = 0
    target_tokens: int = 0
    answers: int = 0
    content: bytes = b""
    unused: tuple[str, ...] = ()
    repaired: bool = False
    boxes: int = 0
    boxes_kept: int = 0
    dropped: bool = False


@dataclass
class SourceReport:
    """Totals of a source, the distribution of its lengths, and all problems.

    frames: number of frames that the videos show. length, image_tokens_each, video_tokens_each: shortest, median and
    longest; histograms: (from, to, samples); duplicates: samples with the same text and media as an earlier one;
    bad_records: indices of the records with problems. dropped: documents that the sampling rules leave out. unused:
    keys and columns that were not read, with the number of samples that have them; repaired: samples whose turns were
    dropped or joined. boxes_kept: boxes that still have an IoU of at least 0.5 when their text is read, which is the
    highest accuracy that a model can reach.
    """

    records: int = 0
    samples: int = 0
    images: int = 0
    text_only: int = 0
    answers: int = 0
    tokens: int = 0
    image_tokens: int = 0
    videos: int = 0
    frames: int = 0
    video_tokens: int = 0
    target_tokens: int = 0
    duplicates: int = 0
    repaired: int = 0
    dropped: int = 0
    boxes: int = 0
    boxes_kept: int = 0
    unused: dict[str, int] = field(default_factory=dict)
    length: dict[str, float] = field(default_factory=dict)
    length_histogram: list[tuple[int, int, int]] = field(default_factory=list)
    image_tokens_each: dict[str, float] = field(default_factory=dict)
    image_tokens_histogram: list[tuple[int, int, int]] = field(default_factory=list)
    video_tokens_each: dict[str, float] = field(default_factory=dict)
    video_tokens_histogram: list[tuple[int, int, int]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    bad_records: list[int] = field(default_factory=list)

    def add_bad(self, other: SourceReport) -> None:
        """Add the records that are bad in another stage's report on the same source."""
        self.bad_records = sorted({*self.bad_records, *other.bad_records})


class _Readings(Dataset):
    def __init__(self, mixture: Mixture, processor: Processor, held_out: bool):
        self.mixture, self.processor, self.held_out = mixture, processor, held_out

    def __len__(self) -> int:
        return len(self.mixture)

    def __getitem__(self, index: int) -> Reading:
        content = hashlib.blake2b(digest_size=16)
        try:
            conversation = self.processor.written(self.mixture[index])
            if self.held_out:
                conversation = self.processor.renderer.showable(conversation)
            place = None if self.held_out else 0.5  # a typical cut
            tokens = self.processor.render(conversation, None, place)
            for image in self.processor.decode(conversation, tokens.media):
                content.update(image.tobytes())
        except Dropped:
            return Reading(index, None, dropped=True)
        except BadSample as error:
            return Reading(index, str(error))
        content.update(tokens.input_ids.numpy())
        places = [place for turn in conversation.turns for place in turn.grading.places if is_box(place)]
        plan = tokens.media
        shown = [is_video(conversation.media[own[0][1].medium]) for own in plan.by_medium]
        slots = {False: 0, True: 0}  # by whether they are of a video
        for number, placement in enumerate(plan.placements):
            slots[plan.is_video(number)] += placement.slots
        return Reading(
            index,
            None,
            len(tokens),
            shown.count(False),
            slots[False],
            shown.count(True),
            sum(len(item.times) for item in plan.items),
            slots[True],
            int((tokens.weights > 0).sum()),
            sum(end > start for start, end in tokens.answers),
            content.digest(),
            conversation.unused,
            conversation.repaired,
            len(places),
            sum(iou(place.at, read_answer(text_of(place), place)) >= ENOUGH_IOU for place in places),
        )


def check_data(
    mixture: Mixture, processor: Processor, workers: int, show_progress: bool, held_out: bool = False
) -> dict[str, SourceReport]:
    """Render every record and decode its images and the frames that are shown of its videos.

    workers: number of additional processes. held_out: read the records as validation does, not as training.
    """
    reports = {name: SourceReport(records=len(source)) for name, source in mixture.sources.items()}
    names, starts = list(reports), [0, *accumulate(report.records for report in reports.values())]
    lengths: dict[str, Counter] = {name: Counter() for name in names}
    image_tokens: dict[str, Counter] = {name: Counter() for name in names}
    video_tokens: dict[str, Counter] = {name: Counter() for name in names}
    seen: set[bytes] = set()
    for reading in _read_all(_Readings(mixture, processor, held_out), workers, show_progress):
        number = mixture.source_number(reading.index)
        name, report = names[number], reports[names[number]]
        if reading.problem is not None:
            report.problems.append(reading.problem)
            report.bad_records.append(reading.index - starts[number])
            continue
        if reading.dropped:
            report.dropped += 1
            continue
        report.samples += 1
        report.images += reading.images
        report.videos += reading.videos
        report.frames += reading.frames
        report.text_only += reading.images == reading.videos == 0
        report.answers += reading.answers
        report.tokens += reading.length
        report.image_tokens += reading.image_tokens
        report.video_tokens += reading.video_tokens
        report.target_tokens += reading.target_tokens
        report.duplicates += reading.content in seen
        report.repaired += reading.repaired
        report.boxes += reading.boxes
        report.boxes_kept += reading.boxes_kept
        for key in reading.unused:
            report.unused[key] = report.unused.get(key, 0) + 1
        seen.add(reading.content)
        lengths[name][reading.length] += 1
        if reading.images:
            image_tokens[name][reading.image_tokens] += 1
        if reading.videos:
            video_tokens[name][reading.video_tokens] += 1
    for name, report in reports.items():
        report.length, report.length_histogram = _spread(lengths[name])
        report.image_tokens_each, report.image_tokens_histogram = _spread(image_tokens[name])
        report.video_tokens_each, report.video_tokens_histogram = _spread(video_tokens[name])
    return reports


def _read_all(readings: _Readings, workers: int, show_progress: bool) -> Iterator[Reading]:
    loader = DataLoader(readings, batch_size=CHUNK, num_workers=workers, collate_fn=list)
    with tqdm(total=len(readings), unit="record", disable=not show_progress, leave=False) as bar:
        for chunk in loader:
            bar.update(len(chunk))
            yield from chunk


def _spread(counts: Counter) -> tuple[dict[str, float], list[tuple[int, int, int]]]:
    """Shortest, median and longest of counted values, and a histogram with bins of equal width."""
    if not counts:
        return {}, []
    low, high = min(counts), max(counts)
    width = max(1, -(-(high - low + 1) // BINS))
    bins = Counter()
    for value, count in counts.items():
        bins[(value - low) // width] += count
    histogram = [(low + i * width, low + (i + 1) * width - 1, bins[i]) for i in range((high - low) // width + 1)]
    median = statistics.median(counts.elements())
    return {"shortest": low, "median": median, "longest": high}, histogram


def text_histogram(histogram: Sequence[tuple[int, int, int]], width: int = 30) -> list[str]:
    """Format a histogram as lines with range, bar and count."""
    most = max((count for *_, count in histogram), default=0)
    digits = max((len(str(high)) for _, high, _ in histogram), default=0)
    return [
        f"{low:>{digits}}-{high:<{digits}} {'█' * max(round(width * count / most), count > 0):<{width}} {count:,}"
        for low, high, count in histogram
    ]


def write_clean_list(file: Path, checked: Mapping[str, Mapping[str, SourceReport]]) -> None:
    """Write the records of each split's sources that training should skip, for ``data.clean_list``."""
    splits = {
        split: {name: {"records": r.records, "bad": r.bad_records} for name, r in reports.items()}
        for split, reports in checked.items()
    }
    file.write_text(json.dumps(splits) + "\n")


def show_targets(tokens: Rendered, processor: Processor, color: bool) -> str:
    """Text of a sample with the trained tokens marked: green on a terminal, else in double angle brackets."""
    start, end = ("\x1b[32m", "\x1b[0m") if color else ("«", "»")
    trained = [False, *(tokens.weights > 0).tolist()]
    positions = zip(tokens.input_ids.tolist(), tokens.index.tolist(), trained)
    out = []
    for (image, is_trained), run in groupby(positions, key=lambda position: position[1:]):
        ids = [token for token, *_ in run]
        if image >= 0:
            kind = "video" if tokens.media.is_video(image) else "image"
            out.append(f"[{kind}: {len(ids)} token{'s' * (len(ids) != 1)}]")
        else:
            text = processor.tokenizer.decode(ids)
            out.append(f"{start}{text}{end}" if is_trained else text)
    return "".join(out)
