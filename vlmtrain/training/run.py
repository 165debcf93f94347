"""A run: the stages of a recipe, one after the other, each from the model that the one before left."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from ..card import write_card
from ..data.images import FITS
from ..data.loader import LAYOUTS, split_batch
from ..data.mixture import Mixture
from ..data.records import BadSample
from ..data.sources import build_source, first_problems
from ..data.templates import check_fallback
from ..errors import nearest
from ..evaluation.benchmarks import Benchmarks, check_tasks
from ..evaluation.metrics import check_metrics
from ..fingerprints import fingerprint
from ..kinds import check_stage_kinds, check_words
from ..model.attention import attend_in_segments
from ..model.llm import check_vocabulary, choose_attention
from ..model.parts import connector_skeleton, is_model_folder, read_manifest
from ..numbers import RUN, STAGE, VALIDATION, check_numbers
from ..objectives import OBJECTIVES
from ..report import write_report
from ..run_files import read_json
from ..world import Stopped, StopSignal, World
from .adapters import check_adapters
from .assembly import (
    DTYPES,
    build_processor,
    build_skeleton,
    build_tokenizer,
    check_bert,
    check_origins,
    check_widths,
    picture_size,
)
from .handover import adopt_connector, builds_anew, check_names, overruled_fit, tensors_taken
from .metrics import WandB, logger, set_up_logging
from .optimizer import Schedule
from .provenance import provenance
from .run_folder import RunFolder, write_json
from .stage import train_stage
from .trainable import check_starts, trained_groups, training_rates
from .watch import Watch


def train_run(settings: DictConfig, world: World) -> None:
    """Train all stages that are not finished, or only ``settings.stage``. Raises ValueError for users' mistakes."""
    check_settings(settings, world.size)
    folder, warnings = RunFolder(settings.run_dir), []
    if world.is_main:
        unlocked = folder.lock()
        folder.check_same(settings)
        start, _ = take_in(settings, folder)
        check_stages(start, folder)
        if settings.validation.lmms_eval:
            Benchmarks.from_options(settings.validation).load()
        changed = folder.write_config(settings, provenance(settings, world))
        warnings = [f"not as when the run was here last, so further steps may differ: {each}" for each in changed]
        warnings += [unlocked] if unlocked else []
    world.barrier()
    settings, overruled = take_in(settings, folder)
    set_up_logging(folder.root / "train.log" if world.is_main else None)
    for warning in [*warnings, *(overruled if world.is_main else ())]:
        logger.warning(warning)
    wandb = WandB(
        settings.wandb if world.is_main else "disabled",
        settings.wandb_project,
        folder.root,
        OmegaConf.to_container(settings),
    )
    with Watch(settings.collective_timeout, world.rank, world.size) as watch:
        _train_stages(settings, folder, world, wandb, watch)
    wandb.close()
    if world.is_main:
        logger.info(f"report: {write_report(folder.root)}")


def _train_stages(settings: DictConfig, folder: RunFolder, world: World, wandb: WandB, watch: Watch) -> None:
    stop = StopSignal()
    previous = Path(settings.init_from) if settings.init_from is not None else None
    for name in settings.stages:
        wanted = settings.stage in (None, name)
        if folder.is_finished(name):
            if wanted and world.is_main:
                logger.info(f"stage {name} is finished: {folder.model(name)}")
                # what a run that was killed just then has left, and left out
                shutil.rmtree(folder.checkpoints(name), ignore_errors=True)
                if not (folder.model(name) / "README.md").exists():
                    write_card(folder.root, name, folder.model(name))
        elif wanted:
            if world.max([float(stop.received)])[0]:
                raise Stopped(f"stopped before stage {name}; the same line goes on from here")
            summary = train_stage(settings, name, previous, folder, world, stop, wandb, watch)
            if world.is_main:
                logger.info(_result(summary))
                write_card(folder.root, name, folder.model(name))
                wandb.finish_stage(name, folder.stage(name), settings.wandb_model)
                write_report(folder.root)
        if folder.is_finished(name):
            previous = folder.model(name)
            wandb.steps_before += folder.summary(name)["steps"]


def take_in(settings: DictConfig, folder: RunFolder) -> tuple[DictConfig, list[str]]:
    """The settings with what `init_from` decides, and what of them that overrules (see `adopt_connector`).

    A published model becomes a model folder in the run's own: the first call imports it (see
    `vlmtrain.interop.importing`). Raises ValueError naming file, tensor and expectation.
    """
    finished = [name for name in settings.stages if folder.is_finished(name)]
    settings, overruled = adopt_connector(_imported(settings, folder), finished)
    return settings, [*overruled, *overruled_fit(settings, finished)]


