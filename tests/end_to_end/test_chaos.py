"""A run that is killed repeatedly at random moments is bit-identical to one that was never interrupted.

Two stages on two ranks, with gradient accumulation, packed rows, data workers and validation. Either all processes are
killed at once, as when the machine fails, or one rank, or only the launcher.
"""

from __future__ import annotations

import contextlib
import json
import random
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from ..conftest import data_overrides, metrics, train
from ..process_tools import assert_gone, kill, ranks_of, started, steps_of, tree, wait_for

SAVE_EVERY, VALIDATE_EVERY = 3, 4
SAME = (
    *("step", "loss", "grad_norm", "learning_rate", "samples", "tokens", "image_tokens", "target_tokens"),
    "padding_fraction",
)
VICTIMS = ("machine", "machine", "rank", "launcher")


def line(files, run_dir: Path, steps: dict[str, int]) -> list[str]:
    stages = {
        **{f"{stage}.max_steps": number for stage, number in steps.items()},
        **{f"{stage}.{key}": value for stage in steps for key, value in (
            ("batch_size", 8), ("micro_batch_size", 2), ("max_length", 128), ("save_every", SAVE_EVERY),
            ("validate_every", VALIDATE_EVERY), ("keep_best", "true"))},
        "instruct.layout": "packed",
    }  # fmt: skip
    return [
        *("recipe=llava_1_5", "mini=true", "engine=zero2", "precision=bf16", "workers=1", f"run_dir={run_dir}"),
        *data_overrides(files),
        *("validation.samples=4", "validation.final_samples=4", "validation.max_new_tokens=4"),
        *(f"stages.{key}={value}" for key, value in stages.items()),
    ]


class Moments:
    """When a run is killed: conditions on the contents of its folder, each followed by a random delay."""

    def __init__(self, run_dir: Path, stages: list[str], dice: random.Random):
        self.run_dir, self.stages, self.dice = run_dir, stages, dice

    def stage(self) -> str:
        """The stage that is running or comes next."""
        left = [stage for stage in self.stages if not (self.run_dir / stage / "summary.json").exists()]
        return left[0] if left else self.stages[-1]

    def reached(self, name: str) -> tuple[Callable[[], bool], float]:
        """The condition for a kind of moment, counted from now, and the seconds to wait after it."""
        stage, before, left = self.stage(), self.progress(), self.unfinished()
        steps = self.saved(stage) + self.dice.randint(1, 5)
        first = self.run_dir / self.stages[0] / "summary.json"
        conditions = {
            "starting": lambda: True,
            "step": lambda: (
                self.progress() != before and (self.stage() != stage or steps_of(self.run_dir, stage) >= steps)
            ),
            "saving": lambda: any(path.parent.name == "checkpoints" for path, _ in self.unfinished() - left),
            "validating": lambda: self.progress() != before and self.validates(),
            "writing the model": lambda: any(path.name == "model.partial" for path, _ in self.unfinished() - left),
            "between stages": first.exists,
        }
        longest = {"starting": 9.0, "step": 0.3, "saving": 0.01, "validating": 0.1, "between stages": 0.5}
        return conditions[name], self.dice.uniform(0, longest.get(name, 0.02))

    def progress(self) -> tuple:
        return tuple((file, file.stat().st_mtime_ns) for file in sorted(self.run_dir.glob("*/metrics.jsonl")))

    def unfinished(self) -> set[tuple[Path, int]]:
        """Folders that are being written, or whose writing was interrupted."""
        found = set()
        for pattern in ("*/*.partial", "*/checkpoints/*.partial"):
            for path in self.run_dir.glob(pattern):
                with contextlib.suppress(FileNotFoundError):
                    found.add((path, path.stat().st_ino))
        return found

    def saved(self, stage: str) -> int:
        """The step after which a stage resumes."""
        found = [int(path.name[5:]) for path in self.run_dir.glob(f"{stage}/checkpoints/step-??????")]
        return max(found, default=0)

    def validates(self) -> bool:
        steps = steps_of(self.run_dir, self.stage())
        scores = self.run_dir / self.stage() / "validation.jsonl"
        told = scores.read_text().count("\n") if scores.exists() else 0
        return steps > 0 and steps % VALIDATE_EVERY == 0 and told < steps // VALIDATE_EVERY

    def where(self, progress: tuple, left: set[tuple[Path, int]]) -> str:
        """What a killed run was doing, judged by its folder now and before."""
        new = {path for path, _ in self.unfinished() - left}
        if any(path.parent.name == "checkpoints" for path in new):
            return "saving"
        if any(path.name == "model.partial" for path in new):
            return "writing the model"
        if self.progress() == progress:
            return "starting"
        if any(path.name == "best.partial" for path in new) or self.validates():
            return "validating"
        return "between stages" if not steps_of(self.run_dir, self.stage()) else "step"


