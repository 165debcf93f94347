"""A run: the stages of a recipe in order. Each stage starts from the model of the previous one."""

from __future__ import annotations

import shutil
from pathlib import Path

from ..distributed.world import Stopped, StopSignal, World
from ..evaluation.lmms_eval import Benchmarks
from ..reporting.card import write_card
from ..reporting.report import write_report
from ..runs.folder import RunFolder
from ..runs.provenance import provenance
from ..settings import Run
from .checks import check_run, check_stages
from .init_from import take_in
from .log import logger, set_up_logging
from .stage import train_stage
from .tracking import Trackers
from .watch import Watch


def train_run(run: Run, world: World) -> None:
    """Train all wanted stages that are not finished. Raises ValueError for errors that the user can fix."""
    check_run(run, world.size)
    folder, warnings = RunFolder(run.run_dir), []
    if world.is_main:
        unlocked = folder.lock()
        folder.check_same(run)
        start, _ = take_in(run, folder)
        check_stages(start, folder)
        if run.validation.lmms_eval:
            Benchmarks(run.validation.lmms_eval, run.validation.batch_size, run.validation.final_samples).load()
        changed = folder.write_config(run, provenance(run, world))
        warnings = [f"changed since this run was last started, so further steps may differ: {each}" for each in changed]
        warnings += [unlocked] if unlocked else []
    world.barrier()
    run, overruled = take_in(run, folder)
    set_up_logging(folder.root / "train.log" if world.is_main else None)
    for warning in [*warnings, *(overruled if world.is_main else ())]:
        logger.warning(warning)
    trackers = Trackers(run, folder.root, world.is_main)
    with Watch(run.collective_timeout, world.rank, world.size) as watch:
        _train_stages(run, folder, world, trackers, watch)
    trackers.close()
    if world.is_main:
        logger.info(f"report: {write_report(folder.root)}")


def _train_stages(run: Run, folder: RunFolder, world: World, trackers: Trackers, watch: Watch) -> None:
    stop = StopSignal()
    previous = Path(run.init_from) if run.init_from is not None else None
    for name, stage in run.stages.items():
        if folder.is_finished(name):
            if stage in run.wanted and world.is_main:
                logger.info(f"stage {name} is finished: {folder.model(name)}")
                # clean up and complete the stage if the run was killed just after finishing it
                shutil.rmtree(folder.checkpoints(name), ignore_errors=True)
                if not (folder.model(name) / "README.md").exists():
                    write_card(folder.root, name, folder.model(name))
        elif stage in run.wanted:
            if world.max([float(stop.received)])[0]:
                raise Stopped(f"stopped before stage {name}; run the same command to resume")
            summary = train_stage(run, stage, previous, folder, world, stop, trackers, watch)
            if world.is_main:
                logger.info(_result(summary))
                write_card(folder.root, name, folder.model(name))
                trackers.finish_stage(name, folder.stage(name), run.wandb_model)
                write_report(folder.root)
        if folder.is_finished(name):
            previous = folder.model(name)
            trackers.steps_before += folder.summary(name)["steps"]


def _result(summary: dict) -> str:
    text = f"stage {summary['stage']} done in {summary['seconds']:.0f} s"
    scores = summary["validation"]
    if scores:
        text += (
            f"; validation loss {scores['loss_at_start']:.3f} -> {scores['loss']:.3f}, exact match "
            f"{scores['exact_match']:.1%} of {scores['questions']} answers ({scores['blind_exact_match']:.1%} blind)"
        )
    for task, values in summary["lmms_eval"].items():
        text += f"\n  {task}: " + ", ".join(f"{name} {value:.4g}" for name, value in values.items())
    return text
