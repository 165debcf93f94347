"""Packing: samples of different lengths are combined into rows of a fixed length with little padding.

    stream of samples -> look-ahead buffer -> rows -> steps with a fixed number of rows

A row starts with the oldest waiting sample, so that no sample waits forever, and is filled with the subset of the
others that fits best. The result depends only on the stream.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

LOOKAHEAD = 256
PICTURE_CLASSES = 16


class Piece(NamedTuple):
    """A sample waiting for a row: its position in the stream, number of tokens and number of image tokens.

    kind: samples of different kinds are never in the same row. samples, records: more than one if several samples share
    their images; the position is then that of the first record.
    """

    position: int
    length: int
    image_tokens: int
    kind: int = 0
    samples: int = 1
    records: int = 1


def lookahead(epoch_size: int) -> int:
    """Maximum number of samples that wait for a row; limited for small datasets, so that epochs are not mixed."""
    return min(LOOKAHEAD, max(16, epoch_size // 16), epoch_size)


def take_row(waiting: list[Piece], row_length: int, image_share: float) -> list[Piece]:
    """Remove the samples of one row from `waiting` (non-empty, oldest first) and return them.

    image_share: the share of image tokens in the stream. Among rows that are almost equally full, the one closest to
    this share is chosen, so that the vision encoder has about the same work for every row.
    """
    first = waiting[0]
    others = [piece for piece in waiting[1:] if piece.kind == first.kind]
    chosen = [first, *_best_subset(others, row_length - first.length, first, row_length * image_share)]
    taken = {piece.position for piece in chosen}
    waiting[:] = [piece for piece in waiting if piece.position not in taken]
    return sorted(chosen)


def _best_subset(pieces: Sequence[Piece], room: int, first: Piece, image_tokens: float) -> list[Piece]:
    """The pieces that fill `room` best, long ones first, by subset sums; reachable sums are the bits of an integer.

    Sums are stored separately for a few classes of image tokens, so that one class can be chosen.
    """
    pieces = sorted(pieces, key=lambda piece: -piece.length)  # short ones are easier to place later
    with_pictures = [piece.image_tokens for piece in (first, *pieces) if piece.image_tokens]
    unit = max(min(with_pictures), room // PICTURE_CLASSES) if with_pictures else 0
    mask = (1 << (room + 1)) - 1
    reachable = [{0: 1}]  # after each piece: image class -> sums
    for piece in pieces:
        sums = dict(reachable[-1])
        step = _pictures(piece, unit)
        for pictures, bits in reachable[-1].items():
            if more := bits << piece.length & mask:
                sums[pictures + step] = sums.get(pictures + step, 0) | more
        reachable.append(sums)
    best = max(bits.bit_length() - 1 for bits in reachable[-1].values())
    wanted = image_tokens / unit - _pictures(first, unit) if unit else 0.0
    full_enough = best - (room + first.length) // 64
    pictures, bits = min(
        ((count, bits) for count, bits in reachable[-1].items() if bits.bit_length() - 1 >= full_enough),
        key=lambda entry: (abs(entry[0] - wanted), -entry[1].bit_length()),
    )
    return _trace(pieces, reachable, pictures, bits.bit_length() - 1, unit)


def _pictures(piece: Piece, unit: int) -> int:
    return -(-piece.image_tokens // unit) if unit else 0


def _trace(
    pieces: Sequence[Piece], reachable: list[dict[int, int]], pictures: int, total: int, unit: int
) -> list[Piece]:
    """Trace back the pieces of a reachable sum: those without which it was not reachable."""
    chosen = []
    for number in range(len(pieces), 0, -1):
        if reachable[number - 1].get(pictures, 0) >> total & 1:
            continue
        piece = pieces[number - 1]
        chosen.append(piece)
        pictures, total = pictures - _pictures(piece, unit), total - piece.length
    return chosen


@dataclass(frozen=True)
class RowBudget:
    """How samples are packed into rows, estimated from the beginning of the stream.

    rows: rows per optimizer step, so that it contains `batch_size` samples on average; micro_rows: rows per
    micro-batch on each rank; samples, records, tokens: their average numbers per step; image_share: image tokens / all
    tokens.
    """

    row_length: int
    rows: int
    micro_rows: int
    samples: float
    records: float
    tokens: float
    image_share: float


def row_budget(
    pieces: Sequence[Piece], row_length: int, batch_size: int, micro_batch_size: int | None, ahead: int, world_size: int
) -> RowBudget:
    """Estimate the budget by packing the beginning of the stream, `pieces`. Raises ValueError if it is empty."""
    if not pieces:
        raise ValueError("no sample to pack: every record that was checked is broken")
    share = sum(piece.image_tokens for piece in pieces) / sum(piece.length for piece in pieces)
    waiting, coming, packed = list(pieces[:ahead]), iter(pieces[ahead:]), []
    while waiting:
        row = take_row(waiting, row_length, share)
        packed.append(row)
        waiting += [piece for piece, _ in zip(coming, row)]
    # the last rows are emptier, like those at the end of an epoch, which are rare in the stream
    full = packed[: max(1, len(packed) * 3 // 4)]
    a_row, records, tokens = (
        sum(getattr(piece, name) for row in full for piece in row) / len(full)
        for name in ("samples", "records", "length")
    )
    rows = _round(batch_size / a_row)
    micro = -(-rows // world_size) if micro_batch_size is None else max(1, round(micro_batch_size / a_row))
    micro = min(micro, -(-rows // world_size))
    return RowBudget(row_length, rows, micro, rows * a_row, rows * records, rows * tokens, share)


def _round(rows: float) -> int:
    """Rows per step, rounded to a multiple of a power of two if that changes little, to suit most numbers of ranks."""
    step = 1
    while step * 12 <= rows:
        step *= 2
    return max(1, step * round(rows / step))
