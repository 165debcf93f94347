"""Ranks whose data differ do not wait for each other for ever, and make the update that one rank makes.

The table is printed with ``pytest -s``.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from ..conftest import metrics, run
from .hang_runs import KINDS, write_data

WORKER = str(Path(__file__).with_name("hang_runs.py"))
ENGINES = ("zero0", "zero1", "zero2", "zero3")


def launched(ranks: int, *words: str, **options):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    return run(*launcher, WORKER, *words, **options)


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> dict[tuple[str, str], float]:
    """The largest relative difference, of losses and of the first gradient norm, between two ranks and one."""
    alone, together = tmp_path_factory.mktemp("alone"), tmp_path_factory.mktemp("together")
    launched(1, str(alone), "zero0")
    launched(2, str(together), *ENGINES)
    found = {}
    for number, kind in enumerate(KINDS):
        wanted = metrics(alone / f"{number}-zero0", "instruct")
        for engine in ENGINES:
            records = metrics(together / f"{number}-{engine}", "instruct")
            assert len(records) == len(wanted) == 4
            pairs = [(record["loss"], other["loss"]) for record, other in zip(records, wanted)]
            pairs.append((records[0]["grad_norm"], wanted[0]["grad_norm"]))
            found[kind, engine] = max(abs(ours - theirs) / abs(theirs) for ours, theirs in pairs)
    print("\n" + " " * 24 + "".join(f"{engine:>10}" for engine in ENGINES))
    for kind in KINDS:
        print(f"{kind:24}" + "".join(f"{found[kind, engine]:10.0e}" for engine in ENGINES))
    return found


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_with_different_data_do_as_one(kind, engine, table):
    assert table[kind, engine] < 1e-4


def test_ranks_that_hang_say_what_they_do_and_end(tmp_path):
    write_data(tmp_path / "data", "tiles")
    done = launched(2, str(tmp_path), "--stuck", check=False)
    assert done.returncode != 0
    assert len(re.findall(r"^\[rank 1\] hangs: nothing new for \d+ s", done.stderr, re.MULTILINE)) == 1
    said = done.stderr[done.stderr.index("[rank 1] hangs") :]
    assert re.search(r"doing: instruct step 2, micro-batch 1 of 2: forward\n  samples: .*tiles-\d\)?\n", said)
    assert re.search(r"in: .*StageModule > LanguageModelling\n", said) and "hang_runs.py" in said
    waiting = done.stderr[done.stderr.index("[rank 0] hangs") :]
    assert re.search(r"doing: instruct step 2, micro-batch \d of 2: (forward|backward)", waiting)
