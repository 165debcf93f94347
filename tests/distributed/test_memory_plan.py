"""Memory estimates of `vlmtrain plan` against the memory that small runs use after the engine is created."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ..conftest import run_script

# With these, the C library returns freed memory, so that resident memory equals memory in use.
EXACT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
RUNS = Path(__file__).with_name("memory_runs.py")


@pytest.mark.parametrize(
    "engine, precision, ranks, trained",
    [
        ("zero0", "fp32", 1, "connector+llm"),
        pytest.param("zero1", "fp32", 2, "connector+llm", marks=pytest.mark.slow),
        ("zero2", "bf16", 2, "connector+llm"),
        ("zero3", "fp32", 2, "connector+llm"),
        ("zero0", "fp32", 1, "connector"),
        pytest.param("zero2", "bf16", 2, "connector", marks=pytest.mark.slow),
        ("zero0", "fp32", 1, "connector+llm:nf4"),
        pytest.param("zero2", "bf16", 1, "connector", marks=pytest.mark.slow),
        pytest.param("zero3", "fp32", 2, "connector", marks=pytest.mark.slow),
        pytest.param("zero1", "fp32", 1, "connector+llm", marks=pytest.mark.slow),
        pytest.param("zero2", "fp32", 1, "connector+llm", marks=pytest.mark.slow),
        pytest.param("zero3", "fp32", 1, "connector+llm", marks=pytest.mark.slow),
        pytest.param("zero1", "bf16", 1, "connector+llm", marks=pytest.mark.slow),
        pytest.param("zero1", "bf16", 2, "connector+llm", marks=pytest.mark.slow),
        pytest.param("zero2", "bf16", 1, "connector+llm", marks=pytest.mark.slow),
        pytest.param("zero3", "bf16", 1, "connector+llm", marks=pytest.mark.slow),
        pytest.param("zero3", "bf16", 2, "connector+llm", marks=pytest.mark.slow),
    ],
)
def test_memory_grows_as_planned(engine, precision, ranks, trained, tmp_path):
    batch = "4" if "llm" in trained else "16"  # with little state, activations dominate
    done = run_script(RUNS, str(tmp_path), engine, precision, trained, batch, ranks=ranks, env=EXACT)
    found = json.loads(next(line for line in done.stdout.splitlines() if line.startswith('{"grown"')))
    assert found["planned"] == pytest.approx(found["grown"], rel=0.2), found
