"""Optimizers by name and the average of the weights: equal to a plain torch loop, and resumed bit for bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from vlmtrain.model.parts import load_part, module_state
from vlmtrain.settings import compose

from ..conftest import data_overrides, metrics, run_script, train

STEPS = 6
DECAY = 0.8
RATE, WEIGHT_DECAY = 2e-3, 0.1
MOMENTS = Path(__file__).parents[1] / "end_to_end" / "moment_runs.py"


def line(files, run_dir, *more: str) -> list[str]:
    return [
        *("recipe=llava_1_5", "mini=true", *data_overrides(files), "data.validation=null", f"run_dir={run_dir}"),
        *("workers=0", "stage=align", "stages.align.fresh=[vision,connector,llm]", "stages.align.batch_size=8"),
        *(f"stages.align.max_steps={STEPS}", f"stages.align.train={{connector: {RATE}, llm: {RATE}}}"),
        *(f"stages.align.optimizer.weight_decay={WEIGHT_DECAY}", "stages.align.optimizer.eps=1e-4"),
        *("stages.align.max_grad_norm=null", "stages.align.schedule.name=constant"),
        *("stages.align.schedule.warmup_ratio=0", *more),
    ]


def orthogonalized(update: Tensor) -> Tensor:
    """Muon's five Newton-Schulz iterations in bfloat16 (Jordan et al. 2024)."""
    a, b, c = 3.4445, -4.775, 2.0315
    x = update.bfloat16()
    x = x.T if update.shape[0] > update.shape[1] else x
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)  # rounded once each
    return x.T if update.shape[0] > update.shape[1] else x


class PlainMuon:
    """Momentum 0.95 with Nesterov's look-ahead, scaled to AdamW's root mean square of 0.2, and decoupled decay."""

    def __init__(self, matrices: list[nn.Parameter]):
        self.momenta = {matrix: torch.zeros_like(matrix) for matrix in matrices}

    @torch.no_grad()
    def step(self) -> None:
        for matrix, momentum in self.momenta.items():
            momentum.lerp_(matrix.grad, 1 - 0.95)
            update = orthogonalized(matrix.grad.lerp(momentum, 0.95))
            matrix.mul_(1 - RATE * WEIGHT_DECAY)
            matrix.add_(update, alpha=-RATE * 0.2 * max(matrix.shape) ** 0.5)


def plain_torch(overrides: list[str], name: str) -> tuple[list[float], dict[str, Tensor]]:
    """The losses of the stage in a plain loop, and the average of its weights."""
    from vlmtrain.data.loader import StepStream, step_loader
    from vlmtrain.data.sources import build_source
    from vlmtrain.model import VLMWrapper
    from vlmtrain.objectives import LanguageModelling
    from vlmtrain.training.assembly import build_parts, build_tokenizer
    from vlmtrain.training.batching import build_batching
    from vlmtrain.training.processing import build_processor, image_size_of

    settings = compose(overrides)
    stage, tokenizer, objective = settings.stages["align"], build_tokenizer(settings), LanguageModelling()
    parts = build_parts(settings, stage, None, tokenizer)
    processor = build_processor(settings, stage, parts, objective, tokenizer)
    source = build_source(settings.data.split("align"), image_size_of(parts), settings.seed)
    model = VLMWrapper(parts["vision"], parts["connector"], parts["llm"]).eval()
    model.vision.requires_grad_(False)
    trained = {**dict(model.connector.named_parameters()), **dict(model.llm.named_parameters())}
    matrices = [p for p in trained.values() if p.ndim >= 2]
    vectors = [p for p in trained.values() if p.ndim < 2]
    embeddings = {model.llm.get_input_embeddings().weight, model.llm.get_output_embeddings().weight}
    by_muon = [p for p in matrices if p not in embeddings] if name == "muon" else []
    groups = [
        {"params": [p for p in matrices if not any(p is other for other in by_muon)], "weight_decay": WEIGHT_DECAY},
        {"params": vectors, "weight_decay": 0.0},
    ]
    if name == "adamw_8bit":
        from bitsandbytes.optim import AdamW8bit

        optimizers = [AdamW8bit(groups, lr=RATE, eps=1e-4)]
    else:
        optimizers = [torch.optim.AdamW(groups, lr=RATE, eps=1e-4), PlainMuon(by_muon)]
    averages = {key: p.detach().clone() for key, p in trained.items()}
    losses = []
    batching = build_batching(source, processor, stage, 1, 0)
    for data in step_loader(StepStream(batching, source, processor, 0, 1, 0, STEPS, None), 0, pin_memory=False):
        (batch,) = data.micro_batches
        loss = objective(model, batch, None) / data.weight
        model.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        for key, p in trained.items():
            averages[key] = DECAY * averages[key] + (1 - DECAY) * p.detach()
        losses.append(loss.item())
    return losses, averages


@pytest.fixture(scope="module")
def references(llava_files, tmp_path_factory) -> dict[str, tuple[list[float], dict[str, Tensor]]]:
    command = line(llava_files, tmp_path_factory.mktemp("plain"))
    return {name: plain_torch(command, name) for name in ("adamw", "adamw_8bit", "muon")}


