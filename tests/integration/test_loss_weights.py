"""Weights of samples and sources in the loss, compared with cross-entropies weighed by hand."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from vlmtrain.settings import compose
from vlmtrain.training.step import _shares

from ..conftest import metrics, train

BATCH = 8
OWN = ("the second source is weighed in its own way", 0.5)
SUM = "stages.instruct.sum_source_losses=true"
AUTO = ["stages.instruct.gradient_checkpointing=auto", "stages.instruct.micro_batch_size=auto"]


def line(files, run_dir, sources: str, *more: str) -> list[str]:
    return [
        *("recipe=llava_1_5", "mini=true", "data=llava_json", f"data.images={files['images']}", "data.validation=null"),
        *("workers=0", "stage=instruct", "stages.instruct.fresh=[vision,connector,llm]", f"run_dir={run_dir}"),
        *(
            f"stages.instruct.batch_size={BATCH}",
            "stages.instruct.max_steps=2",
            "stages.instruct.schedule.name=constant",
        ),
        *(f"data.instruct={sources}", *more),
    ]


def sources_of(files, weights: tuple[float, float] | None) -> str:
    words = ["", ""] if weights is None else [f", loss_weight: {weight}" for weight in weights]
    if weights == OWN:
        words = ["", f", loss_per: sqrt, token_weight: {OWN[1]}"]
    return f"{{a: {{path: {files['align']}{words[0]}}}, b: {{path: {files['instruct']}{words[1]}}}}}"


def by_hand(overrides: list[str], per: str, weights: tuple[float, float] | None) -> tuple[float, dict[str, float]]:
    """The loss of the first step, and that of each source."""
    from vlmtrain.data.sources import build_source
    from vlmtrain.model import VLMWrapper
    from vlmtrain.objectives import LanguageModelling
    from vlmtrain.training.assembly import build_parts, build_tokenizer
    from vlmtrain.training.processing import build_processor, image_size_of

    run = compose(overrides)
    stage, tokenizer = run.stages["instruct"], build_tokenizer(run)
    parts = build_parts(run, stage, None, tokenizer)
    processor = build_processor(run, stage, parts, LanguageModelling(), tokenizer)
    mixture = build_source(run.data.split("instruct"), image_size_of(parts), run.seed)
    model = VLMWrapper(parts["vision"], parts["connector"], parts["llm"]).eval()
    sums, totals = {"a": 0.0, "b": 0.0}, {"a": 0.0, "b": 0.0}
    for position in range(BATCH):
        index = mixture.draw(position)
        batch = processor.collate([processor(mixture[index])])
        name, has_target = "ab"[mixture.source_number(index)], batch.targets[0] >= 0
        with torch.no_grad():
            losses = F.cross_entropy(model(batch)[0][has_target].double(), batch.targets[0][has_target])
        count = int(has_target.sum())
        share = {"token": count, "sample": 1.0, "sqrt": count**0.5}[per]
        if weights == OWN and name == "b":
            share = OWN[1] * count**0.5
        sums[name] += share * float(losses)
        totals[name] += share
    means = {name: sums[name] / totals[name] for name in sums}
    if weights in (None, OWN):
        return sum(sums.values()) / sum(totals.values()), means
    total = 1.0 if stage.sum_source_losses else sum(weights)
    return sum(weight / total * means[name] for name, weight in zip("ab", weights)), means


@pytest.mark.parametrize(
    "per, weights, ranks, more",
    [
        ("sample", None, 1, ["stages.instruct.micro_batch_size=3", "stages.instruct.batch_size=6"]),
        ("token", OWN, 1, ["stages.instruct.micro_batch_size=2"]),
        ("sqrt", (3.0, 1.0), 1, ["stages.instruct.micro_batch_size=2"]),
        ("token", (1.0, 0.2), 1, ["stages.instruct.micro_batch_size=2", SUM]),
        ("token", (1.0, 4.0), 2, [*AUTO, "engine=zero3", "engine.parameter_persistence_threshold=0"]),
    ],
)
def test_losses_are_weighed_by_samples_and_sources(llava_files, tmp_path, monkeypatch, per, weights, ranks, more):
    overrides = line(llava_files, tmp_path / "run", sources_of(llava_files, weights), f"stages.instruct.loss_per={per}")
    overrides += [SUM] if SUM in more else []
    monkeypatch.setattr(f"{__name__}.BATCH", 6 if "stages.instruct.batch_size=6" in more else BATCH)
    loss, by_source = by_hand(overrides, per, weights)
    train(*overrides, *(each for each in more if each != SUM), ranks=ranks)
    first, second = metrics(tmp_path / "run", "instruct")
    assert first["loss"] == pytest.approx(loss, rel=1e-5)
    assert first["loss_by_source"] == pytest.approx(by_source, rel=1e-5)
    assert second["loss"] < first["loss"]


def test_a_source_without_targets_in_a_step_does_not_count():
    assert _shares((3.0, 1.0), (20.0, 0.0)) == [1 / 20, 0.0]
    assert _shares((3.0, 1.0), (20.0, 5.0)) == pytest.approx([0.75 / 20, 0.25 / 5])
    assert _shares((3.0, 1.0), (20.0, 5.0), summed=True) == pytest.approx([3 / 20, 1 / 5])


def test_a_loss_that_compares_samples_has_no_weights(tmp_path):
    words = ("recipe=clip", "mini=true", f"run_dir={tmp_path / 'run'}")
    done = train(*words, "stages.contrast.loss_per=sample", check=False)
    assert done.returncode == 2 and "stages.contrast.loss_per=sample has no meaning; use token" in done.stderr
    sources = "{a: {size: 9, split: caption, loss_weight: 1}, b: {size: 9, split: caption, loss_weight: 2}}"
    done = train(*words, f"data.align={sources}", check=False)
    assert done.returncode == 2 and "the sources of data.align cannot have a loss_weight, loss_per" in done.stderr


def test_a_sum_of_sources_needs_their_weights(llava_files, tmp_path):
    done = train(*line(llava_files, tmp_path / "run", sources_of(llava_files, None), SUM), check=False)
    assert done.returncode == 2
    assert "sum_source_losses=true, but the sources of data.instruct have no loss_weight" in done.stderr


@pytest.mark.parametrize(
    "sources, message",
    [
        (
            "{a: {path: x, loss_weight: 1}, b: {path: x}}",
            r"data\.instruct\.b: give all sources .* a loss_weight, or none",
        ),
        ("{path: x, token_weight: 2}", r"data\.instruct\.token_weight=2 needs several sources, got one"),
        ("{path: x, loss_weight: 2}", r"data\.instruct: a loss_weight needs several sources, got one"),
        ("{a: {path: x, loss_weight: 0}, b: {path: x, loss_weight: 1}}", r"loss_weight=0: expected a positive number"),
    ],
)
def test_loss_weights_are_checked(sources, message):
    with pytest.raises(ValueError, match=message):
        compose(["recipe=llava_1_5", "mini=true", "data=llava_json", f"data.instruct={sources}"])


def test_every_step_says_where_its_time_and_its_flops_went(llava_files, tmp_path):
    more = ("device_tflops=0.5", "stages.instruct.train.vision=1e-4", "stages.instruct.validate_every=1")
    overrides = line(llava_files, tmp_path / "run", str(llava_files["instruct"]), *more)
    train(
        *overrides, f"data.validation={llava_files['validation']}", "validation.samples=2", "validation.final_samples=2"
    )
    for record in metrics(tmp_path / "run", "instruct"):
        assert set(record["phase_seconds"]) == {"data", "vision", "forward", "backward", "optimizer"}
        assert 0 < sum(record["phase_seconds"].values()) <= record["step_seconds"]
        assert record["mfu"] == pytest.approx(record["flops"] / record["step_seconds"] / 0.5e12)
        assert "loss_by_source" not in record
    page = (tmp_path / "run" / "report.html").read_text()
    assert "MFU" in page and "backward" in page
