"""Every connector trains: the loss falls, every tensor changes, ZeRO-3 on two ranks agrees, reloading is exact."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from vlmtrain.connectors import CONNECTORS

from ..conftest import metrics, run_script

WORKER = Path(__file__).with_name("connector_runs.py")
NAMES = sorted(CONNECTORS.keys() - {"identity"})  # which has no weights, as the tiny parts have one width


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    """One folder of runs per training setup, each from a single process group."""
    folders = {}
    for way, ranks, engine, precision in (
        ("alone", 1, "zero0", "fp32"),
        ("two ranks, ZeRO-3", 2, "zero3", "fp32"),
        ("bf16", 1, "zero0", "bf16"),
    ):
        folder = tmp_path_factory.mktemp("connectors")
        run_script(WORKER, str(folder), engine, precision, *NAMES, ranks=ranks)
        folders[way] = folder
    return folders


@pytest.mark.parametrize("name", NAMES)
def test_the_loss_falls_and_every_tensor_changes(name, runs):
    losses = [record["loss"] for record in metrics(runs["alone"] / name, "instruct")]
    assert losses[-1] < 0.9 * losses[0]
    before = load_file(runs["alone"] / name / "initial_connector.safetensors")
    after = load_file(runs["alone"] / name / "instruct" / "model" / "connector" / "model.safetensors")
    still = [key for key in before if torch.equal(before[key], after[key])]
    # constants such as position tables and batch statistics are saved, but not trained
    trained = json.loads((runs["alone"] / name / "trained.json").read_text())
    assert not set(still) & set(trained)


@pytest.mark.parametrize("name", NAMES)
def test_two_ranks_under_zero3_equal_one(name, runs):
    alone, together = (metrics(runs[way] / name, "instruct") for way in ("alone", "two ranks, ZeRO-3"))
    assert together[0]["grad_norm"] == pytest.approx(alone[0]["grad_norm"], rel=1e-4)
    for one, two in zip(alone, together):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_bf16_stays_finite_and_close(name, runs):
    exact, rounded = (metrics(runs[way] / name, "instruct") for way in ("alone", "bf16"))
    assert all(math.isfinite(record["loss"]) for record in rounded)
    assert rounded[-1]["loss"] == pytest.approx(exact[-1]["loss"], rel=0.05)


@pytest.mark.parametrize("name", NAMES)
def test_a_reloaded_model_scores_the_same(name, runs):
    found = json.loads((runs["alone"] / name / "reloaded.json").read_text())
    summary = json.loads((runs["alone"] / name / "instruct" / "summary.json").read_text())
    assert found["loss"] == pytest.approx(summary["validation"]["loss"], rel=1e-6)
