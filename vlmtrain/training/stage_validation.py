"""Validation of a stage at its start, on schedule and at its end, and selection of the best model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..data.sources import build_source
from ..distributed.world import Stopped
from ..evaluation.few_shot import Demonstrations
from ..evaluation.scores import LOWER_IS_BETTER, base_name
from ..evaluation.validation import Validator
from ..settings import Run, Stage, Validation
from ..settings.run import RICES
from ..visual import Size
from .engine.stage_engine import StageEngine
from .metrics import Metrics
from .model_folder import ModelWriter
from .tracking import Trackers


@dataclass
class StageValidation:
    """Validates a stage. If the stage has no validation data, `validator` is None and every call is a no-op.

    record: the stage's resumable record, which includes the completed validations. best: folder of the best model.
    """

    stage: Stage
    options: Validation
    validator: Validator | None
    models: ModelWriter
    best: Path
    record: dict

    @property
    def draw(self) -> dict | None:
        """How many conversations the final validation uses, of how many, and the seed by which they are drawn."""
        if self.validator is None:
            return None
        total = len(self.validator.source)
        used = total if self.options.final_samples is None else min(total, self.options.final_samples)
        return {"conversations": used, "of": total, "seed": self.validator.seed}

    def start(self, engine: StageEngine) -> None:
        """Compute the loss before the first step. Raises ValueError for a metric that lacks data for some question."""
        if self.validator is None:
            return
        sizes = self.options.samples, self.options.final_samples
        largest = None if None in sizes else max(sizes)
        self.validator.check_metrics(largest)
        with engine.evaluating():
            self.validator.retrieve(engine.model, largest)
        if "validation_at_start" not in self.record:
            with engine.evaluating():
                self.record["validation_at_start"] = self.validator.loss(engine.model, self.options.samples)

    def on_schedule(self, engine: StageEngine, end: int, scores: Metrics | None, trackers: Trackers) -> bool:
        """Validate if a validation is due and was not done before the stage was interrupted.

        Returns False if a stop signal interrupted it. The validation is then done when the stage resumes.

        end: the last step of the stage, after which `finish` validates on the final samples.
        """
        step, every = self.record["step"], self.stage.validate_every
        due = self.validator and every and step and step % every == 0 and step < end
        if not due or self.record.get("validated", 0) >= step:
            return True
        try:
            with engine.evaluating():
                found, _ = self.validator.scores(engine.model, self.options.samples)
        except Stopped:
            return False
        self.record["validated"] = step
        if scores:
            scores.write({"step": step, **found})
            trackers.log(
                self.stage.name, {"step": step, **{f"validation/{key}": value for key, value in found.items()}}
            )
        self._keep_best(engine, step, found)
        value = self._value(found)
        if self._is_better(value, self.record.get("best_value")):
            self.record |= {"best_value": value, "not_better": 0}
        else:
            self.record["not_better"] = self.record.get("not_better", 0) + 1
        return True

    @property
    def ends_early(self) -> str:
        """Why the stage ends before its last step; an empty string if it does not."""
        patience, count = self.stage.early_stopping, self.record.get("not_better", 0)
        if patience is None or count < patience:
            return ""
        best, metric = self.record.get("best_value", math.nan), self.stage.best_metric
        return f"{count} validations without a better {metric} than {best:.4f}"

    def finish(self, engine: StageEngine, end: int) -> tuple[dict | None, list[dict]]:
        """Compute the scores and answers after the last step."""
        if self.validator is None:
            return None, []
        with engine.evaluating():
            scores, answers = self.validator.scores(engine.model, self.options.final_samples)
        scores["loss_at_start"] = self.record["validation_at_start"]
        if self.stage.keep_best:
            with engine.evaluating():
                if self.stage.best_metric == "loss":
                    found = {"loss": self.validator.loss(engine.model, self.options.samples)}
                else:
                    found, _ = self.validator.scores(engine.model, self.options.samples)
            self._keep_best(engine, end, found)
        return scores, answers

    def _keep_best(self, engine: StageEngine, step: int, found: Mapping[str, float]) -> None:
        metric, best = self.stage.best_metric, self.record.get("best")
        if self.stage.keep_best and self._is_better(self._value(found), best and best[metric]):
            self.models.write(engine, self.best)
            self.record["best"] = {"step": step, metric: found[metric]}

    def _value(self, found: Mapping[str, float]) -> float:
        """The score by which validations are compared. Raises ValueError if this validation does not have it."""
        metric = self.stage.best_metric
        if not isinstance(found.get(metric), int | float):
            known = ", ".join(name for name, value in found.items() if isinstance(value, int | float))
            raise ValueError(f"{self.stage.prefix}.best_metric={metric}: the validation has {known}")
        return found[metric]

    def _is_better(self, value: float, best: float | None) -> bool:
        if not math.isfinite(value):
            return False
        return best is None or (value < best if base_name(self.stage.best_metric) in LOWER_IS_BETTER else value > best)


def build_demonstrations(run: Run, image_size: Size) -> Demonstrations | None:
    """The demonstrations before validation questions; None if the settings name none.

    image_size: of the encoder, for generated data. Raises ValueError if there are too few.
    """
    options = run.validation
    if options.shots_from is None:
        return None
    source = build_source(run.data.split(options.shots_from), image_size, run.seed)
    skip_bad, rices = run.on_bad_sample == "skip", options.shots_by == RICES
    return Demonstrations(source, options.shots_from, options.shots, run.seed, rices, skip_bad)
