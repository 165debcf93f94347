"""A run: the stages of a recipe, one after the other, each from the model that the one before left."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from ..errors import nearest
from ..report import write_report
from ..world import StopSignal, World
from .assembly import DTYPES, training_rates
from .metrics import WandB, logger, set_up_logging
from .run_folder import RunFolder
from .stage import split_batch, train_stage


def train_run(settings: DictConfig, world: World) -> None:
    """Train all stages that are not finished, or only ``settings.stage``. Raises ValueError for users' mistakes."""
    check_settings(settings, world.size)
    folder = RunFolder(settings.run_dir)
    if world.is_main:
        folder.lock()
        folder.check_same(settings)
        folder.write_config(settings)
    set_up_logging(folder.root / "train.log" if world.is_main else None)
    stop = StopSignal()
    wandb = WandB(
        settings.wandb if world.is_main else "disabled",
        settings.wandb_project,
        folder.root,
        OmegaConf.to_container(settings),
    )
    previous = Path(settings.init_from) if settings.init_from is not None else None
    for name in settings.stages:
        wanted = settings.stage in (None, name)
        if folder.is_finished(name):
            if wanted and world.is_main:
                logger.info(f"stage {name} is finished: {folder.model(name)}")
        elif wanted:
            summary = train_stage(settings, name, previous, folder, world, stop, wandb)
            if world.is_main:
                logger.info(_result(summary))
                write_report(folder.root)
        if folder.is_finished(name):
            previous = folder.model(name)
    wandb.close()
    if world.is_main:
        logger.info(f"report: {write_report(folder.root)}")


def check_settings(settings: DictConfig, world_size: int) -> None:
    """Raise ValueError for what cannot work, naming the key, before anything is loaded or written."""
    for key, allowed in (
        ("precision", tuple(DTYPES)),
        ("on_bad_sample", ("raise", "skip")),
        ("wandb", ("disabled", "offline", "online")),
    ):
        if settings[key] not in allowed:
            raise ValueError(f"{key}={settings[key]}: expected one of {', '.join(allowed)}")
    if settings.features.cache != "off":
        raise ValueError(f"features.cache={settings.features.cache}: this version caches no features; use off")
    if settings.stage is not None and settings.stage not in settings.stages:
        raise ValueError(
            f"unknown stage '{settings.stage}'.{nearest(settings.stage, settings.stages)} "
            f"The recipe's stages: {', '.join(settings.stages)}"
        )
    for name, stage in settings.stages.items():
        training_rates(settings, name)
        split_batch(stage, name, world_size)
        if stage.layout != "padded":
            raise ValueError(f"stages.{name}.layout={stage.layout}: this version has padded only")


def _result(summary: dict) -> str:
    text = f"stage {summary['stage']} done in {summary['seconds']:.0f} s"
    scores = summary["validation"]
    if scores:
        text += (
            f"; validation loss {scores['loss_at_start']:.3f} -> {scores['loss']:.3f}, exact match "
            f"{scores['exact_match']:.1%} of {scores['questions']} answers ({scores['blind_exact_match']:.1%} blind)"
        )
    return text
