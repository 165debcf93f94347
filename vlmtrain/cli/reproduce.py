"""``vlmtrain reproduce``: repeat a run from its record and report where the losses diverge."""

from __future__ import annotations

import argparse
import json
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", metavar="RUN_DIR", type=Path)
    parser.add_argument("--out", type=Path, metavar="DIR", help="output folder (default: RUN_DIR-again)")
    parser.add_argument("--ranks", type=int, metavar="N", help="number of processes (default: that of the run)")


def run(options: argparse.Namespace) -> None:
    from ..runs.reproduction import reproduce
    from ..settings.fields import optional, whole

    optional(whole(1))(options.ranks, "--ranks")
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
        weights = {True: ", and so are the weights", False: ", but the weights differ", None: ""}
        return f"all {result.steps} steps are bit-identical{weights[result.same_model]}"
    step, key, first, again = result.parting
    share = ""
    if None not in (first, again):
        share = f" (relative difference {abs(again - first) / max(abs(first), 1e-30):.1e})"
    return f"diverges at step {step} of {result.steps}: {key} was {first}, is now {again}{share}"