@pytest.mark.parametrize(
    "name, engine, ranks",
    [
        ("muon", "zero0", 1),
        ("adamw_8bit", "zero0", 1),
        ("adamw", "zero2", 2),
        ("adamw", "zero3", 2),
        pytest.param("muon", "zero0", 2, marks=pytest.mark.slow),
        pytest.param("adamw", "zero0", 2, marks=pytest.mark.slow),
        pytest.param("adamw", "zero1", 1, marks=pytest.mark.slow),
    ],
)
def test_losses_and_averages_equal_those_of_plain_torch(name, engine, ranks, references, llava_files, tmp_path):
    more = ["engine.parameter_persistence_threshold=0"] if engine == "zero3" else []
    more += [f"stages.align.optimizer.name={name}", f"stages.align.ema={DECAY}", f"engine={engine}"]
    train(*line(llava_files, tmp_path, *more), ranks=ranks)
    losses, averages = references[name]
    # Muon's iterations, in bfloat16, amplify the rounding of gradients, even more that of sums over two ranks
    tolerance = {1: 1e-4, 2: 1e-3}[ranks] if name == "muon" else 1e-5
    assert [record["loss"] for record in metrics(tmp_path, "align")] == pytest.approx(losses, rel=tolerance)
    found = {}
    for part in ("connector", "llm"):
        found |= module_state(load_part(part, tmp_path / "align" / "ema"))
    for key, expected in averages.items():
        assert (found[key] - expected).norm() <= 10 * tolerance * expected.norm(), key
    final = module_state(load_part("llm", tmp_path / "align" / "model"))
    assert any(not torch.equal(final[key], found[key]) for key in final)


@pytest.mark.parametrize(
    "name, engine, precision, ranks",
    [
        ("muon", "zero0", "fp32", 1),
        ("adamw_8bit", "zero2", "bf16", 2),
        pytest.param("adamw_8bit", "zero0", "fp32", 1, marks=pytest.mark.slow),
        pytest.param("adamw", "zero3", "fp32", 2, marks=pytest.mark.slow),
    ],
)
def test_a_stopped_stage_resumes_bit_for_bit(name, engine, precision, ranks, llava_files, tmp_path):
    more = [f"stages.align.optimizer.name={name}", f"stages.align.ema={DECAY}", f"engine={engine}"]
    more.append(f"precision={precision}")
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train(*line(llava_files, whole, *more), ranks=ranks)
    run_script(MOMENTS, "SIGTERM@metrics.jsonl:3", "--", *line(llava_files, broken, *more), ranks=ranks)
    assert len(metrics(broken, "align")) == 4  # the signal is seen in the next step
    if name == "adamw_8bit" and ranks == 2:
        refused = train(*line(llava_files, broken, *more), check=False)
        assert refused.returncode and "resumes with the same number of ranks, not with 1" in refused.stderr
    train(*line(llava_files, broken, *more), ranks=ranks)
    for key in ("step", "loss", "grad_norm"):
        assert [r[key] for r in metrics(broken, "align")] == [r[key] for r in metrics(whole, "align")]
    for folder in ("model", "ema"):
        manifests = [json.loads((run / "align" / folder / "vlmtrain.json").read_text()) for run in (whole, broken)]
        assert manifests[0] == manifests[1]


def test_a_stage_of_matrices_alone_resumes_bit_for_bit(llava_files, tmp_path):
    """Muon does not count its updates, and no parameter of AdamW does it here."""
    more = ["stages.align.optimizer.name=muon", f"stages.align.ema={DECAY}", "stages.align.train={connector: null}"]
    more += ["stages.align.train.llm=null", f"stages.align.groups=[{{match: 'llm.*q_proj*', lr: {RATE}}}]"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train(*line(llava_files, whole, *more))
    run_script(MOMENTS, "SIGTERM@metrics.jsonl:3", "--", *line(llava_files, broken, *more))
    train(*line(llava_files, broken, *more))
    for folder in ("model", "ema"):
        manifests = [json.loads((run / "align" / folder / "vlmtrain.json").read_text()) for run in (whole, broken)]
        assert manifests[0] == manifests[1]


@pytest.mark.parametrize(
    "more, said",
    [
        (["stages.align.optimizer.name=muon", "engine=zero2"], "set engine=zero0 and precision=fp32"),
        (["stages.align.optimizer.name=muon", "precision=bf16"], "set engine=zero0 and precision=fp32"),
        (["stages.align.optimizer.name=adamw_8bit", "engine=zero3"], "supports engine=zero0, zero1 and zero2"),
        (["stages.align.optimizer.name=adam"], "expected one of adamw, adamw_8bit, muon"),
        (["stages.align.ema=1"], "stages.align.ema=1: expected a number above 0 and below 1, or null"),
    ],
)
def test_optimizers_are_refused_where_they_do_not_apply(more, said):
    with pytest.raises(ValueError, match=said):
        compose(["recipe=llava_1_5", "mini=true", *more])
