"""A run on a stream that was stopped resumes with the same records as an uninterrupted one."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from ..conftest import metrics, train
from .test_exact_moments import SAME, struck

STEPS = 7


@pytest.fixture
def shards(llava_files, tmp_path) -> Path:
    """The captions of `llava_files` in three files."""
    records = json.loads(llava_files["align"].read_text())
    (tmp_path / "shards").mkdir()
    for file in range(3):
        some = records[file * 8 : file * 8 + 8]
        rows = [
            {"image": each["image"], "caption": each["conversations"][1]["value"] * (1 + each["id"] % 5)}
            for each in some
        ]
        (tmp_path / "shards" / f"{file}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path / "shards"


def test_a_run_on_a_stream_resumes_exactly(shards, llava_files, tmp_path):
    def line(name: str) -> list[str]:
        source = f"{{path: {shards}, streaming: true, samples: 16, shuffle_buffer: 4}}"
        stage = [f"stages.align.{key}" for key in (f"max_steps={STEPS}", "batch_size=4", "micro_batch_size=2")]
        parts = ["recipe=llava_1_5", "mini=true", "stage=align", "workers=2", f"run_dir={tmp_path / name}"]
        return [*parts, *stage, "data=hf", f"data.align={source}", f"data.images={llava_files['images']}"]

    whole = train(*line("whole"))
    assert "is streamed: records are shuffled only within a buffer of 4" in whole.stdout
    stopped = struck("SIGTERM@metrics.jsonl:3", line=line("broken"))
    assert stopped.returncode == 0 and "run the same command to resume" in stopped.stdout
    train(*line("broken"))
    ours, theirs = (metrics(tmp_path / name, "align") for name in ("broken", "whole"))
    assert [[record[key] for key in SAME] for record in ours] == [[record[key] for key in SAME] for record in theirs]
    assert len({record["loss"] for record in ours}) == len(ours) == STEPS
    summary = json.loads((tmp_path / "broken" / "align" / "summary.json").read_text())
    assert summary["data"]["align"]["samples"] == 4 * STEPS
    versions = OmegaConf.load(tmp_path / "broken" / "config.yaml").versions
    assert versions.datasets == version("datasets")  # another version shuffles in another order
