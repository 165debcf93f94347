"""Parts that start to train within a stage: equal to a plain torch loop with any engine, interrupted or not."""

from __future__ import annotations

import json
import signal

import pytest
import torch

from ..conftest import data_overrides, metrics, train
from ..end_to_end.test_resume import interrupt, line

FROM_STEP = 4
STEPS = 8
GROUPS = f"[{{match: 'llm.layers[1:]', lr: 2e-3}}, {{match: vision, lr: 1e-3, from_step: {FROM_STEP}}}]"


def single_stage(files, run_dir) -> list[str]:
    return [
        "recipe=llava_1_5",
        "mini=true",
        *data_overrides(files),
        "data.validation=null",
        f"run_dir={run_dir}",
        "workers=0",
        "stage=align",
        f"stages.align.max_steps={STEPS}",
        "stages.align.batch_size=8",
        "stages.align.fresh=[vision,connector,llm]",
        f"stages.align.groups={GROUPS}",
        "stages.align.optimizer.weight_decay=0.1",
        "stages.align.optimizer.eps=1e-4",  # otherwise AdamW's first step amplifies gradients that are rounding errors
        "stages.align.max_grad_norm=null",
        "stages.align.schedule.name=constant",
        "stages.align.schedule.warmup_ratio=0",
    ]


def plain_torch(overrides: list[str]) -> list[float]:
    """The losses of the same stage in a plain torch loop, where AdamW gets each parameter when it starts to train."""
    from vlmtrain.data.loader import StepStream, step_loader
    from vlmtrain.data.sources import build_source
    from vlmtrain.model import VLMWrapper
    from vlmtrain.objectives import LanguageModelling
    from vlmtrain.settings import compose
    from vlmtrain.training.assembly import build_parts, build_tokenizer
    from vlmtrain.training.batching import build_batching
    from vlmtrain.training.processing import build_processor, image_size_of

    settings = compose(overrides)
    stage, tokenizer, objective = settings.stages["align"], build_tokenizer(settings), LanguageModelling()
    parts = build_parts(settings, stage, None, tokenizer)
    processor = build_processor(settings, stage, parts, objective, tokenizer)
    source = build_source(settings.data.split("align"), image_size_of(parts), settings.seed)
    batching = build_batching(source, processor, stage, 1, 0)
    model = VLMWrapper(parts["vision"], parts["connector"], parts["llm"]).eval()
    fixed = {parameter for parameter in model.parameters() if not parameter.requires_grad}  # sine and cosine positions
    model.requires_grad_(False)
    last_layers = model.llm.model.layers[1:]
    decays = {True: 0.1, False: 0.0}  # matrices, and the rest

    def groups(module, lr):
        trained = [parameter.requires_grad_() for parameter in module.parameters() if parameter not in fixed]
        for is_matrix, decay in decays.items():
            params = [p for p in trained if (p.ndim >= 2) == is_matrix]
            if params:
                yield {"params": params, "lr": lr, "weight_decay": decay}

    optimizer = torch.optim.AdamW([*groups(model.connector, 1e-3), *groups(last_layers, 2e-3)], eps=1e-4)
    losses = []
    stream = StepStream(batching, source, processor, 0, 1, 0, STEPS, None)
    for step, data in enumerate(step_loader(stream, 0, pin_memory=False)):
        if step == FROM_STEP:
            for group in groups(model.vision, 1e-3):
                optimizer.add_param_group(group)
        (batch,) = data.micro_batches
        loss = objective(model, batch, None) / data.weight
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.fixture(scope="module")
def reference(llava_files, tmp_path_factory) -> list[float]:
    return plain_torch(single_stage(llava_files, tmp_path_factory.mktemp("plain")))


@pytest.mark.parametrize(
    "engine, ranks",
    [
        ("zero0", 1),
        pytest.param("zero1", 1, marks=pytest.mark.slow),
        pytest.param("zero2", 2, marks=pytest.mark.slow),
        ("zero3", 2),
    ],
)
def test_losses_equal_those_of_plain_torch(engine, ranks, reference, llava_files, tmp_path):
    more = ["engine.parameter_persistence_threshold=0"] if engine == "zero3" else []
    train(*single_stage(llava_files, tmp_path), f"engine={engine}", *more, ranks=ranks)
    found = metrics(tmp_path, "align")
    assert [record["loss"] for record in found] == pytest.approx(reference, rel=1e-5)
    rates = [set(record["learning_rate"]) for record in found]
    assert rates == [{"connector", "llm.layers[1:]"}] * FROM_STEP + [{"connector", "llm.layers[1:]", "vision"}] * (
        STEPS - FROM_STEP
    )
    parts = json.loads((tmp_path / "align" / "summary.json").read_text())["parts"]
    assert {name for name, part in parts.items() if part["trained"]} == {"vision", "connector", "llm"}


@pytest.mark.parametrize(
    "engine, precision, ranks", [("zero2", "bf16", 1), pytest.param("zero3", "fp32", 2, marks=pytest.mark.slow)]
)
def test_an_interruption_after_the_unfreezing_changes_nothing(engine, precision, ranks, llava_files, tmp_path):
    more = [f"engine={engine}", f"precision={precision}"]
    more.append("stages.instruct.groups=[{match: vision, lr: 1e-4, from_step: 7}]")
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train(*line(llava_files, whole, *more), ranks=ranks)
    interrupt(line(llava_files, broken, *more), broken, ranks, 8, signal.SIGKILL)
    train(*line(llava_files, broken, *more), ranks=ranks)
    for key in ("step", "loss", "grad_norm", "learning_rate"):
        assert [r[key] for r in metrics(broken, "instruct")] == [r[key] for r in metrics(whole, "instruct")]
