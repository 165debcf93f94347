"""The runs of an ablation: each choice and seed in a folder of its own, in processes of their own.

OUT/shared/1f0c.../seed-0/     stages that come before any connector, once a seed, for all choices that agree on them
OUT/jobs/mlp/seed-0/           the run of one choice, with links to the shared stages
OUT/sweep/mlp/1/               short runs that choose a learning rate, if asked for
OUT/timing/mlp/                short runs that measure speed, for budget=wall
OUT/features/                  what the frozen encoder made of the pictures, for all of them
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

from ..data.records import BadSample
from ..data.sources import Source, build_source
from ..errors import nearest
from ..evaluation.scores import METRICS, Answer
from ..files import link_or_copy, make_folder, read_json, replace_text
from ..settings import Run, Stage, compose, flatten
from ..training.checks import check_run
from .budget import Undecided, decide
from .definition import Ablation, Choice

REFRESH_SECONDS = 1.0
# Keys that change how fast jobs run, or what they keep: a line with others of these goes on with the finished jobs.
FREE = ("workers", "wandb", "wandb_project", "wandb_model", "collective_timeout")
FREE_IN_STAGE = ("micro_batch_size", "save_every", "save_every_minutes", "keep_last")


def run_ablation(ablation: Ablation, show_progress: bool = True) -> list[tuple[Choice, str]]:
    """Run what is not finished. Returns the choices of which a job failed, and what it said; the others go on.

    Raises ValueError for what cannot work, before anything runs, and where what several jobs need has failed.
    """
    for choice in ablation.choices:
        _check_choice(ablation, choice)
    _check_same(ablation)
    with Runner(ablation, show_progress) as runner:
        runner.share()
        decided, failed = [], []
        for choice in ablation.choices:
            try:
                if choice.label not in ablation.decisions():
                    decisions = ablation.decisions() | {choice.label: decide(ablation, choice, runner)}
                    replace_text(ablation.decisions_file, json.dumps(decisions, indent=2) + "\n")
                decided.append(choice)
            except Undecided as error:
                failed += [(choice, str(error)) for _ in ablation.seeds]
        jobs = [(choice, seed) for seed in ablation.seeds for choice in decided]
        return [*failed, *(failure for failure in runner.at_once(runner.job, jobs) if failure)]


def _check_choice(ablation: Ablation, choice: Choice) -> None:
    """Raise ValueError for a choice whose jobs could not be compared, or whose sweep could find nothing."""
    run = ablation.settings(choice)
    check_run(run, ablation.ranks)
    last = run.wanted[-1]
    compared = [stage.name for stage in run.stages.values() if "connector" in stage.parts]
    if last.name not in compared:
        key = f"stages of recipe {run.name}, the last" if run.stage is None else "stage"
        others = f"expected one of {', '.join(compared)}" if compared else "nor has any other"
        raise ValueError(f"{key}={last.name}: it has no connector to compare; {others}")
    if not run.validates(last):
        key = f"{last.prefix}.validation" if last.validation is None else f"data.{last.validation}"
        raise ValueError(f"{key}=null: expected questions, whose answers an ablation compares after stage {last.name}")
    _check_metric(ablation.metric, run, last.validation)
    _check_sweep(ablation, choice, run)


def _check_metric(metric: str, run: Run, split: str) -> None:
    """Raise ValueError for a metric that no answer of the jobs will have."""
    named = run.validation.metrics
    computed = METRICS if named is None else ["exact_match", *named]
    known = {name: key for key in computed for name in METRICS[key].each([])}
    if metric not in known:
        names = ", ".join(known)
        raise ValueError(
            f"metric={metric}: expected one that each answer has of its own: {names}.{nearest(metric, known)}"
        )
    if metric == "exact_match":
        return  # whatever is asked
    judge = METRICS[known[metric]]
    source = build_source(run.data, split, (224, 224), run.seed)
    size = min(len(source), run.validation.final_samples or len(source))
    if not any(map(judge.recognised if named is None else judge.fits, _questions(source, size))):
        said = f"it needs {judge.needs}, and none of the {size} conversations of data.{split} has one"
        if any(map(judge.fits, _questions(source, size))):
            said += f"; validation.metrics=[{known[metric]}] takes answers as they are"
        raise ValueError(f"metric={metric}: {said}")


def _questions(source: Source, size: int) -> Iterator[Answer]:
    """Those of the first `size` conversations, not answered; broken records are told of by the jobs."""
    for index in range(size):
        with contextlib.suppress(BadSample):
            for turn in source[index].turns:
                if turn.role == "assistant":
                    yield Answer(index, 0, "", turn.text, "", turn.grading)


def _check_sweep(ablation: Ablation, choice: Choice, run: Run) -> None:
    shared = [stage.name for stage in run.before_connector()]
    own = [stage.name for stage in run.wanted if stage.name not in shared]
    for key, _ in ablation.sweep:
        top, _, rest = key.partition(".")
        stage = rest.partition(".")[0]
        if top == "stages" and stage not in own:
            why = "comes before the connector and is shared" if stage in shared else "does not run"
            raise ValueError(f"sweep.{key}: stage {stage} {why}; expected a key of one of {', '.join(own)}")
    for values in ablation.sweep_lines():
        check_run(compose([*ablation.line, *choice.line, *values]), ablation.ranks)


def _check_same(ablation: Ablation) -> None:
    """Hold the folder to the line it began with; more connectors and seeds may come, and `FREE` keys differ."""
    file = ablation.folder / "ablation.json"
    facts = {
        "line": _binding(ablation.line),
        "budget": ablation.budget,
        "reference": None if ablation.budget == "steps" else ablation.choices[0].label,
        "sweep": [[key, list(values)] for key, values in ablation.sweep],
        "sweep_steps": ablation.sweep_steps if ablation.sweep else None,
    }
    if file.exists():
        began = read_json(file)
        changed = sorted(set(_binding(began["line"])) ^ set(facts["line"]))
        changed += [f"{key}={began[key]}" for key in facts if key != "line" and began[key] != facts[key]]
        if changed:
            raise ValueError(f"{ablation.folder} began with another line ({', '.join(changed)}); set another run_dir")
    make_folder(ablation.folder, f"run_dir={ablation.folder}")
    replace_text(file, json.dumps(facts, indent=2) + "\n")


def _binding(line: Iterable[str]) -> list[str]:
    """The overrides that no job of the same ablation may have otherwise."""
    return sorted(override for override in line if not _is_free(override.partition("=")[0].lstrip("+~")))


def _is_free(key: str) -> bool:
    first, _, rest = key.partition(".")
    return first in FREE or (first == "stages" and rest.partition(".")[2] in FREE_IN_STAGE)


class Runner:
    """Starts the processes of jobs, at most ``ablation.jobs`` at once, and says how far they are."""

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
        """A function of each item, as many at once as there are to be jobs. Raises the first error."""
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
        """Where the shared stages of a choice are: those that agree on all they depend on have one folder."""
        settings = compose([*self.ablation.line, *choice.line])
        plain = dict(settings.composed)
        plain["stages"] = {stage.name: plain["stages"][stage.name] for stage in settings.before_connector()}
        apart = ("connector", "named", "run_dir", "seed")
        matters = [pair for pair in flatten(plain) if pair[0].partition(".")[0] not in apart and not _is_free(pair[0])]
        digest = hashlib.sha256(json.dumps(sorted(matters), default=str).encode()).hexdigest()
        return self.ablation.folder / "shared" / digest[:12] / f"seed-{seed}"

    def job(self, job: tuple[Choice, int]) -> tuple[Choice, str] | None:
        """One of the runs that are compared; if it fails, its choice and why."""
        choice, seed = job
        name, failure, has_run = f"{choice.label} seed {seed}", None, True
        try:
            has_run = self.run(choice, seed, self.ablation.job(choice, seed), self.ablation.line_of(choice))
        except ValueError as error:
            failure = choice, f"{name}: {error}"
        self.bar.update()
        number = next(self.numbers)
        if self.bar.disable and has_run:  # no terminal: a line a job
            sys.stderr.write(f"{number} of {self.bar.total} jobs: {name} {'failed' if failure else 'is finished'}\n")
        return failure

    def run(self, choice: Choice, seed: int, folder: Path, line: Sequence[str]) -> bool:
        """One run of all stages, from the shared ones on; whether any was left. Raises ValueError if it fails."""
        settings = self.ablation.settings(choice, seed)
        for name in (stage.name for stage in settings.before_connector()):
            if not (folder / name).exists():
                partial = folder / f"{name}.partial"
                shutil.rmtree(partial, ignore_errors=True)
                shutil.copytree(self.shared(choice, seed) / name, partial, copy_function=link_or_copy)
                partial.rename(folder / name)
        return self._start(line, seed, folder, choice.label, settings.wanted)

    def _start(self, line: Sequence[str], seed: int, folder: Path, name: str, stages: Sequence[Stage]) -> bool:
        """One training process, or several under torchrun, unless it is finished; whether it was not.

        Raises ValueError with its last words if it fails.
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
        """A place to run in: the environment with its share of devices and threads."""
        devices = self.slots.get()
        self.running[folder] = name
        environment = dict(os.environ)
        if devices is not None:
            environment["CUDA_VISIBLE_DEVICES"] = devices
        # more threads than cores wait for each other in every operation
        environment.setdefault("OMP_NUM_THREADS", threads_each(self.ablation.jobs * self.ablation.ranks))
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
    """The stage and step that a run has come to."""
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


def threads_each(processes: int) -> str:
    """Of torch's threads here, how many each of some processes has."""
    return str(max(1, torch.get_num_threads() // processes))


def device_slots(devices: Sequence[str], jobs: int, ranks: int) -> list[str | None]:
    """Devices for each of the jobs that run at once; None (all of them) where there are too few for one a process."""
    if len(devices) < jobs * ranks:
        return [None] * jobs
    return [",".join(devices[job * ranks : (job + 1) * ranks]) for job in range(jobs)]
