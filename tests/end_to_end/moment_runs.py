"""A training run that signals itself at an exact moment. Run by test_exact_moments.py:

python moment_runs.py MOMENT... -- KEY=VALUE...

SIGNAL@FILE:STEP     right after the line of a step in metrics.jsonl or validation.jsonl
SIGNAL@NAME:CALL     at the start of that call (counted from 1) of one of CALLS
clock                the clock for checkpoints advances by two seconds after each step, and only then
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from types import SimpleNamespace

import wandb

from vlmtrain.evaluation.validation import Validator
from vlmtrain.settings import compose
from vlmtrain.train import train
from vlmtrain.training import checkpoint, model_folder
from vlmtrain.training.metrics import Metrics

CALLS = {"scores": (Validator, "scores"), "write_manifest": (model_folder, "write_manifest"), "wandb": (wandb, "init")}
SECONDS_A_STEP = 2.0


def after_line(file: str, act: Callable[[int], None]) -> None:
    write = Metrics.write

    def written(self, record):
        write(self, record)
        if self._file.name.endswith(f"/{file}"):
            act(record["step"])

    Metrics.write = written


def as_call_begins(owner: object, name: str, act: Callable[[int], None]) -> None:
    begin, calls = getattr(owner, name), []

    def called(*values, **named):
        calls.append(name)
        act(len(calls))
        return begin(*values, **named)

    setattr(owner, name, called)


def strike(moment: str) -> None:
    name, _, where = moment.partition("@")
    place, _, number = where.partition(":")

    def act(now: int) -> None:
        if now == int(number):
            os.kill(os.getpid(), getattr(signal, name))

    as_call_begins(*CALLS[place], act) if place in CALLS else after_line(place, act)


def stop_the_clock() -> None:
    steps: list[int] = []
    after_line("metrics.jsonl", steps.append)
    checkpoint.time = SimpleNamespace(monotonic=lambda: SECONDS_A_STEP * len(steps))


if __name__ == "__main__":
    end = sys.argv.index("--")
    for moment in sys.argv[1:end]:
        stop_the_clock() if moment == "clock" else strike(moment)
    train(compose(sys.argv[end + 1 :]))
