"""What a run says of itself: wandb without account or network, the log, the documented metrics, the page."""

from __future__ import annotations

import json
import re

import pytest

from ..conftest import data_overrides, metrics, train

METRICS = {
    *("step", "loss", "grad_norm", "learning_rate", "samples", "tokens", "image_tokens", "target_tokens"),
    *("padding_fraction", "step_seconds", "data_seconds", "samples_per_second", "tokens_per_second"),
    "peak_memory_bytes",
}


@pytest.fixture(scope="module")
def run_dir(llava_files, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "tracked"
    train(
        *("recipe=llava_1_5", "mini=true", *data_overrides(llava_files), f"run_dir={folder}", "wandb=offline"),
        *("stages.align.max_steps=2", "stages.align.batch_size=4", "stages.instruct.batch_size=4"),
        *("stages.instruct.max_steps=4", "stages.instruct.validate_every=2", "validation.final_samples=4"),
        env={"WANDB_API_KEY": "", "WANDB_SILENT": "true"},
    )
    return folder


def test_wandb_offline_needs_no_account(run_dir):
    assert list(run_dir.glob("wandb/offline-run-*/*.wandb"))


def test_metrics_have_the_documented_keys(run_dir):
    records = metrics(run_dir, "instruct")
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    for record in records:
        assert set(record) == METRICS
        assert set(record["learning_rate"]) == {"connector", "llm"}
        assert 0 <= record["padding_fraction"] < 1 and record["image_tokens"] < record["tokens"]


def test_summary_proves_what_was_frozen_and_scores(run_dir):
    summary = json.loads((run_dir / "align" / "summary.json").read_text())
    for part, facts in summary["parts"].items():
        assert (facts["sha256_before"] == facts["sha256_after"]) == (part != "connector")
    assert {"loss", "exact_match", "blind_exact_match", "questions"} <= set(summary["validation"])


def test_the_page_stands_alone(run_dir):
    page = (run_dir / "report.html").read_text()
    assert page.count("<svg") == 6 and "data:image/jpeg;base64," in page
    assert not re.search(r'(src|href)="(?!data:)', page) and "<script" not in page
    assert "frozen" in page and "What color is this?" in page


def test_the_log_has_sparse_lines(run_dir):
    log = (run_dir / "train.log").read_text()
    assert "stage align: 2 steps" in log and "frozen" in log and "step 4/4" in log
