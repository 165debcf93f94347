"""Composes and plans each command once."""

from __future__ import annotations

import contextlib
import copy
import functools
import json
from unittest import mock

import pytest

from vlmtrain.planning.plan import plan_run
from vlmtrain.settings import compose


@pytest.fixture(scope="package", autouse=True)
def each_line_is_composed_and_planned_once():
    """Ablations compose the same settings and make the same plans over and over."""
    planned = {}

    @functools.cache
    def compose_once(overrides, **options):
        return compose(overrides, **options)

    def plan_once(run, machine):
        key = json.dumps({**run.composed, "run_dir": ""}, sort_keys=True), machine  # no plan depends on the folder
        if key not in planned:
            planned[key] = plan_run(run, machine)
        return copy.deepcopy(planned[key])

    with contextlib.ExitStack() as patches:
        for module in ("budget", "definition", "jobs", "runner"):
            target = f"vlmtrain.ablation.{module}.compose"
            patches.enter_context(mock.patch(target, lambda line, **options: compose_once(tuple(line), **options)))
        for module in ("budget", "results"):
            patches.enter_context(mock.patch(f"vlmtrain.ablation.{module}.plan_run", plan_once))
        yield
