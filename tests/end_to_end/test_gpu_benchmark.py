"""The GPU benchmark with tiny shapes on the CPU: all that it does, but for the sizes and the kernels."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from ..conftest import ROOT

COMMAND = [str(ROOT / "benchmarks" / "gpu.sh"), "--tiny"]
ROWS = [
    f"{model} {workload} {side}"
    for model in ("0.6B", "7B")
    for workload in ("align", "instruct")
    for side in ("padded", "packed", "padded compiled", "packed compiled", "trainer")
]


def numbers(values: object) -> Iterator[float]:
    if isinstance(values, dict | list):
        for each in values.values() if isinstance(values, dict) else values:
            yield from numbers(each)
    elif isinstance(values, int | float):
        yield values


def run(tmp_path, *options: str) -> tuple[subprocess.CompletedProcess, dict, str]:
    command = [*COMMAND, "--out", str(tmp_path), *options]
    environment = {**os.environ, "PYTHON": sys.executable}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=1800)
    return done, json.loads((tmp_path / "gpu.json").read_text())["pieces"], (tmp_path / "gpu.md").read_text()


@pytest.mark.slow
def test_all_pieces(tmp_path):
    done, pieces, page = run(tmp_path, "--minutes", "30")
    assert done.returncode == 0, done.stderr[-3000:]
    compiled = [name for name in ROWS if name.endswith("compiled") and name != "0.6B instruct packed compiled"]
    assert {name for name, piece in pieces.items() if piece["status"] != "done"} == set(compiled)
    for name in ROWS:
        assert f"\n| {name} | " in page, name
    for name, piece in pieces.items():
        assert f"\n| {name} | {piece['status']} | " in page
        assert all(map(math.isfinite, numbers(piece["values"]))), name
    for name in set(ROWS) - set(compiled):
        values = pieces[name]["values"]
        assert values["samples_per_second"] > 0 and 0 < values["mfu"] < 1 and values["peak"] > 2**20
        assert name.endswith("trainer") or {"vision", "forward", "backward"} <= values["phases"].keys()
    for model in ("0.6B", "7B"):
        for workload in ("align", "instruct"):
            ours, theirs = (pieces[f"{model} {workload} {side}"]["values"]["first"] for side in ("padded", "trainer"))
            assert abs(ours - theirs) < 1e-4 * theirs  # swapped images differ by 3e-4 or more
        ranked = pieces[f"{model}: profile"]["values"]["ranked"]
        assert ranked["matrix products"] > 0 and list(ranked.values()) == sorted(ranked.values(), reverse=True)
    stage = pieces["speedrun stage 1"]["values"]
    assert stage["hours"] == pytest.approx(558128 / stage["samples_per_second"] / 3600)


@pytest.mark.slow
def test_without_time_every_piece_is_listed_as_not_run(tmp_path):
    done, pieces, page = run(tmp_path, "--minutes", "0.01")
    assert done.returncode == 1
    assert {piece["status"] for piece in pieces.values()} == {"not run", "left out"}
    assert all(f"| {name} | " in page for name in ROWS)
