"""The runs of an ablation. Each choice and seed has a separate folder and separate processes.

OUT/shared/1f0c.../seed-0/     stages before any connector, once per seed, for all choices that agree on them
OUT/jobs/mlp/seed-0/           the run of one choice, with links to the shared stages
OUT/sweep/mlp/1/               short runs that choose the swept values, if there is a sweep
OUT/timing/mlp/                short runs that measure speed, for budget=wall
OUT/features/                  the frozen encoder's cached features, for all runs
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from queue import SimpleQueue

import torch
from tqdm import tqdm

from ..files import link_or_copy
from ..settings import Stage, compose, flatten
from ..settings.free_keys import changes_no_result
from .definition import Ablation, Choice

REFRESH_SECONDS = 1.0


class Runner:
    """Starts the processes of jobs, at most ``ablation.jobs`` at once, and shows their progress."""

    def __init__(self, ablation: Ablation, show_progress: bool):
        self.ablation = ablation
        total = len(ablation.seeds) * len(ablation.choices)
        self.bar = tqdm(total=total, unit="job", disable=not show_progress)
        self.numbers = count(1)
        self.running: dict[Path, str] = {}
        self.slots: SimpleQueue[str | None] = SimpleQueue()
        for devices in device_slots(_visible_devices(), ablation.jobs, ablation.ranks):
            self.slots.put(devices)
        self.ended = threading.Event()
        self.watcher = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Runner:
        if not self.bar.disable:
            self.watcher.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.ended.set()
        self.bar.close()

    def at_once(self, function: Callable, items: Iterable) -> list:
        """Apply `function` to each item, at most ``ablation.jobs`` at once. Raises the first error."""
        with ThreadPoolExecutor(self.ablation.jobs) as pool:
            try:
                return list(pool.map(function, items))
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    def share(self) -> None:
        """Run the stages that come before any connector."""
        folders: dict[Path, tuple[Choice, int]] = {}
        for seed in self.ablation.seeds:
            for choice in self.ablation.choices:
                folders.setdefault(self.shared(choice, seed), (choice, seed))

        def run(item: tuple[Path, tuple[Choice, int]]) -> None:
            folder, (choice, seed) = item
            for stage in self.ablation.settings(choice, seed).before_connector():
                line = [*self.ablation.line, *choice.line, f"stage={stage.name}"]
                self._start(line, seed, folder, "shared", [stage])

        self.at_once(run, folders.items())

    def shared(self, choice: Choice, seed: int) -> Path:
        """Folder of a choice's shared stages; choices that agree on all that these depend on share it."""
        settings = compose([*self.ablation.line, *choice.line])
        plain = dict(settings.composed)
        plain["stages"] = {stage.name: plain["stages"][stage.name] for stage in settings.before_connector()}
        apart = ("connector", "named", "run_dir", "seed")
        matters = [
            pair for pair in flatten(plain) if pair[0].partition(".")[0] not in apart and not changes_no_result(pair[0])
        ]
        digest = hashlib.sha256(json.dumps(sorted(matters), default=str).encode()).hexdigest()
        return self.ablation.folder / "shared" / digest[:12] / f"seed-{seed}"

    def job(self, job: tuple[Choice, int]) -> tuple[Choice, str] | None:
        """Run one of the jobs that are compared. Returns its choice and the reason if it fails."""
        choice, seed = job
        name, failure, has_run = f"{choice.label} seed {seed}", None, True
        try:
            has_run = self.run(choice, seed, self.ablation.job(choice, seed), self.ablation.line_of(choice))
        except ValueError as error:
            failure = choice, f"{name}: {error}"
        self.bar.update()
        number = next(self.numbers)
        if self.bar.disable and has_run:  # no terminal: one line per job
            sys.stderr.write(f"{number} of {self.bar.total} jobs: {name} {'failed' if failure else 'finished'}\n")
        return failure

    def run(self, choice: Choice, seed: int, folder: Path, line: Sequence[str]) -> bool:
        """Run all stages after the shared ones. Returns whether any was left. Raises ValueError if the run fails."""
        settings = self.ablation.settings(choice, seed)
        for name in (stage.name for stage in settings.before_connector()):
            if not (folder / name).exists():
                partial = folder / f"{name}.partial"
                shutil.rmtree(partial, ignore_errors=True)
                shutil.copytree(self.shared(choice, seed) / name, partial, copy_function=link_or_copy)
                partial.rename(folder / name)
        return self._start(line, seed, folder, choice.label, settings.wanted)

    def _start(self, line: Sequence[str], seed: int, folder: Path, name: str, stages: Sequence[Stage]) -> bool:
        """Run one training process, or several under torchrun, unless the stages are finished.

        Returns whether anything ran. Raises ValueError with the last error of the output if it fails.
        """
        if _are_finished(folder, stages):
            return False
        folder.mkdir(parents=True, exist_ok=True)
        launcher = [sys.executable, "-m", "vlmtrain.distributed.processes"]
        if self.ablation.ranks > 1:
            ranks = ["--nproc_per_node", str(self.ablation.ranks)]
            launcher += ["torch.distributed.run", "--standalone", *ranks, "-m"]
        own_cache = any(override.partition("=")[0].lstrip("+") == "features.cache" for override in line)
        cache = [] if own_cache else [f"features.cache={self.ablation.folder}/features"]
        command = [*launcher, "vlmtrain.train", *line, f"seed={seed}", f"run_dir={folder}", *cache]
        with self._slot(folder, f"{name} seed {seed}") as environment, open(folder / "output.log", "ab") as log:
            code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=environment).returncode
        if code or not _are_finished(folder, stages):
            words = (folder / "output.log").read_text(errors="replace").strip().splitlines()
            said = next((w for w in reversed(words) if "error" in w.lower()), words[-1] if words else "nothing")
            raise ValueError(f"a job did not finish (exit {code}): {said} ({folder / 'output.log'})")
        return True

    @contextlib.contextmanager
    def _slot(self, folder: Path, name: str) -> Iterator[dict[str, str]]:
        """Wait for a free slot. Yields the environment with its share of devices and threads."""
        devices = self.slots.get()
        self.running[folder] = name
        environment = dict(os.environ)
        if devices is not None:
            environment["CUDA_VISIBLE_DEVICES"] = devices
        # with more threads than cores, threads wait for each other in every operation
        processes = self.ablation.jobs * self.ablation.ranks
        environment.setdefault("OMP_NUM_THREADS", str(max(1, torch.get_num_threads() // processes)))
        try:
            yield environment
        finally:
            del self.running[folder]
            self.slots.put(devices)

    def _watch(self) -> None:
        while not self.ended.wait(REFRESH_SECONDS):
            self.bar.set_postfix_str(" | ".join(f"{name} {_where(path)}" for path, name in list(self.running.items())))


def _are_finished(folder: Path, stages: Sequence[Stage]) -> bool:
    return all((folder / stage.name / "summary.json").exists() for stage in stages)


def _where(folder: Path) -> str:
    """The stage and step that a run has reached."""
    files = sorted(folder.glob("*/metrics.jsonl"), key=lambda file: file.stat().st_mtime)
    if not files:
        return ""
    steps = files[-1].read_bytes().count(b"\n")
    return f"{files[-1].parent.name} {steps}"


def _visible_devices() -> list[str]:
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [device for device in named.split(",") if device]
    return [str(device) for device in range(torch.cuda.device_count())]


def device_slots(devices: Sequence[str], jobs: int, ranks: int) -> list[str | None]:
    """Devices for each of the jobs that run at once; None (all devices) if there are fewer devices than processes."""
    if len(devices) < jobs * ranks:
        return [None] * jobs
    return [",".join(devices[job * ranks : (job + 1) * ranks]) for job in range(jobs)]
