"""``vlmtrain plan``: estimate what a recipe needs: parameters, tokens, FLOPs, GPU-hours, memory."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

from .common import take_config_dir, take_overrides


def add_arguments(parser: argparse.ArgumentParser) -> None:
    take_overrides(
        parser, "the same overrides as for training, and gpus=8 gpu_memory_gb=80 gpu_tflops=312 utilisation=0.4"
    )
    take_config_dir(parser)


def run(options: argparse.Namespace) -> None:
    from ..planning import plan_run
    from ..planning.plan import Machine
    from ..planning.show import show_plan
    from ..settings import compose
    from ..training.init_from import with_init_from

    line, numbers = [], {}
    for override in options.overrides:
        key, _, value = override.partition("=")
        if key not in Machine.__dataclass_fields__:
            line.append(override)
            continue
        try:
            numbers[key] = int(value) if key == "gpus" else float(value)
        except ValueError:
            raise ValueError(f"{override}: expected a number") from None
    settings, machine = compose(line, options.config_dir, own_keys=Machine.__dataclass_fields__), Machine(**numbers)
    settings = with_init_from(settings)
    plans = plan_run(settings, machine)
    if options.json:
        shown = [{**asdict(plan), "trainable": plan.trainable, "frozen": plan.frozen} for plan in plans]
        print(json.dumps({"machine": asdict(machine), "stages": shown}, indent=2))
    else:
        print(show_plan(settings, plans, machine))