def _imported(settings: DictConfig, folder: RunFolder) -> DictConfig:
    source = settings.init_from and Path(settings.init_from)
    if not source or not (source.is_file() or ((source / "config.json").exists() and not is_model_folder(source))):
        return settings
    parts = {}
    if source.is_file():  # a projector alone: the line names what it was trained with
        parts = {"llm": settings.llm.get("path"), "template": settings.llm.get("chat_template")}
        parts["vision"] = settings.vision.path if settings.vision.provider == "hf" else None
    target, record = folder.root / "imported", folder.root / "imported.json"
    wanted = {"source": str(source.resolve()), **parts, "fingerprint": fingerprint(source)}
    if not (target.exists() and record.exists() and read_json(record) == wanted):
        from ..interop.importing import import_model

        record.unlink(missing_ok=True)
        shutil.rmtree(target, ignore_errors=True)
        import_model(source, target, **parts)
        write_json(record, wanted)
    return OmegaConf.merge(settings, {"init_from": str(target)})


def check_settings(settings: DictConfig, world_size: int) -> None:
    """Raise ValueError for what cannot work, naming the key, before anything is loaded or written."""
    for key, allowed in (
        ("precision", tuple(DTYPES)),
        ("on_bad_sample", ("raise", "skip")),
        ("wandb", ("disabled", "offline", "online")),
    ):
        if settings[key] not in allowed:
            raise ValueError(f"{key}={settings[key]}: expected one of {', '.join(allowed)}")
    if settings.features.dtype not in (None, "bf16"):
        raise ValueError(f"features.dtype={settings.features.dtype}: expected null or bf16")
    if not isinstance(settings.compile, bool):
        raise ValueError(f"compile={settings.compile}: expected true or false")
    attention = str(settings.llm.attn_implementation)
    if attention.startswith("flash_attention") and settings.precision == "fp32":
        raise ValueError(f"llm.attn_implementation={attention} has no fp32: set precision=bf16")
    check_numbers(settings, RUN | VALIDATION)
    check_metrics(settings.validation.metrics)
    check_tasks(settings.validation.lmms_eval, settings.engine.zero_stage == 3 and world_size > 1)
    if settings.stage is not None and settings.stage not in settings.stages:
        raise ValueError(
            f"unknown stage '{settings.stage}'.{nearest(settings.stage, settings.stages)} "
            f"The recipe's stages: {', '.join(settings.stages)}"
        )
    _check_switch(settings, "bad_steps.skip_spikes")
    check_words(settings.llm.new_tokens, "llm.new_tokens")
    check_fallback(settings.llm.chat_template, "llm.chat_template")
    for part in ("vision", "llm"):
        if "trust_remote_code" in settings[part]:
            _check_switch(settings, f"{part}.trust_remote_code")
    for name, stage in settings.stages.items():
        check_stage_kinds(stage, f"stages.{name}.")
        check_numbers(stage, STAGE, f"stages.{name}.")
        if stage.keep_best and (stage.validate_every is None or stage.validation is None):
            raise ValueError(f"stages.{name}.keep_best=true needs stages.{name}.validate_every and validation")
        if stage.image_fit not in FITS:
            raise ValueError(f"stages.{name}.image_fit={stage.image_fit}: expected one of {', '.join(FITS)}")
        betas = stage.optimizer.betas
        if len(betas) != 2 or not all(isinstance(beta, int | float) and 0 <= beta < 1 for beta in betas):
            raise ValueError(f"stages.{name}.optimizer.betas={betas}: expected two numbers from 0, below 1")
        if stage.objective not in OBJECTIVES:
            raise ValueError(f"stages.{name}.objective={stage.objective}: expected one of {', '.join(OBJECTIVES)}")
        absent = [part for part in OBJECTIVES[stage.objective].needs if part not in stage.parts]
        if absent:
            raise ValueError(
                f"stages.{name}.objective={stage.objective} needs the part {absent[0]}: add it to stages.{name}.parts"
            )
        rates = training_rates(stage, name)
        check_adapters(stage, name)
        check_names(stage, name)
        rates |= {group["match"]: float(group["lr"]) for group in stage.groups if group["lr"] is not None}
        Schedule.from_config(stage.schedule, 1, rates, f"stages.{name}.")
        _check_layout(stage, name, world_size)


