"""One stage of a recipe, from the weights it starts with to the model folder it leaves."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..data.loader import BadRecord, StepData, StepStream, step_loader
from ..data.mixture import Mixture
from ..data.sources import build_source
from ..distributed.processes import peak_resident_bytes
from ..distributed.world import Stopped, StopSignal, World
from ..evaluation.lmms_eval import benchmarks_of
from ..evaluation.validation import Validator, picture_uri
from ..files import restore_folder, write_json
from ..model.attention import attend_in_segments
from ..model.parts import module_state
from ..objectives import Objective, build_objective
from ..runs.folder import RunFolder
from ..settings import Run, Stage
from .assembly import (
    DTYPES,
    build_parts,
    build_processor,
    build_tokenizer,
    picture_size,
    seed_for,
)
from .bad_steps import BadSteps, Fault
from .batching import build_plan
from .checkpoint import Checkpoints
from .compiling import compile_blocks
from .engine.stage_engine import StageEngine
from .feature_cache import FeatureCache
from .log import logger
from .metrics import Metrics
from .model_folder import ModelWriter
from .optimizer import Schedule
from .progress import Progress
from .proof import Hashes, part_hashes, part_summary
from .skips import Skips
from .tracking import WandB
from .trainable import check_starts, freeze, groups_of, part_size, trained_groups
from .watch import Watch

SHOWN_SAMPLES = 48


def train_stage(
    run: Run,
    stage: Stage,
    previous: Path | None,
    folder: RunFolder,
    world: World,
    stop: StopSignal,
    wandb: WandB,
    watch: Watch,
) -> dict:
    """Train a stage from the model folder `previous`, to its end. Returns its summary.

    Goes on from the stage's newest checkpoint, if there is one. Where more begins to train within the stage, an engine
    of its own goes on from a checkpoint too. Raises Stopped when told to stop, with the state saved; ValueError or
    BadSample for what the user must mend.
    """
    summary = None
    while summary is None:
        watch.doing(f"stage {stage.name}: building", outside=True)
        summary = _Stage(run, stage, previous, folder, world, watch).run(stop, wandb)
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
        self.settings, self.config, self.name = settings, stage, stage.name
        self.folder, self.world = folder, world
        tokenizer = build_tokenizer(settings)
        self.parts = build_parts(settings, stage, previous, tokenizer)
        self.objective = self._objective(tokenizer)
        self.processor = build_processor(settings, stage, self.parts, self.objective, tokenizer)
        self.source = self._source(self.config.data)
        self.plan = build_plan(self.source, self.processor, stage, world.size)
        self.total_steps = self.config.max_steps or self.plan.steps_per_epoch * self.config.epochs
        self.checkpoints = Checkpoints(folder.checkpoints(stage.name), self.config.keep_last, world)
        self.record = self.checkpoints.newest()
        groups = trained_groups(stage, self.parts)
        self.groups = [group for group in groups if group.from_step <= self.record["step"]]
        self.waiting = [group for group in groups if group.from_step > self.record["step"]]
        self.end = min([self.total_steps, *(group.from_step for group in self.waiting)])
        check_starts(groups, stage, self.total_steps)
        self.models = ModelWriter(settings, stage, self.parts, self.groups, self.processor, previous, world)
        freeze(self.parts, self.groups, self.config.gradient_checkpointing)
        if self.config.layout == "packed":
            attend_in_segments(self.parts["llm"])
        if settings.compile:
            compile_blocks(self.parts)
        self.schedule = Schedule.of(stage.schedule, self.total_steps)

    def _objective(self, tokenizer: PreTrainedTokenizerBase) -> Objective:
        if "objective" in self.parts:
            return self.parts["objective"]
        return build_objective(self.config.objective, self.settings.vision, tokenizer, self.parts)

    def _source(self, split: str) -> Mixture:
        return build_source(self.settings.data, split, picture_size(self.parts), self.settings.seed)

    def run(self, stop: StopSignal, wandb: WandB) -> dict | None:
        """Train until the stage ends, or until more of it begins to train: then there is no summary yet."""
        if self.world.is_main:
            restore_folder(self.folder.stage(self.name) / "best")
        before = {
            part: part_hashes(module, module_state(module), groups_of(part, self.groups))
            for part, module in self.parts.items()
        }
        if self.world.is_main:
            logger.info(self._table())
        engine = StageEngine(
            self.config,
            self.settings.engine,
            DTYPES[self.settings.precision],
            self.parts,
            self.objective,
            self.groups,
            self.schedule,
            self.plan.accumulation,
            self.world.device,
        )
        engine.feature_cache = self._feature_cache(before)
        record = self.record
        self._check_start({part: found.whole for part, found in before.items()})
        self.checkpoints.load(record, engine.training_state)
        if record["step"] and self.world.is_main:
            logger.info(f"{self.name}: going on behind step {record['step']}")
        validator = self._validator(engine)
        if validator:
            options = self.settings.validation
            sizes = options.samples, options.final_samples
            validator.check_metrics(None if None in sizes else max(sizes))
        limit = self.settings.bad_sample_limit
        self.skips = Skips(len(self.source), limit.share, limit.in_a_row, record.get("skips"))
        record.setdefault("seconds", 0.0)
        record.setdefault("drawn", [0] * len(self.source.sources))
        if validator and "validation_at_start" not in record:
            with engine.evaluating():
                record["validation_at_start"] = validator.loss(engine.model, self.settings.validation.samples)
        self._train(engine, validator, stop, wandb)
        self.watch.doing(f"stage {self.name}: its last validation and its model", outside=True)
        summary = None
        if self.end == self.total_steps:
            summary = self._finish(engine, validator, before)
            self.checkpoints.clear()
        engine.close()
        return summary

    def _check_start(self, now: dict[str, str]) -> None:
        """Raise ValueError if a part is not what the stage began with: a checkpoint has only what is trained."""
        for part, known in self.record.setdefault("began_with", now).items():
            if now[part] != known:
                raise ValueError(
                    f"stage {self.name} began with other weights of its {part} (SHA-256 {known[:16]}, now "
                    f"{now[part][:16]}): put them back where they came from, or begin another run_dir"
                )

    def _feature_cache(self, hashes: dict[str, Hashes]) -> FeatureCache | None:
        """The cache that is asked for, where the stage has an encoder and leaves it frozen."""
        options = self.settings.features
        if options.cache == "off" or "vision" not in self.parts or any(g.part == "vision" for g in self.groups):
            return None
        self.processor.names_pictures = True
        return FeatureCache.of(options, self.parts["vision"], hashes["vision"].whole)

    def _train(
        self,
        engine: StageEngine,
        validator: Validator | None,
        stop: StopSignal,
        wandb: WandB,
    ) -> None:
        first, total, record = self.record["step"], self.total_steps, self.record
        # a stop comes before its step's validation, so that one may be told of and not be in the checkpoint
        kept = {"metrics": first, "validation": record.get("validated", 0), "bad_steps": first}
        metrics, scores, bad_steps = (
            Metrics(self.folder.stage(self.name) / f"{name}.jsonl", last) if self.world.is_main else None
            for name, last in kept.items()
        )
        progress = Progress(self.name, total, first) if self.world.is_main else None
        self.bad_steps = BadSteps(self.name, self.settings.bad_steps, bad_steps, record.get("bad_steps"))
        steps = self._steps(first, record.get("cursor"))
        self._validate(engine, validator, scores, wandb)
        for step in range(first, self.end):
            started = time.perf_counter()
            self.watch.doing(f"{self.name} step {step + 1}: waiting for data")
            data = next(steps)
            waited = time.perf_counter() - started
            ids = [sample for batch in data.micro_batches for sample in batch.ids]
            self.watch.doing(f"{self.name} step {step + 1}: its totals over ranks", ids)
            values, stopping = self._step(engine, step, data, stop)
            values = {"step": step + 1, **values, **self._speed(values, time.perf_counter() - started, waited)}
            record["seconds"] += values["step_seconds"]
            if metrics:
                metrics.write(values)
                wandb.log(self.name, values)
                progress.update(step + 1, values["loss"], values["tokens_per_second"], values["step_seconds"])
            record |= {"step": step + 1, "cursor": data.cursor, "skips": self.skips.state}
            record["bad_steps"] = self.bad_steps.state
            self.watch.doing(f"{self.name} behind step {step + 1}: validating, saving", outside=True)
            if not stopping:
                self._validate(engine, validator, scores, wandb)
            if stopping or step + 1 == self.end or self._is_save_due(step + 1):
                for file in filter(None, (metrics, scores, bad_steps)):
                    file.sync()
                self._save(engine, is_needed=stopping or step + 1 < total)
            if stopping:
                raise Stopped(
                    f"{self.name}: stopped behind step {step + 1} of {total}; the same line goes on from here"
                )
        for closing in filter(None, (metrics, scores, bad_steps, progress)):
            closing.close()

    def _save(self, engine: StageEngine, is_needed: bool) -> None:
        """Write a checkpoint. Raises ValueError if one that is needed cannot be written.

        That behind the last step saves a kill's victims the steps since the one before; the model takes less room.
        """
        try:
            prune = not self.bad_steps.in_a_row
            self.checkpoints.save(engine.training_state, self.record["step"], self.record, prune)
        except ValueError as error:
            if is_needed:
                raise
            if self.world.is_main:
                logger.warning(f"{error}; the stage has its weights, and goes on to its model")

    def _is_save_due(self, step: int) -> bool:
        """Not among steps that make no update, or the checkpoints from before them would be dropped."""
        every = self.config.save_every
        return not self.bad_steps.in_a_row and (bool(every and step % every == 0) or self.is_late)

    def _validate(self, engine: StageEngine, validator: Validator | None, scores: Metrics | None, wandb: WandB) -> None:
        """Validate if it is time to, and it was not done before the stage was stopped here."""
        step, every = self.record["step"], self.config.validate_every
        due = validator and every and step and step % every == 0 and step < self.total_steps
        if not due or self.record.get("validated", 0) >= step:
            return
        with engine.evaluating():
            found, _ = validator.scores(engine.model, self.settings.validation.samples)
        self.record["validated"] = step
        if scores:
            scores.write({"step": step, **found})
            wandb.log(self.name, {"step": step, **{f"validation/{key}": value for key, value in found.items()}})
        self._keep_best(engine, step, found["loss"])

    def _keep_best(self, engine: StageEngine, step: int, loss: float) -> None:
        best = self.record.get("best")
        if self.config.keep_best and math.isfinite(loss) and (best is None or loss < best["loss"]):
            self.models.write(engine, self.folder.stage(self.name) / "best")
            self.record["best"] = {"step": step, "loss": loss}

    def _steps(self, first: int, cursor: dict | None) -> Iterator[StepData]:
        ranks = (self.world.rank, self.world.size)
        stream = StepStream(self.plan, self.source, self.processor, *ranks, first, self.total_steps, cursor)
        return step_loader(stream, self.settings.workers, pin_memory=self.world.device.type == "cuda")

    def _step(self, engine: StageEngine, step: int, data: StepData, stop: StopSignal) -> tuple[dict, bool]:
        """One optimiser step on all ranks: its metrics, and whether some rank was told to stop."""
        weight, samples, tokens, image_tokens, target_tokens, positions, bad, stopping, late, *drawn = self.world.sum(
            [
                self.objective.weight(data),
                data.samples,
                data.tokens,
                data.image_tokens,
                data.target_tokens,
                data.positions,
                len(data.bad),
                float(stop.received),
                float(
                    self.world.is_main and self.checkpoints.minutes_since > (self.config.save_every_minutes or math.inf)
                ),
                *data.drawn,
            ]
        )
        if bad:
            self._handle_bad([found for rank in self.world.gather(data.bad) for found in rank], step)
        self.record["drawn"] = [before + int(now) for before, now in zip(self.record["drawn"], drawn)]
        self.is_late = late > 0
        rates = engine.set_rates(step)
        loss, norm = self._update(engine, step, data, max(weight, 1e-9))
        values = {
            "loss": loss,
            "grad_norm": norm,
            "learning_rate": rates,
            "samples": int(samples),
            "tokens": int(tokens),
            "image_tokens": int(image_tokens),
            "target_tokens": int(target_tokens),
            "padding_fraction": 1 - tokens / max(positions, 1),
        }
        return values, stopping > 0

    def _update(self, engine: StageEngine, step: int, data: StepData, weight: float) -> tuple[float, float]:
        """Run a step's micro-batches and update the weights, unless the numbers are wrong: loss, and gradient norm.

        Every engine drops a step whose gradient is not finite on some rank.
        """
        losses: list[Tensor] = []
        for i, batch in enumerate(data.micro_batches):
            # Randomness (dropout) depends on where in the run we are, so resuming needs no generator state.
            seed_for(self.settings.seed, self.name, step, i, self.world.rank)
            where = f"{self.name} step {step + 1}, micro-batch {i + 1} of {len(data.micro_batches)}"
            self.watch.doing(f"{where}: forward", batch.ids)
            loss = engine.loss(batch.to(self.world.device, engine.dtype))
            losses.append(loss.detach().float())
            loss = loss * (1 + 0 * loss.detach())  # NaN, and with it every gradient, where the loss is not finite
            if self.bad_steps.skip_spikes and i + 1 == len(data.micro_batches):  # waits for the device
                fault = self.bad_steps.judge(self._mean_loss(losses, weight))
                loss = loss * math.nan if fault else loss
            self.watch.doing(f"{where}: backward{' and update' * (i + 1 == len(data.micro_batches))}", batch.ids)
            engine.backward(loss, weight)
        mean, norm = self._mean_loss(losses, weight), engine.grad_norm()
        fault = self.bad_steps.judge(mean)
        if not fault and not math.isfinite(norm):
            fault = Fault("the gradient is not finite", True)
        self.bad_steps.count(step + 1, mean, fault, self._suspects(data, losses) if fault else ())
        return mean, norm

    def _mean_loss(self, losses: list[Tensor], weight: float) -> float:
        """A step's loss over all ranks, from the summed losses of this rank's micro-batches."""
        return self.world.sum([float(torch.stack(losses).sum())])[0] / weight

    def _suspects(self, data: StepData, losses: list[Tensor]) -> list[str]:
        """Ids, over all ranks, of the samples of micro-batches whose loss is not finite, or else of the whole step."""
        found = [(batch.ids, bool(torch.isfinite(loss))) for batch, loss in zip(data.micro_batches, losses)]
        everyone = [batch for rank in self.world.gather(found) for batch in rank]
        wrong = [batch for batch in everyone if not batch[1]]
        return [sample for ids, _ in wrong or everyone for sample in ids]

    def _handle_bad(self, found: list[BadRecord], step: int) -> None:
        found.sort()
        if self.settings.on_bad_sample == "raise":
            raise ValueError(f"{found[0].problem} (step {step + 1}; on_bad_sample=skip trains without it)")
        if self.world.is_main:
            for bad in found:
                logger.warning(f"{self.name} step {step + 1}: skipped: {bad.problem}")
        self.skips.add(found)

    def _speed(self, values: dict, seconds: float, waited: float) -> dict:
        memory = torch.cuda.max_memory_allocated() if self.world.device.type == "cuda" else peak_resident_bytes()
        return {
            "step_seconds": seconds,
            "data_seconds": waited,
            "samples_per_second": values["samples"] / seconds,
            "tokens_per_second": values["tokens"] / seconds,
            "peak_memory_bytes": memory,
        }

    def _validator(self, engine: StageEngine) -> Validator | None:
        split = self.config.validation
        if not self.settings.validates(self.config):
            return None
        options = self.settings.validation
        return Validator(
            self._source(split),
            self.processor,
            self.world,
            engine.dtype,
            options.batch_size,
            options.max_new_tokens,
            sync_generation=engine.zero_stage == 3 and self.world.size > 1,
            skip_bad=self.settings.on_bad_sample == "skip",
            metrics=options.metrics,
        )

    def _finish(self, engine: StageEngine, validator: Validator | None, before: dict[str, Hashes]) -> dict:
        scores, answers = None, []
        if validator:
            with engine.evaluating():
                scores, answers = validator.scores(engine.model, self.settings.validation.final_samples)
            scores["loss_at_start"] = self.record["validation_at_start"]
            if self.config.keep_best:
                with engine.evaluating():
                    loss = validator.loss(engine.model, self.settings.validation.samples)
                self._keep_best(engine, self.total_steps, loss)
        after = self.models.write(engine, self.folder.model(self.name))
        summary = {
            "stage": self.name,
            "steps": self.total_steps,
            "seconds": self.record["seconds"],
            "feature_cache": self._cache_use(engine.feature_cache),
            "skipped_samples": self.skips.skipped,
            "skipped_steps": self.bad_steps.skipped,
            "loss_spikes": self.bad_steps.spikes,
            "checkpoints": self.checkpoints.cost,
            "best": self.record.get("best"),
            "data": self._shares(self.record["drawn"]),
            "world_size": self.world.size,
            "validation": scores,
            "lmms_eval": self._benchmark(engine),
            "parts": {
                part: part_summary(part, module, groups_of(part, self.groups), before[part], after[part])
                for part, module in self.parts.items()
            },
        }
        for kind in ("trainable", "frozen"):
            summary[f"{kind}_parameters"] = sum(part[f"{kind}_parameters"] for part in summary["parts"].values())
        if self.world.is_main:
            write_json(self.folder.stage(self.name) / "answers.json", answers)
            write_json(self.folder.stage(self.name) / "samples.json", self._shown(validator, answers))
            write_json(self.folder.stage(self.name) / "summary.json", summary)
        self.world.barrier()
        return summary

    def _benchmark(self, engine: StageEngine) -> dict[str, dict[str, float]]:
        """Each task's metrics, of a model that can be asked about pictures."""
        options = self.settings.validation
        if not options.lmms_eval or not {"vision", "connector", "llm"} <= set(self.parts):
            return {}
        self.watch.doing(f"stage {self.name}: its benchmarks", outside=True)
        with engine.evaluating():
            return benchmarks_of(options).scores(engine.model, self.processor, self.world)

    def _cache_use(self, cache: FeatureCache | None) -> dict | None:
        """Pictures that the cache knew and did not, on all ranks."""
        if cache is None:
            return None
        hits, misses = self.world.sum([cache.hits, cache.misses])
        return {"hits": int(hits), "misses": int(misses)}

    def _shares(self, drawn: list[int]) -> dict:
        """Samples trained on, by source."""
        total = max(1, sum(drawn))
        return {name: {"samples": n, "share": n / total} for name, n in zip(self.source.sources, drawn)}

    def _shown(self, validator: Validator | None, answers: list[dict]) -> list[dict]:
        """A few answers with their pictures, for the report."""
        shown = []
        for answer in answers[:SHOWN_SAMPLES]:
            images = validator.source[answer["conversation"]].images
            shown.append({**answer, "pictures": [picture_uri(image.load()) for image in images]})
        return shown

    def _table(self) -> str:
        rows = [("part", "parameters", "learning rate")]
        for part, module in self.parts.items():
            left = part_size(module)
            everything = [group for group in (*self.groups, *self.waiting) if group.part == part]
            for label in dict.fromkeys(group.label for group in everything):
                groups = [group for group in everything if group.label == label]
                number = sum(group.size(module) for group in groups)
                left -= number
                waits = f" from step {groups[0].from_step + 1}" if groups[0] in self.waiting else ""
                rows.append((label, f"{number:,}", f"{groups[0].lr:g}{waits}"))
            if left:
                rows.append((part, f"{left:,}", "frozen"))
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        lines = [f"  {row[0]:<{widths[0]}}  {row[1]:>{widths[1]}}  {row[2]:>{widths[2]}}" for row in rows]
        head = (
            f"stage {self.name}: {self.total_steps} steps of {self.plan} "
            f"({self.world.size} x {self.plan.micro_rows} x {self.plan.accumulation}), {len(self.source):,} records"
        )
        return "\n".join([head, *lines])
