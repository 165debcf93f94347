"""Packing: samples of different lengths put into rows of a set length, with little left empty.

    stream of samples -> look-ahead buffer -> rows -> steps of so many rows each

A row starts with the oldest sample waiting, so none waits for ever, and is filled up by the subset of the others
that fits best. What goes where depends on the stream alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

LOOKAHEAD = 256
PICTURE_CLASSES = 16


class Piece(NamedTuple):
    """A sample on its way into a row: its position in the stream, its tokens, its pictures' tokens.

    kind: samples of different kinds share no row.
    """

    position: int
    length: int
    image_tokens: int
    kind: int = 0


def lookahead(epoch_size: int) -> int:
    """Samples that wait for a row at most. A small set is not smeared over several epochs."""
    return min(LOOKAHEAD, max(16, epoch_size // 16), epoch_size)


def take_row(waiting: list[Piece], row_length: int, image_share: float) -> list[Piece]:
    """Take the samples of one row out of `waiting` (oldest first), which is not empty.

    image_share: the stream's share of picture tokens. Of rows that are almost equally full, the one nearest to it
    is taken, so that vision encoders have about equal work in every row.
    """
    first = waiting[0]
    others = [piece for piece in waiting[1:] if piece.kind == first.kind]
    chosen = [first, *_best_subset(others, row_length - first.length, first, row_length * image_share)]
    taken = {piece.position for piece in chosen}
    waiting[:] = [piece for piece in waiting if piece.position not in taken]
    return sorted(chosen)


def _best_subset(pieces: Sequence[Piece], room: int, first: Piece, image_tokens: float) -> list[Piece]:
    """The pieces that fill `room` best, long ones first: subset sums, the reachable ones as bits of an integer.

    Sums are kept apart by how many pictures they hold, in few classes, so that one of them can be chosen.
    """
    pieces = sorted(pieces, key=lambda piece: -piece.length)  # short ones are easy to place later
    with_pictures = [piece.image_tokens for piece in (first, *pieces) if piece.image_tokens]
    unit = max(min(with_pictures), room // PICTURE_CLASSES) if with_pictures else 0
    mask = (1 << (room + 1)) - 1
    reachable = [{0: 1}]  # after each piece: picture class -> sums
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
    """Which pieces make up a reachable sum: those without which it was out of reach."""
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
    """How samples become rows, as estimated from the beginning of the stream.

    rows: rows an optimiser step, so that it holds `batch_size` samples in the mean; micro_rows: rows a rank runs at
    once; samples: samples a step in the mean; image_share: of the tokens.
    """

    row_length: int
    rows: int
    micro_rows: int
    samples: float
    image_share: float


def row_budget(
    pieces: Sequence[Piece], row_length: int, batch_size: int, micro_batch_size: int | None, ahead: int, world_size: int
) -> RowBudget:
    """Measure a stream by packing its beginning, `pieces`. Raises ValueError if that is empty."""
    if not pieces:
        raise ValueError("no sample to pack: every record that was looked at is broken")
    tokens = sum(piece.length for piece in pieces)
    share = sum(piece.image_tokens for piece in pieces) / tokens
    waiting, coming, packed = list(pieces[:ahead]), iter(pieces[ahead:]), []
    while waiting:
        row = take_row(waiting, row_length, share)
        packed.append(row)
        waiting += [piece for piece, _ in zip(coming, row)]
    # the last rows are as empty as those of an epoch's end, of which a stream has few
    full = packed[: max(1, len(packed) * 3 // 4)]
    a_row = sum(len(row) for row in full) / len(full)
    rows = _round(batch_size / a_row)
    micro = -(-rows // world_size) if micro_batch_size is None else max(1, round(micro_batch_size / a_row))
    return RowBudget(row_length, rows, min(micro, -(-rows // world_size)), rows * a_row, share)


def _round(rows: float) -> int:
    """Rows a step: a multiple of a power of two where that changes little, so that most numbers of ranks divide it."""
    step = 1
    while step * 12 <= rows:
        step *= 2
    return max(1, step * round(rows / step))