def _check_switch(settings: DictConfig, key: str) -> None:
    value = OmegaConf.select(settings, key)
    if not isinstance(value, bool):
        raise ValueError(f"{key}={value}: expected true or false")


def _check_layout(stage: DictConfig, name: str, world_size: int) -> None:
    if stage.layout not in LAYOUTS:
        raise ValueError(f"stages.{name}.layout={stage.layout}: expected one of {', '.join(LAYOUTS)}")
    if stage.pack_by not in (None, "source") or (stage.pack_by and stage.layout != "packed"):
        raise ValueError(f"stages.{name}.pack_by={stage.pack_by}: expected null, or source where layout=packed")
    compares = OBJECTIVES[stage.objective].compares_samples
    if stage.layout == "packed":
        if compares or "llm" not in stage.parts:
            raise ValueError(
                f"stages.{name}.layout=packed is for language modelling: objective={stage.objective} is not"
            )
        if stage.batch_size < 1:
            raise ValueError(f"stages.{name}.batch_size={stage.batch_size}: must be positive")
        return
    accumulation, _ = split_batch(stage, name, world_size)
    if not compares:
        return
    comparing = f"objective={stage.objective} compares the samples of a step with each other"
    if accumulation > 1:
        raise ValueError(f"{comparing}, so a step must be one micro-batch a rank: unset stages.{name}.micro_batch_size")
    if stage.batch_size < 2:
        raise ValueError(f"{comparing}, but stages.{name}.batch_size={stage.batch_size}")
    if stage.image_fit == "tiles":
        raise ValueError(f"{comparing}, a picture with a text: stages.{name}.image_fit=tiles cannot be; use squash")


def check_stages(settings: DictConfig, folder: RunFolder) -> None:
    """Raise ValueError for a stage ahead whose parts, lengths or data cannot work; no weights are loaded."""
    tokenizer = build_tokenizer(settings)
    handed_on = set(read_manifest(Path(settings.init_from))) if settings.init_from is not None else set()
    given = set(handed_on)  # parts as `init_from` has them, not as the settings do
    connector = connector_skeleton(Path(settings.init_from)) if settings.init_from is not None else None
    for name, stage in settings.stages.items():
        if settings.stage in (None, name) and not folder.is_finished(name):
            check_origins(settings, name, handed_on)
            parts = build_skeleton(settings, name, tokenizer)
            if connector is not None and "connector" in parts and "connector" not in stage.fresh:
                if builds_anew(stage):
                    tensors_taken(parts["connector"], connector, stage, name)
                else:
                    parts["connector"] = connector
                    check_widths(settings, name, parts, given - set(stage.fresh))
            given -= set(stage.fresh)
            connector = parts.get("connector", connector)
            groups = trained_groups(stage, name, parts)
            check_bert(settings, name, parts)
            if "llm" in parts:
                choose_attention(parts["llm"], settings.llm.attn_implementation)
            if "llm" in parts and (settings.init_from is None or "llm" in stage.fresh):
                check_vocabulary(parts["llm"], tokenizer)
                if stage.layout == "packed":
                    attend_in_segments(parts["llm"])
            build_processor(settings, name, parts, OBJECTIVES[stage.objective], tokenizer)
            for split in filter(None, (stage.data, stage.validation)):
                if split == stage.data or settings.data.get(split) is not None:
                    source = _check_source(settings, split, picture_size(parts))
                if split == stage.data and stage.layout == "padded":  # packed rows are counted when the stage begins
                    steps = stage.max_steps or math.ceil(source.epoch_size / stage.batch_size) * stage.epochs
                    check_starts(groups, name, steps)
        elif folder.is_finished(name):
            folder.summary(name)  # raises if it is broken, before anything is trained
            connector = connector_skeleton(folder.model(name))
        else:
            continue
        handed_on = (handed_on | set(stage.parts)) - set(stage.drops) - {"objective"}


def _check_source(settings: DictConfig, split: str, size: tuple[int, int]) -> Mixture:
    source = build_source(settings.data, split, size, settings.seed)
    problems = first_problems(source) if settings.on_bad_sample == "raise" else []
    if problems:
        raise BadSample(f"{problems[0]} (data.{split}; on_bad_sample=skip trains without it)")
    return source


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
