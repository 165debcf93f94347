"""Trains one stage of a recipe, from its initial weights to its model folder."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

from ..data.loader import StepData, StepStream, step_loader
from ..data.sources import build_source
from ..distributed.world import Stopped, StopSignal, World
from ..errors import first_line
from ..evaluation.few_shot import why_zero_shot
from ..evaluation.lmms_eval import Benchmarks
from ..evaluation.progress import ValidationProgress
from ..evaluation.validation import Validator
from ..files import restore_folder, write_json
from ..model.attention import attend_in_segments
from ..model.parts import module_state
from ..model.vision import PatchVision
from ..objectives import build_objective
from ..runs.folder import RunFolder
from ..settings import Run, Stage
from .assembly import DTYPES, build_parts, build_skeleton, build_tokenizer
from .bad_steps import BadSteps
from .batching import build_batching, keeps_samples_apart
from .checkpoint import Checkpoints
from .compiling import compile_blocks
from .cost.flops import StepFlops, peak_tflops
from .deciding import decided
from .engine.stage_engine import StageEngine
from .feature_cache import FeatureCache
from .log import logger
from .metrics import Metrics
from .model_folder import ModelWriter
from .optimizer import Schedule
from .processing import build_processor, image_size_of
from .progress import Progress
from .proof import Hashes, part_hashes, part_summary
from .skips import Skips
from .stage_report import shown_samples, training_table
from .stage_validation import StageValidation, build_demonstrations
from .step import StepRunner
from .tracking import Trackers
from .trainable import check_starts, freeze, frozen_encoders, groups_of, trained_groups
from .watch import Watch
from .workers import Workers


def train_stage(
    run: Run,
    stage: Stage,
    previous: Path | None,
    folder: RunFolder,
    world: World,
    stop: StopSignal,
    trackers: Trackers,
    watch: Watch,
) -> dict:
    """Train a stage from the model folder `previous` to its end. Returns its summary.

    Resumes from the stage's newest checkpoint, if there is one. If more parameters start to train within the stage, a
    new engine is built at that step and also resumes from a checkpoint. Raises Stopped on a stop signal, after saving
    the state, and ValueError or BadSample for errors that the user can fix.
    """
    summary = None
    while summary is None:
        watch.doing(f"stage {stage.name}: building", outside=True)
        summary = _Stage(run, stage, previous, folder, world, watch).run(stop, trackers)
    return summary


class _Stage:
    def __init__(
        self,
        settings: Run,
        stage: Stage,
        previous: Path | None,
        folder: RunFolder,
        world: World,
        watch: Watch,
    ):
        self.watch = watch
        self.workers = Workers(settings.workers)
        tokenizer = build_tokenizer(settings)
        stage = decided(settings, stage, folder.stage(stage.name) / "decided.json", world, tokenizer)
        self.settings, self.stage, self.name = settings, stage, stage.name
        self.folder, self.world = folder, world
        self.parts = build_parts(settings, stage, previous, tokenizer)
        objective = self.parts.get("objective")
        self.objective = objective or build_objective(stage.objective, settings.vision, tokenizer, self.parts)
        self.processor = build_processor(settings, stage, self.parts, self.objective, tokenizer)
        self.source = build_source(settings.data.split(stage.data), image_size_of(self.parts), settings.seed)
        joined = keeps_samples_apart(settings, stage, self.parts, world.device)
        self.batching = build_batching(self.source, self.processor, stage, world.size, self.workers.most, joined)
        planned = self.stage.max_steps or self.batching.steps_per_epoch * self.stage.epochs
        self.checkpoints = Checkpoints(folder.checkpoints(stage.name), self.stage.keep_last, world)
        self.record = self.checkpoints.newest()
        self.total_steps = self.record.get("ended_early", planned)
        groups = trained_groups(stage, self.parts)
        self.groups = [group for group in groups if group.from_step <= self.record["step"]]
        self.waiting = [group for group in groups if group.from_step > self.record["step"]]
        self.end = min([self.total_steps, *(group.from_step for group in self.waiting)])
        check_starts(groups, stage, planned)
        self.models = ModelWriter(settings, stage, self.parts, self.groups, self.processor, previous, world)
        freeze(self.parts, self.groups, self.stage.gradient_checkpointing)
        if joined:
            attend_in_segments(self.parts["llm"])
        if settings.compile:
            compile_blocks(self.parts)
        self.schedule = Schedule(stage.schedule, planned)

    def run(self, stop: StopSignal, trackers: Trackers) -> dict | None:
        """Train until the stage ends, or until more parameters start to train. In the latter case, return None."""
        if self.world.is_main:
            restore_folder(self.folder.stage(self.name) / "best")
        before = {
            part: part_hashes(module, module_state(module), groups_of(part, self.groups))
            for part, module in self.parts.items()
        }
        if self.world.is_main:
            ways = f"{self.world.size} x {self.batching.micro_rows} x {self.batching.accumulation}"
            head = f"{self.total_steps} steps of {self.batching} ({ways}), {len(self.source):,} records"
            table = training_table(self.parts, self.groups, self.waiting)
            logger.info(f"stage {self.name}: {head}\n{table}")
            for stream in self.source.streams.values():
                logger.warning(f"stage {self.name}: {stream.note}")
        engine = StageEngine(
            self.stage,
            self.settings.engine,
            DTYPES[self.settings.precision],
            self.parts,
            self.objective,
            self.groups,
            self.schedule,
            self.batching.accumulation,
            self.world.device,
            self.world.size,
        )
        engine.feature_caches = self._feature_caches(before)
        record = self.record
        self._check_start({part: found.whole for part, found in before.items()})
        self.checkpoints.load(record, engine.training_state)
        if record["step"] and self.world.is_main:
            logger.info(f"{self.name}: resuming after step {record['step']}")
        limit = self.settings.bad_sample_limit
        self.skips = Skips(len(self.source), limit.share, limit.in_a_row, record.get("skips"))
        record.setdefault("seconds", 0.0)
        record.setdefault("drawn", [0] * len(self.source.sources))
        record.setdefault("image_tokens", 0)
        validator = self._validator(engine, stop)
        best = self.folder.stage(self.name) / "best"
        validation = StageValidation(self.stage, self.settings.validation, validator, self.models, best, record)
        validation.start(engine)
        self._train(engine, validation, stop, trackers)
        self.watch.doing(f"stage {self.name}: final validation and model", outside=True)
        summary = None
        if self.end == self.total_steps:
            summary = self._finish(engine, validation, before)
            self.checkpoints.clear()
        engine.close()
        return summary

    def _check_start(self, now: dict[str, str]) -> None:
        """Raise ValueError if a part differs from the start of the stage: checkpoints contain only trained tensors."""
        for part, known in self.record.setdefault("began_with", now).items():
            if now[part] != known:
                raise ValueError(
                    f"stage {self.name} started with different weights for {part} (SHA-256 {known[:16]}, now "
                    f"{now[part][:16]}): restore the original files, or set another run_dir"
                )

    def _feature_caches(self, hashes: dict[str, Hashes]) -> dict[str, FeatureCache]:
        """The feature caches of the frozen encoders, if they are enabled."""
        options, vision = self.settings.features, self.parts.get("vision")
        if options.cache == "off" or vision is None:
            return {}
        frozen, known = frozen_encoders(vision, self.groups), hashes["vision"].encoders
        return {
            name: FeatureCache.of(options, vision.encoders[name], known[name])
            for name in frozen
            if not isinstance(vision.encoders[name], PatchVision)  # its features are the pixels
        }

    def _train(self, engine: StageEngine, validation: StageValidation, stop: StopSignal, trackers: Trackers) -> None:
        first, total, record = self.record["step"], self.total_steps, self.record
        # a stop comes before the validation of its step, so a validation may be logged that is not in the checkpoint
        kept = {"metrics": first, "validation": record.get("validated", 0), "bad_steps": first}
        metrics, scores, bad_steps = (
            Metrics(self.folder.stage(self.name) / f"{name}.jsonl", last) if self.world.is_main else None
            for name, last in kept.items()
        )
        progress = Progress(self.name, total, first) if self.world.is_main else None
        self.bad_steps = BadSteps(self.name, self.settings.bad_steps, bad_steps, record.get("bad_steps"))
        skips_bad, shared = self.settings.on_bad_sample == "skip", (self.world, self.watch, self.skips, self.bad_steps)
        options = list(self.source.sources), self.source.loss_weights, self.stage.sum_source_losses, self._step_flops()
        peak = self.settings.device_tflops or peak_tflops(self.world.device, engine.dtype)
        options = (engine, self.objective, *shared, *options, peak)
        runner = StepRunner(self.name, self.settings.seed, skips_bad, *options)
        steps = self._steps(first, record.get("cursor"), engine.feature_caches)
        if not validation.on_schedule(engine, total, scores, trackers):
            raise Stopped(f"{self.name}: stopped during validation; run the same command to resume")
        if validation.ends_early:  # by the validation of the step after which the run was stopped
            self.end = self.total_steps = record["ended_early"] = first
        for step in range(first, self.end):
            started = time.perf_counter()
            rereads = step == first and bool(self.source.streams)  # a stream is read again up to the interruption
            self.watch.doing(f"{self.name} step {step + 1}: waiting for data", outside=rereads)
            data = next(steps)
            done = runner.run(step, data, started, time.perf_counter() - started, stop.received, self._is_late())
            values = done.values
            record["seconds"] += values["step_seconds"]
            record["drawn"] = [before + now for before, now in zip(record["drawn"], done.drawn)]
            record["image_tokens"] += values["image_tokens"]
            if metrics:
                metrics.write(values)
                trackers.log(self.name, values)
                progress.update(step + 1, values)
            record |= {"step": step + 1, "cursor": data.cursor, "skips": self.skips.state}
            record["bad_steps"] = self.bad_steps.state
            self.watch.doing(f"{self.name} after step {step + 1}: validating, saving", outside=True)
            stopping = done.stopping or not validation.on_schedule(engine, total, scores, trackers)
            if validation.ends_early:
                self.end = self.total_steps = record["ended_early"] = step + 1
            if stopping or step + 1 == self.end or self._is_save_due(step + 1, done.is_late):
                for file in filter(None, (metrics, scores, bad_steps)):
                    file.sync()
                self._save(engine, is_needed=stopping or step + 1 < total)
            if stopping:
                raise Stopped(f"{self.name}: stopped after step {step + 1} of {total}; run the same command to resume")
            if validation.ends_early:
                if self.world.is_main:
                    logger.info(f"{self.name}: ends after step {step + 1}: {validation.ends_early}")
                break
            if step + 1 < self.end and self._needs_workers(values):
                steps = self._steps(step + 1, data.cursor, engine.feature_caches)
        for closing in filter(None, (metrics, scores, bad_steps, progress)):
            closing.close()

    def _needs_workers(self, values: dict) -> bool:
        """Whether to start again with more data processes. Not for streams, which each process reads from the front."""
        if self.source.streams or not self.workers.grow(values["data_seconds"], values["step_seconds"]):
            return False
        if self.world.is_main:
            logger.info(
                f"{self.name}: {self.workers.count} data processes from now on, because training waited for data"
            )
        return True

    def _step_flops(self) -> StepFlops | None:
        """The FLOPs of steps, on the main rank, which writes the metrics."""
        if not self.world.is_main:
            return None
        dtype = DTYPES[self.settings.precision]
        try:
            parts = build_skeleton(self.settings, self.stage, self.processor.tokenizer, dtype)
            freeze(parts, self.groups, checkpointing=False)
            return StepFlops(parts, self.groups, self.stage, self.processor.geometry)
        except Exception as error:  # a part of a user's module may not run without weights
            logger.warning(f"stage {self.name}: its FLOPs are not counted: {first_line(error)}")
            return None

    def _save(self, engine: StageEngine, is_needed: bool) -> None:
        """Write a checkpoint. Raises ValueError if it cannot be written and is needed.

        The checkpoint after the last step only avoids repeating steps if the run is killed before the model is written.
        The model needs less disk space than a checkpoint.
        """
        try:
            prune = not self.bad_steps.in_a_row
            self.checkpoints.save(engine.training_state, self.record["step"], self.record, prune)
        except ValueError as error:
            if is_needed:
                raise
            if self.world.is_main:
                logger.warning(f"{error}; training is complete, continuing with the model folder")

    def _is_late(self) -> bool:
        """Whether a checkpoint is due according to the clock of the main rank."""
        minutes = self.stage.save_every_minutes
        return self.world.is_main and minutes is not None and self.checkpoints.minutes_since > minutes

    def _is_save_due(self, step: int, is_late: bool) -> bool:
        """Whether to save after a step. Never between skipped steps, as the checkpoints before them would be pruned."""
        every = self.stage.save_every
        return not self.bad_steps.in_a_row and (bool(every and step % every == 0) or is_late)

    def _steps(self, first: int, cursor: dict | None, caches: dict[str, FeatureCache]) -> Iterator[StepData]:
        ranks = (self.world.rank, self.world.size)
        processor = self.processor
        if caches:
            found = (caches.get(name) for name in self.parts["vision"].encoders)
            processor = processor.reading(*(cache and cache.files for cache in found))
        stream = StepStream(self.batching, self.source, processor, *ranks, first, self.total_steps, cursor)
        return step_loader(stream, self.workers.count, pin_memory=self.world.device.type == "cuda")

    def _validator(self, engine: StageEngine, stop: StopSignal) -> Validator | None:
        split = self.stage.validation
        if not self.settings.validates(self.stage):
            return None
        for stream in self.source.streams.values():
            stream.close()  # the validator starts processes too, see `step_loader`
        progress = ValidationProgress(lambda text: logger.info(f"{self.name}: {text}"))

        def tell(what: str, done: int, total: int) -> None:
            self.watch.doing(f"stage {self.name}: {what}, {done} of {total} conversations", outside=True)
            if self.world.is_main:
                progress(what, done, total)

        options = self.settings.validation
        zero_shot = why_zero_shot(self.processor) if options.shots_from else None
        if zero_shot and self.world.is_main:
            logger.warning(f"stage {self.name} is validated without demonstrations: {zero_shot}")
        size = image_size_of(self.parts)
        return Validator(
            build_source(self.settings.data.split(split), size, self.settings.seed),
            self.processor,
            self.world,
            engine.dtype,
            options.batch_size,
            options.max_new_tokens,
            sync_generation=self.settings.engine.shards_weights(self.world.size),
            skip_bad=self.settings.on_bad_sample == "skip",
            metrics=options.metrics,
            seed=self.settings.seed,
            stop=stop,
            workers=self.workers.count,
            tell=tell,
            demonstrations=None if zero_shot else build_demonstrations(self.settings, size),
        )

    def _finish(self, engine: StageEngine, validation: StageValidation, before: dict[str, Hashes]) -> dict:
        scores, answers = validation.finish(engine, self.total_steps)
        after = self.models.write(engine, self.folder.model(self.name))
        if self.stage.ema is not None:
            self.models.write(engine, self.folder.stage(self.name) / "ema", averaged=True)
        drawn, total = self.record["drawn"], max(1, sum(self.record["drawn"]))
        summary = {
            "stage": self.name,
            "steps": self.total_steps,
            "seconds": self.record["seconds"],
            "feature_cache": self._cache_use(engine.feature_caches),
            "skipped_samples": self.skips.skipped,
            "skipped_steps": self.bad_steps.skipped,
            "loss_spikes": self.bad_steps.spikes,
            "checkpoints": self.checkpoints.cost,
            "best": self.record.get("best"),
            "ended_early": "ended_early" in self.record,
            "data": {name: {"samples": n, "share": n / total} for name, n in zip(self.source.sources, drawn)},
            "world_size": self.world.size,
            "validation": scores,
            "validation_draw": validation.draw,
            "lmms_eval": self._benchmark(engine),
            "parts": {
                part: part_summary(part, module, groups_of(part, self.groups), before[part], after[part])
                for part, module in self.parts.items()
            },
        }
        self._check_changes(summary["parts"])
        for kind in ("trainable", "frozen"):
            summary[f"{kind}_parameters"] = sum(part[f"{kind}_parameters"] for part in summary["parts"].values())
        if self.world.is_main:
            folder = self.folder.stage(self.name)
            shown = shown_samples(validation.validator.source, self.processor, answers) if answers else []
            write_json(folder / "answers.json", answers)
            write_json(folder / "samples.json", shown)
            write_json(folder / "summary.json", summary)
        self.world.barrier()
        return summary

    def _check_changes(self, parts: dict[str, dict]) -> None:
        """Raise RuntimeError if a trained part is unchanged, unless no gradient could reach it.

        That is if the data had no images, or if the gates of a new fusion were still closed.
        """
        gated = "fusion" in self.parts and bool(self.parts["fusion"].before_blocks)
        for name, part in parts.items():
            if not part["trained"] or part["sha256_before"] != part["sha256_after"]:
                continue
            reason = f"data.{self.stage.data} has no images"
            if self.record["image_tokens"]:
                if name not in ("vision", "connector") or not gated:
                    raise RuntimeError(f"{name} is trained but unchanged")
                reason = "the gates of the fusion, which are 0 at first, have not opened in so few steps"
            elif name not in ("vision", "connector", "fusion"):
                raise RuntimeError(f"{name} is trained but unchanged")
            if self.world.is_main:
                logger.warning(f"stage {self.name} trained {name}, but {reason}: it is unchanged")

    def _benchmark(self, engine: StageEngine) -> dict[str, dict[str, float]]:
        """The metrics of each task, for models that can answer questions about images."""
        options = self.settings.validation
        if not options.lmms_eval or not {"vision", "connector", "llm"} <= set(self.parts):
            return {}
        self.watch.doing(f"stage {self.name}: benchmarks", outside=True)
        with engine.evaluating():
            benchmarks = Benchmarks(options.lmms_eval, options.batch_size, options.final_samples)
            return benchmarks.scores(engine.model, self.processor, self.world)

    def _cache_use(self, caches: dict[str, FeatureCache]) -> dict | None:
        """Number of images that were and were not in the caches of encoders, summed over ranks."""
        if not caches:
            return None
        counts = [(cache.hits, cache.misses) for cache in caches.values()]
        hits, misses = self.world.sum([sum(column) for column in zip(*counts)])
        return {"hits": int(hits), "misses": int(misses)}
