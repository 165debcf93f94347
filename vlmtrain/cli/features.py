"""``vlmtrain features``: precompute the frozen encoder's features of a recipe's images, for features.cache."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict

from .common import MAX_PROBLEMS, take_config_dir, take_overrides


def add_arguments(parser: argparse.ArgumentParser) -> None:
    take_overrides(parser, "the same overrides as for training, with features.cache=DIR")
    take_config_dir(parser)


def run(options: argparse.Namespace) -> None:
    from ..settings import compose
    from ..training.feature_filling import fill_cache
    from ..training.init_from import with_init_from

    settings = with_init_from(compose(options.overrides, options.config_dir))
    filled = fill_cache(settings, show_progress=sys.stderr.isatty())
    if options.json:
        print(json.dumps({name: asdict(done) for name, done in filled.items()}, indent=2))
    else:
        for name, done in filled.items():
            print(f"stage {name}: {done.computed:,} images computed, {done.known:,} already cached")
            for problem in done.problems[:MAX_PROBLEMS]:
                print(f"    {problem}")
    if any(done.problems for done in filled.values()):
        raise SystemExit(1)
