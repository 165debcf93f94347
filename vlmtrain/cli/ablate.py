"""``vlmtrain ablate``: train a recipe with several connectors and report which differ."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from .common import take_overrides

if TYPE_CHECKING:
    from ..ablation import Ablation, Entry


def add_arguments(parser: argparse.ArgumentParser) -> None:
    take_overrides(
        parser,
        "recipe=NAME connectors=[linear,{qformer:{num_queries: 64}}] seeds=[0,1,2] and any overrides for training; "
        "axis.KEY=[...] adds an axis; sweep.KEY=[...] sweep_steps=100 finds each choice's best value in short runs; "
        "budget=steps|samples|flops|wall, metric=exact_match; jobs=N at once, ranks=N per job, run_dir=DIR",
    )


def run(options: argparse.Namespace) -> None:
    from ..ablation import read_line, read_results, run_ablation

    ablation = read_line(options.overrides)
    failed = run_ablation(ablation, show_progress=sys.stderr.isatty())
    entries = read_results(ablation, without=[choice for choice, _ in failed])
    if entries:
        _tell(ablation, entries, options.json)
    if failed:
        number = len(ablation.choices) * len(ablation.seeds)
        told = "; ".join(dict.fromkeys(said for _, said in failed))
        raise ValueError(f"{len(failed)} of {number} jobs failed: {told}")


def _tell(ablation: Ablation, entries: Sequence[Entry], as_json_text: bool) -> None:
    """Write and print the tables."""
    from ..ablation.show import as_json, for_terminal, write_results

    write_results(ablation, entries)
    if as_json_text:
        print(json.dumps([as_json(entry) for entry in entries], indent=2))
    else:
        print(for_terminal(ablation, entries), f"page: {ablation.folder / 'ablation.html'}", sep="\n\n")
