"""Steps for an equal budget (steps, samples, FLOPs or seconds), and sweeps that tune each choice separately."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ..planning.plan import Machine, StagePlan, plan_run
from ..runs.records import read_records, read_summary
from ..settings import compose
from .definition import Ablation, Choice
from .runner import Runner

TIMED_STEPS, LEFT_OUT = 24, 8
"""Steps of a timing run, and how many of the first are not counted."""


class Undecided(ValueError):
    """Runs that should determine a choice's steps or swept values have failed."""


def decide(ablation: Ablation, choice: Choice, runner: Runner) -> dict:
    """Determine the overrides that budget and sweep add to a choice's own.

    Returns ``{"line": overrides, "sweep": {values: validation loss}}``. Raises Undecided.
    """
    steps = _equal_steps(ablation, choice, runner)
    line = [f"stages.{stage}.max_steps={number}" for stage, number in steps.items()]
    if not ablation.sweep:
        return {"line": line, "sweep": {}}
    combinations = ablation.sweep_lines()
    losses = _sweep(ablation, choice, runner, line, combinations)
    best = int(np.argmin(losses))
    if not math.isfinite(losses[best]):
        raise Undecided(f"{choice.label}: no run of the sweep finished; see {ablation.folder / 'sweep'}")
    found = {" ".join(values): loss for values, loss in zip(combinations, losses) if math.isfinite(loss)}
    return {"line": [*line, *combinations[best]], "sweep": found}


def _equal_steps(ablation: Ablation, choice: Choice, runner: Runner) -> dict[str, int]:
    """By stage with a connector, the steps that use as much as the recipe's with the first choice; {} for `steps`."""
    first = ablation.choices[0]
    if ablation.budget == "steps" or choice == first:
        return {}
    own, reference = _plans(ablation, choice), _plans(ablation, first)
    for name, plan in reference.items():
        if plan.steps is None:
            raise ValueError(f"budget={ablation.budget} needs the steps of stage {name}: set stages.{name}.max_steps")
    if ablation.budget == "samples":
        return {name: _whole(reference[name].steps * reference[name].batch_size / own[name].batch_size) for name in own}
    if ablation.budget == "flops":
        return {
            name: _whole(reference[name].flops / (own[name].flops_per_sample * own[name].batch_size)) for name in own
        }
    timed_first = _seconds_per_step(ablation, first, runner)
    try:
        timed = _seconds_per_step(ablation, choice, runner)
    except ValueError as error:
        raise Undecided(f"{choice.label}: {error}") from None
    return {name: _whole(reference[name].steps * timed_first[name] / timed[name]) for name in own}


def _plans(ablation: Ablation, choice: Choice, line: Sequence[str] = ()) -> Mapping[str, StagePlan]:
    """By name, the stages with a connector. line: overrides in addition to the choice's own."""
    plans = plan_run(compose([*ablation.line, *choice.line, *line]), Machine())
    return {plan.name: plan for plan in plans if "connector" in plan.parts}


def _whole(steps: float) -> int:
    return max(1, round(steps))


def _seconds_per_step(ablation: Ablation, choice: Choice, runner: Runner) -> dict[str, float]:
    """Median seconds per step, by stage, measured in a separate short run while no other job runs.

    The first choice runs once before that, so that all timed runs find the frozen features in the cache.
    """
    for number, who in enumerate((ablation.choices[0], choice)):
        folder = ablation.folder / "timing" / (who.folder if number else "warm-up")
        _short_run(ablation, who, runner, folder, [], TIMED_STEPS)
    seconds = {}
    for name in _plans(ablation, choice):
        records = read_records(folder / name / "metrics.jsonl")
        seconds[name] = float(np.median([record["step_seconds"] for record in records[LEFT_OUT:] or records]))
    return seconds


def _sweep(
    ablation: Ablation, choice: Choice, runner: Runner, line: list[str], combinations: list[list[str]]
) -> list[float]:
    """Validation loss of a short run for each combination of values; infinite if the run fails or diverges."""
    *_, last = _plans(ablation, choice)

    def loss(item: tuple[int, list[str]]) -> float:
        number, values = item
        folder = ablation.folder / "sweep" / choice.folder / str(number)
        try:
            _short_run(ablation, choice, runner, folder, [*line, *values], ablation.sweep_steps)
        except ValueError:
            return math.inf
        found = read_summary(folder / last)["validation"]["loss"]
        return found if math.isfinite(found) else math.inf

    return runner.at_once(loss, enumerate(combinations))


def _short_run(ablation: Ablation, choice: Choice, runner: Runner, folder: Path, line: list[str], steps: int) -> None:
    """Run the first seed with at most `steps` steps in each stage that has a connector."""
    planned = {name: plan.steps for name, plan in _plans(ablation, choice, line).items()}
    short = [f"stages.{name}.max_steps={min(steps, own or steps)}" for name, own in planned.items()]
    runner.run(choice, ablation.seeds[0], folder, [*ablation.line, *choice.line, *line, *short])
