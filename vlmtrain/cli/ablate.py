"""``vlmtrain ablate``: train a recipe with several connectors and report which differ."""

from __future__ import annotations

import argparse
import json
import sys

from .common import take_overrides


def add_arguments(parser: argparse.ArgumentParser) -> None:
    take_overrides(
        parser,
        "recipe=NAME connectors=[linear,{qformer:{num_queries: 64}}] seeds=[0,1,2] and any overrides for training; "
        "axis.KEY=[...] adds an axis; sweep.KEY=[...] sweep_steps=100 finds each choice's best value in short runs; "
        "budget=steps|samples|flops|wall, metric=exact_match; jobs=N at once, ranks=N per job, run_dir=DIR",
    )


def run(options: argparse.Namespace) -> None:
    from ..ablation import read_line, read_results, run_ablation
    from ..ablation.show import as_json, for_terminal, write_results

    ablation = read_line(options.overrides)
    failed = run_ablation(ablation, show_progress=sys.stderr.isatty())
    entries = read_results(ablation, without=[choice for choice, _ in failed])
    if entries:
        write_results(ablation, entries)
    if entries and options.json:
        print(json.dumps([as_json(entry) for entry in entries], indent=2))
    elif entries:
        print(for_terminal(ablation, entries), f"page: {ablation.folder / 'ablation.html'}", sep="\n\n")
    if failed:
        number = len(ablation.choices) * len(ablation.seeds)
        told = "; ".join(dict.fromkeys(said for _, said in failed))
        raise ValueError(f"{len(failed)} of {number} jobs failed: {told}")
