"""Which validation is the best, and when a stage ends early."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import pytest

from vlmtrain.training.stage_validation import StageValidation

from ...stages import make_stage

ENGINE = SimpleNamespace(model=None, evaluating=nullcontext)


def validated(scores: list[dict], **keys) -> tuple[StageValidation, list[int]]:
    """A stage after validations with these scores, and the steps whose model was kept as the best."""
    kept = []
    record = {"step": 0}
    models = SimpleNamespace(write=lambda engine, folder: kept.append(record["step"]))
    validator = SimpleNamespace(scores=lambda model, samples: (scores[record["step"] - 1], []))
    stage = make_stage(validate_every=1, keep_best=True, data="a", validation="b", **keys)
    one = StageValidation(stage, SimpleNamespace(samples=None), validator, models, None, record)
    for record["step"] in range(1, len(scores) + 1):
        assert one.on_schedule(ENGINE, len(scores) + 1, None, None)
        if one.ends_early:
            break
    return one, kept


def by(metric: str, *values: float) -> list[dict]:
    return [{"loss": 1.0, metric: value} for value in values]


@pytest.mark.parametrize(
    "scores, metric, kept, ends",
    [
        (by("loss", 3, 2, 2, 2.5, 1), "loss", [1, 2], 4),  # a tie is not better
        (by("loss", 3, 2, 4, 1, 2), "loss", [1, 2, 4], None),
        (by("loss", float("nan"), 5, 4), "loss", [2, 3], None),
        (by("exact_match", 0.1, 0.3, 0.2, 0.3, 0.9), "exact_match", [1, 2], 4),
        (by("exact_match", 0.1, 0.3, 0.2, 0.4), "exact_match", [1, 2, 4], None),
    ],
)
def test_a_stage_ends_after_two_validations_that_are_not_the_best(scores, metric, kept, ends):
    one, best = validated(scores, early_stopping=2, best_metric=metric)
    assert best == kept
    assert one.record["step"] == (ends or len(scores)) and bool(one.ends_early) == (ends is not None)


def test_a_metric_that_the_validation_lacks_is_named():
    with pytest.raises(ValueError, match=r"stages\.s\.best_metric=cider: the validation has loss, exact_match"):
        validated(by("exact_match", 0.5), best_metric="cider")


def test_a_metric_without_effect_is_refused():
    with pytest.raises(ValueError, match="best_metric=cider has no effect without"):
        make_stage(best_metric="cider")