def strike(launcher: psutil.Popen, victim: str, dice: random.Random) -> None:
    """SIGKILL some of a run's processes; all of them must then end."""
    everyone = tree(launcher)
    ranks = ranks_of(launcher) if victim == "rank" else []
    if victim == "machine" or (victim == "rank" and not ranks):
        kill(everyone)
    elif victim == "launcher":
        launcher.kill()
        assert_gone(everyone, 30)
    else:
        dice.choice(ranks).kill()
        wait_for(lambda: launcher.poll() is not None, 120, "the launcher did not end")
        assert_gone(everyone, 30)


def killed_again_and_again(command: list[str], moments: Moments, plan: list[tuple[str, str]], log: Path) -> Counter:
    """Run, kill and restart until the run ends. Returns how often it was killed in each situation."""
    fell: Counter = Counter()
    for name, victim in plan:
        before = moments.progress(), moments.unfinished()
        reached, delay = moments.reached(name)
        with started(*command, ranks=2, log=log) as launcher:
            deadline = time.monotonic() + 600
            while not reached() and launcher.poll() is None and time.monotonic() < deadline:
                time.sleep(0.002)
            time.sleep(delay)
            code = launcher.poll()
            assert code is None, f"ended with {code} before it was killed ({name}):\n{log.read_text()[-4000:]}"
            strike(launcher, victim, moments.dice)
        fell[f"{moments.where(*before)}, {victim}"] += 1
    train(*command, ranks=2)
    return fell


def long_plan(dice: random.Random) -> list[tuple[str, str]]:
    plan = ["step"] * 10 + ["saving"] * 6 + ["validating"] * 4 + ["starting"] * 2
    dice.shuffle(plan)
    plan = [*plan[:8], "writing the model", "between stages", *plan[8:], "writing the model"]
    return [(name, dice.choice(VICTIMS)) for name in plan]


SHORT = [("saving", "machine"), ("writing the model", "launcher"), ("validating", "rank"), ("step", "machine")]


@pytest.mark.parametrize(
    "plan, steps",
    [
        pytest.param(SHORT, {"align": 4, "instruct": 14}, id="short"),
        pytest.param(None, {"align": 30, "instruct": 90}, id="long", marks=pytest.mark.slow),
    ],
)
def test_a_run_killed_anywhere_ends_like_an_uninterrupted_one(plan, steps, llava_files, tmp_path):
    dice = random.Random(8)
    plan = plan or long_plan(dice)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train(*line(llava_files, whole, steps), ranks=2)
    moments = Moments(broken, list(steps), dice)
    fell = killed_again_and_again(line(llava_files, broken, steps), moments, plan, tmp_path / "log")
    print(
        f"\n{sum(fell.values())} kills:", *(f"  {number:3} {where}" for where, number in sorted(fell.items())), sep="\n"
    )
    for stage in steps:
        found, wanted = (metrics(run, stage) for run in (broken, whole))
        assert [[record[key] for key in SAME] for record in found] == [[r[key] for key in SAME] for r in wanted]
        assert len(found) == steps[stage]
        for file in (
            "validation.jsonl",
            "bad_steps.jsonl",
            "answers.json",
            "model/vlmtrain.json",
            "best/vlmtrain.json",
        ):
            assert (broken / stage / file).read_bytes() == (whole / stage / file).read_bytes(), file
        summaries = [json.loads((run / stage / "summary.json").read_text()) for run in (broken, whole)]
        for key in ("parts", "validation", "data", "best", "skipped_samples", "skipped_steps"):
            assert summaries[0][key] == summaries[1][key], key
    left = [path for path in broken.rglob("*") if path.name == "checkpoints" or path.name.endswith(".partial")]
    assert not left
