"""Runs the pieces of a measurement in order within a time budget. Nothing is dropped silently."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

DONE, FAILED, NOT_RUN, LEFT_OUT = "done", "failed", "not run", "left out"
LEAST = 20.0  # seconds that must be left to start a piece


@dataclass(frozen=True)
class Piece:
    """One measurement. run: called with the seconds that it may take, returns its values.

    limit: the most seconds that it may take; 0 if it takes no time and is always run. needs: pieces that must be done.
    left_out: why it is not to be run, None if it is.
    """

    name: str
    run: Callable[[float], dict[str, Any]]
    limit: float = 0.0
    needs: tuple[str, ...] = ()
    left_out: str | None = None


@dataclass
class Result:
    """What became of a piece. problem: why it failed or was not run."""

    status: str
    seconds: float
    values: dict[str, Any]
    problem: str | None = None


def run_pieces(
    pieces: Sequence[Piece],
    budget: float,
    report: Callable[[dict[str, Result]], None] = lambda results: None,
    clock: Callable[[], float] = time.monotonic,
) -> dict[str, Result]:
    """Run pieces in order; `budget` in seconds. One that fails does not stop the others. Returns a result for each.

    report: called with all results so far, after each piece that ran.
    """
    results = {piece.name: Result(NOT_RUN, 0.0, {}, "interrupted before it") for piece in pieces}
    end = clock() + budget
    for piece in pieces:
        started = clock()
        results[piece.name] = result = _run(piece, results, end - started)
        result.seconds = clock() - started
        said = f": {result.problem}" if result.problem else ""
        print(f"[{end - clock():4.0f} s left] {piece.name}: {result.status}{said}", file=sys.stderr, flush=True)
        if result.status in (DONE, FAILED):
            report(results)
    report(results)
    return results


def _run(piece: Piece, results: dict[str, Result], left: float) -> Result:
    if piece.left_out is not None:
        return Result(LEFT_OUT, 0.0, {}, piece.left_out)
    lacking = [need for need in piece.needs if results[need].status != DONE]
    problem = f"needs: {', '.join(lacking)}" if lacking else None
    if problem is None and piece.limit and left < LEAST:
        problem = f"the time was up ({max(left, 0):.0f} s left)"
    if problem is not None:
        return Result(NOT_RUN, 0.0, {}, problem)
    try:
        return Result(DONE, 0.0, piece.run(min(piece.limit, left)))
    except Exception as error:
        return Result(FAILED, 0.0, {}, f"{type(error).__name__}: {error}".strip())
