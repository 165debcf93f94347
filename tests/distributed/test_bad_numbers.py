"""Non-finite numbers on one rank: all ranks skip the step, report its samples, and stop after too many of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ..conftest import metrics, run_script
from .bad_number_runs import CASES, GRADIENT, HIGH, LOSS, STEPS

ALONE = ("zero0-fp32",)
WORKER = Path(__file__).with_name("bad_number_runs.py")


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[int, Path]:
    folders = {}
    for ranks in (1, 2):
        folders[ranks] = tmp_path_factory.mktemp("runs")
        run_script(WORKER, str(folders[ranks]), *(CASES if ranks == 2 else ALONE), ranks=ranks)
    return folders


def bad_steps(folder: Path) -> dict[int, dict]:
    lines = (folder / "instruct" / "bad_steps.jsonl").read_text().splitlines()
    return {record["step"]: record for record in map(json.loads, lines)}


@pytest.mark.parametrize("ranks, name", [(2, case) for case in CASES] + [(1, case) for case in ALONE])
def test_a_bad_step_does_not_change_the_state(ranks, name, runs):
    found = bad_steps(runs[ranks] / name)
    assert {record["problem"] for record in found.values()} == {"the loss is not finite", "the gradient is not finite"}
    for record in found.values():
        assert record["skipped"]
        if "loss" in record["problem"]:
            assert record["samples"] == [LOSS] and record["loss"] is None
        else:
            assert GRADIENT in record["samples"] and len(record["samples"]) == 4 and record["loss"] > 0
    states = json.loads((runs[ranks] / "report.json").read_text())[name]
    assert [state["step"] for state in states] == list(range(1, STEPS + 1))
    for state in states:
        assert state["same"] == (state["step"] in found) and state["updates"] != state["same"]
    for record in metrics(runs[ranks] / name, "instruct"):
        assert (record["grad_norm"] is None) == (record["step"] in found)


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_skip_the_same_steps_as_one(name, runs):
    alone, together = runs[1] / "zero0-fp32", runs[2] / name
    assert list(bad_steps(alone)) == list(bad_steps(together))
    if name.endswith("fp32"):
        losses = [[record["loss"] for record in metrics(folder, "instruct")] for folder in (alone, together)]
        assert losses[1] == [loss if loss is None else pytest.approx(loss, rel=1e-4) for loss in losses[0]]


def test_a_run_stopped_after_bad_steps_resumes_bit_for_bit(runs):
    whole, broken = (runs[2] / name for name in ("zero1-bf16", "interrupted"))
    for key in ("step", "loss", "grad_norm", "learning_rate"):
        assert [r[key] for r in metrics(broken, "instruct")] == [r[key] for r in metrics(whole, "instruct")]
    assert bad_steps(broken) == bad_steps(whole)
    summaries = [json.loads((folder / "instruct" / "summary.json").read_text()) for folder in (whole, broken)]
    for key in ("skipped_steps", "loss_spikes", "data"):
        assert summaries[0][key] == summaries[1][key]
    for part, facts in summaries[0]["parts"].items():
        assert facts["sha256_after"] == summaries[1]["parts"][part]["sha256_after"]


def test_spikes_are_detected_and_skipped(runs):
    for folder in runs.values():
        spikes = {step: r for step, r in bad_steps(folder / "spikes").items() if "deviations" in r["problem"]}
        assert spikes and all(record["skipped"] and HIGH in record["samples"] for record in spikes.values())
        summary = json.loads((folder / "spikes" / "instruct" / "summary.json").read_text())
        assert summary["loss_spikes"] == len(spikes)
        assert min(spikes) > 22


def test_too_many_bad_steps_in_a_row_stop_the_run_and_keep_the_checkpoint_before_them(runs):
    for folder in runs.values():
        said = json.loads((folder / "report.json").read_text())["stopped"]
        assert "4 steps in a row made no update (bad_steps.in_a_row=4); at step 7 the loss is not finite" in said
        saved = [path.name for path in (folder / "stopped" / "instruct" / "checkpoints").iterdir()]
        assert saved == ["step-000003"]


def test_bad_steps_are_counted_across_interruptions(runs):
    """Stopped after step 5 and with a new engine after step 6; all steps are bad from step 4 on."""
    said = json.loads((runs[2] / "report.json").read_text())["stopped in between"]
    assert "4 steps in a row made no update (bad_steps.in_a_row=4); at step 7 the loss is not finite" in said
    saved = sorted(path.name for path in (runs[2] / "between" / "instruct" / "checkpoints").iterdir())
    assert saved == ["step-000003", "step-000005", "step-000006"]
