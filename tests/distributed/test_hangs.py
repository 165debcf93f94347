"""Ranks with different kinds of data do not deadlock, and make the same update as a single rank.

``python -m tests.distributed.hang_runs`` prints the table.
"""

from __future__ import annotations

import re

import pytest

from .hang_runs import ENGINES, KINDS, Table, as_markdown, launch, measure, write_data


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> Table:
    found = measure(tmp_path_factory.mktemp("runs"))
    print(f"\n{as_markdown(found)}")
    return found


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_with_different_data_equal_one(kind, engine, table):
    assert table[kind, engine] < 1e-4


def test_hanging_ranks_report_what_they_do_and_exit(tmp_path):
    write_data(tmp_path / "data", "tiles")
    done = launch(2, str(tmp_path), "--stuck")
    assert done.returncode != 0
    assert len(re.findall(r"^\[rank 1\] hangs: no progress for \d+ s", done.stderr, re.MULTILINE)) == 1
    said = done.stderr[done.stderr.index("[rank 1] hangs") :]
    assert re.search(r"doing: instruct step 2, micro-batch 1 of 2: forward\n  samples: .*tiles-\d\)?\n", said)
    assert re.search(r"in: .*StageModule > LanguageModelling\n", said) and "hang_runs.py" in said
    waiting = done.stderr[done.stderr.index("[rank 0] hangs") :]
    assert re.search(r"doing: instruct step 2, micro-batch \d of 2: (forward|backward)", waiting)
