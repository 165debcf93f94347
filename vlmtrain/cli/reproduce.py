"""``vlmtrain reproduce``: train a run again from its record, and say where its losses part."""

from __future__ import annotations

import argparse
import json
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", metavar="RUN_DIR", type=Path)
    parser.add_argument("--out", type=Path, metavar="DIR", help="where to (default: RUN_DIR-again)")
    parser.add_argument("--ranks", type=int, metavar="N", help="processes (default: as many as then)")


def run(options: argparse.Namespace) -> None:
    from ..runs.reproduction import reproduce

    if options.ranks is not None and options.ranks < 1:
        raise ValueError(f"--ranks {options.ranks}: expected a number from 1")
    done = reproduce(options.run_dir, options.out, options.ranks)
    if options.json:
        stages = {
            name: {**result._asdict(), "parting": result.parting and result.parting._asdict()}
            for name, result in done.stages.items()
        }
        print(json.dumps({**done._asdict(), "stages": stages}, indent=2))
    else:
        for name, result in done.stages.items():
            print(f"  {name}: {_parting(result)}")
        for difference in done.differences:
            print(f"  differs: {difference}")
    if any(result.parting for result in done.stages.values()):
        raise SystemExit(1)


def _parting(result) -> str:
    if result.parting is None:
        weights = {True: ", and its weights are the same", False: ", but its weights differ", None: ""}
        return f"the {result.steps} steps are the same to the bit{weights[result.same_model]}"
    step, key, first, again = result.parting
    share = f" ({abs(again - first) / max(abs(first), 1e-30):.1e} of it)" if None not in (first, again) else ""
    return f"parts at step {step} of {result.steps}: {key} was {first}, is {again}{share}"
