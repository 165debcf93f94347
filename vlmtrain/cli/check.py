"""``vlmtrain check``: read a recipe's data as training does and list its problems."""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from .common import MAX_PROBLEMS, check_writable, take_config_dir, take_overrides

if TYPE_CHECKING:
    from ..settings import Run, Stage

SHOWN = 3
"""Number of samples printed per stage."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    take_overrides(parser, "the same overrides as for training")
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, help="worker processes (default: one per core)"
    )
    parser.add_argument(
        "--clean-list",
        type=Path,
        metavar="FILE",
        help="write the list of bad records to FILE; data.clean_list=FILE trains without them",
    )
    take_config_dir(parser)


def run(options: argparse.Namespace) -> None:
    from ..data.checking import write_clean_list
    from ..settings import compose
    from ..training.assembly import build_tokenizer
    from ..training.init_from import with_init_from

    check_writable(options.clean_list)
    settings = with_init_from(compose(options.overrides, options.config_dir))
    if options.clean_list:
        for stage in settings.wanted:
            settings.data.split(stage.data).refuse_streams("with --clean-list: no records of it can be excluded")
    tokenizer = build_tokenizer(settings)
    results, by_split = {}, {}
    for stage in settings.wanted:
        results[stage.name], checked = _check_stage(settings, stage, tokenizer, options)
        for split, reports in checked.items():
            for source, report in reports.items():
                by_split.setdefault(split, {}).setdefault(source, report).add_bad(report)
    if options.json:
        print(json.dumps(results, indent=2))
    if options.clean_list:
        write_clean_list(options.clean_list, by_split)
    if any(result["problems"] or (result["validation"] or {}).get("problems") for result in results.values()):
        raise SystemExit(1)


def _check_stage(settings: Run, stage: Stage, tokenizer, options: argparse.Namespace) -> tuple[dict, dict]:
    """Check the data of a stage. Returns the result, which is printed unless --json is set, and the splits' reports."""
    from ..data.checking import check_data, show_targets
    from ..data.sources import build_source
    from ..objectives import OBJECTIVES
    from ..training.assembly import build_skeleton
    from ..training.batching import build_batching
    from ..training.processing import build_processor, image_size_of

    parts = build_skeleton(settings, stage, tokenizer)
    processor = build_processor(settings, stage, parts, OBJECTIVES[stage.objective], tokenizer)
    splits = [stage.data]
    if stage.validation != stage.data and settings.validates(stage):
        splits.append(stage.validation)
    size = image_size_of(parts)
    mixtures = {split: build_source(settings.data.split(split), size, settings.seed) for split in splits}
    for stream in mixtures[stage.data].streams.values():
        sys.stderr.write(f"vlmtrain: warning: only the first epoch is checked: {stream.note}\n")
    progress = sys.stderr.isatty()
    checked = {
        split: check_data(mixture, processor, options.workers, progress, held_out=split != stage.data)
        for split, mixture in mixtures.items()
    }
    result, held_out = _summed(stage.data, checked), _summed(stage.validation, checked)
    good = sum(report.samples for report in checked[stage.data].values())
    tokens = sum(report.tokens for report in checked[stage.data].values())
    steps = trained = 0
    if good:
        batching = build_batching(mixtures[stage.data], processor, stage, 1, 0)
        steps = stage.max_steps or batching.steps_per_epoch * stage.epochs
        trained = steps * (batching.budget.tokens if stage.share_images else stage.batch_size * tokens / good)
    result["steps"] = steps
    result["tokens_trained_on"] = round(trained)
    result["validation"] = held_out if stage.validation != stage.data else None
    if not options.json:
        _print_check(stage.name, result, _first_samples(mixtures[stage.data], processor, show_targets))
    return result, checked


def _summed(split: str | None, checked: dict) -> dict | None:
    if split not in checked:
        return None
    reports = checked[split]
    return {
        "data": split,
        "sources": {source: asdict(report) for source, report in reports.items()},
        "problems": [problem for report in reports.values() for problem in report.problems],
    }


def _first_samples(source, processor, show_targets) -> list[str]:
    from ..data.records import BadSample

    texts = []
    for index in range(min(len(source), 100)):
        if len(texts) == SHOWN:
            break
        try:
            texts.append(show_targets(processor(source[index]).tokens, processor, sys.stdout.isatty()))
        except BadSample:
            continue
    return texts


def _print_check(name: str, result: dict, samples: list[str]) -> None:
    print(f"stage {name} (data.{result['data']}): about {result['steps']:,} steps, "
          f"{result['tokens_trained_on']:,} tokens")  # fmt: skip
    _print_sources(result)
    if result["validation"]:
        print(f"  validation (data.{result['validation']['data']})")
        _print_sources(result["validation"])
    for text in samples:
        print("  ---\n  " + text.rstrip().replace("\n", "\n  "))
    print(flush=True)


def _print_sources(result: dict) -> None:
    from ..data.checking import text_histogram
    from ..reporting.tables import text_table

    for source, report in result["sources"].items():
        print(f"  {source}")
        print(
            text_table(
            [
                ("  records", f"{report['records']:,}"),
                ("  samples", f"{report['samples']:,} ({report['text_only']:,} text-only, "
                              f"{report['duplicates']:,} duplicates)"),
                ("  images", f"{report['images']:,}"),
                *([("  videos", f"{report['videos']:,} ({report['frames']:,} frames)")] if report["videos"] else []),
                ("  answers", f"{report['answers']:,}"),
                ("  tokens", f"{report['tokens']:,} ({report['image_tokens']:,} of images, "
                             + (f"{report['video_tokens']:,} of videos, " if report["videos"] else "") +
                             f"{report['target_tokens']:,} trained on)"),
                ("  problems", f"{len(report['problems']):,}"),
                *([("  boxes", f"{report['boxes']:,} ({report['boxes_kept'] / report['boxes']:.1%} have an IoU of at "
                               "least 0.5 when their text is read)")] if report["boxes"] else []),
                *([("  repaired", f"{report['repaired']:,}")] if report["repaired"] else []),
                *([("  left out", f"{report['dropped']:,} document{'s' if report['dropped'] > 1 else ''}")]
                  if report["dropped"] else []),
                *([("  not read", ", ".join(report["unused"]))] if report["unused"] else []),
            ], indent=2, numbers=False)
        )  # fmt: skip
        for title, key, histogram in (
            ("tokens per sample", "length", "length_histogram"),
            ("image tokens per sample", "image_tokens_each", "image_tokens_histogram"),
            ("video tokens per sample", "video_tokens_each", "video_tokens_histogram"),
        ):
            if report[key]:
                spread = ", ".join(f"{which} {value:g}" for which, value in report[key].items())
                print(f"    {title}: {spread}")
                bins = report[histogram]
                for line in text_histogram(bins) if len(bins) > 1 else ():
                    print(f"      {line}")
        for problem in report["problems"][:MAX_PROBLEMS]:
            print(f"    {problem}")
        if len(report["problems"]) > MAX_PROBLEMS:
            print(f"    and {len(report['problems']) - MAX_PROBLEMS:,} more: --json lists all")
