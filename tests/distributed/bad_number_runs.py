"""Trains with non-finite numbers on one rank, all cases in one process group. Run by test_bad_numbers.py:

python bad_number_runs.py FOLDER ENGINE-PRECISION...

The ID of a sample determines what happens in its micro-batch: either the loss is NaN, or the loss is finite and its
gradient is infinite.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from vlmtrain.distributed.world import Stopped, leave_world
from vlmtrain.objectives.language_modelling import LanguageModelling
from vlmtrain.settings import compose
from vlmtrain.training import run, step
from vlmtrain.training.bad_steps import BadSteps
from vlmtrain.training.engine.joining import join_world

STEPS = 6
LOSS, GRADIENT, HIGH = "instruct-3", "instruct-9", "instruct-12"
CASES = ["zero0-fp32", "zero1-fp32", "zero2-fp32", "zero3-fp32", "zero1-bf16", "zero3-bf16"]


class BadGradient(torch.autograd.Function):
    @staticmethod
    def forward(context, loss: Tensor) -> Tensor:
        return loss.clone()

    @staticmethod
    def backward(context, gradient: Tensor) -> Tensor:
        return gradient * float("inf")


def line(folder: Path, *more: str) -> list[str]:
    return [
        *("recipe=quickstart", "stage=instruct", "stages.instruct.fresh=[vision,connector,llm]", "workers=0"),
        *("data.instruct.size=16", "data.validation=null", f"run_dir={folder}", f"stages.instruct.max_steps={STEPS}"),
        *("stages.instruct.train.vision=1e-3", "stages.instruct.batch_size=4", "stages.instruct.micro_batch_size=1"),
        *more,
    ]


@dataclass
class Wrong:
    """The faults to inject: in micro-batches with these samples, or in all on the last rank, after `after` steps."""

    samples: set[str] = field(default_factory=set)
    everywhere: bool = False
    after: int = 0
    micro_batches: int = 4
    calls: int = 0

    def is_now(self) -> bool:
        self.calls += 1
        return self.calls > self.after * self.micro_batches


def go_wrong(wrong: Wrong) -> None:
    sound = LanguageModelling.forward

    def forward(self, model, batch, features):
        loss, now = sound(self, model, batch, features), wrong.is_now()
        found = wrong.samples & set(batch.ids) if now else set()
        if LOSS in found or (now and wrong.everywhere and world.rank == world.size - 1):
            loss = loss * float("nan")
        if GRADIENT in found:
            loss = BadGradient.apply(loss)
        return loss * 50 if HIGH in found else loss

    LanguageModelling.forward = forward


def watch(found: list[dict]) -> None:
    """Record for each step whether the complete training state is unchanged."""
    update = step.StepRunner._update

    def watched(self, number, data, *more):
        engine = self.engine
        before, updates = engine.training_state.share(0, 1), engine.training_state.updates
        try:
            return update(self, number, data, *more)
        finally:
            after = engine.training_state.share(0, 1)
            same = all(torch.equal(after[name], tensor) for name, tensor in before.items())
            found.append({"step": number + 1, "same": same, "updates": engine.training_state.updates != updates})

    step.StepRunner._update = watched


def interrupt_at_bad_steps() -> None:
    count = BadSteps.count

    def counted(self, step, loss, fault, samples):
        count(self, step, loss, fault, samples)
        if fault:
            os.kill(os.getpid(), signal.SIGUSR1)

    BadSteps.count = counted


def train(folder: Path, world, *more: str) -> str:
    """Train to the end, resuming whenever the run stops. Returns the error message if it fails."""
    while True:
        try:
            run.train_run(compose(line(folder, *more)), world)
            return ""
        except Stopped:
            continue
        except ValueError as error:
            return str(error)


if __name__ == "__main__":
    folder, cases = Path(sys.argv[1]), sys.argv[2:]
    world = join_world()
    found: list[dict] = []
    report: dict = {}
    wrong = Wrong({LOSS, GRADIENT}, micro_batches=4 // world.size)
    go_wrong(wrong)
    watch(found)
    for case in cases:
        engine, precision = case.split("-")
        more = [f"engine={engine}", f"precision={precision}"]
        more += ["engine.parameter_persistence_threshold=0"] if engine == "zero3" else []
        found.clear()
        train(folder / case, world, *more)
        report[case] = list(found)
    keep = ("stages.instruct.save_every=1", "stages.instruct.keep_last=1", "stages.instruct.max_steps=28")
    wrong.samples, wrong.after, wrong.calls = {HIGH}, 22, 0
    report["spikes"] = train(folder / "spikes", world, "bad_steps.skip_spikes=true", *keep)
    wrong.everywhere, wrong.after, wrong.calls = True, 3, 0
    report["stopped"] = train(folder / "stopped", world, "bad_steps.in_a_row=4", *keep)
    wrong.samples, wrong.everywhere, wrong.after = {LOSS, GRADIENT}, False, 0
    if world.size > 1:
        interrupt_at_bad_steps()
        train(folder / "interrupted", world, "engine=zero1", "precision=bf16")
        # a new engine is built between bad steps
        later = (
            "stages.instruct.train.vision=null",
            "stages.instruct.groups=[{match: vision, lr: 1e-3, from_step: 6}]",
        )
        wrong.everywhere, wrong.after, wrong.calls = True, 3, 0
        report["stopped in between"] = train(folder / "between", world, "bad_steps.in_a_row=4", *later, *keep)
    if world.is_main:
        (folder / "report.json").write_text(json.dumps(report))
    leave_world()
