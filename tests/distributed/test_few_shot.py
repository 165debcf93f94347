"""Few-shot scores and demonstrations do not depend on the number of ranks, the batch size and data processes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ..conftest import run_script

SCRIPT = Path(__file__).with_name("few_shot_runs.py")


def test_ranks_and_batches_change_nothing(tmp_path):
    for ranks in (1, 2):
        run_script(SCRIPT, str(tmp_path), ranks=ranks)
    alone, together = (json.loads((tmp_path / f"{ranks}.json").read_text()) for ranks in (1, 2))
    for rices in (False, True):
        (scores, answers), (other_scores, other_answers) = (found[f"rices={rices}"] for found in (alone, together))
        assert {"loss", "loss_1_shots", "blind_exact_match_3_shots", "fewer_than_3_shots"} <= scores.keys()
        assert other_scores == pytest.approx(scores, rel=1e-5)
        for one, other in zip(answers, other_answers, strict=True):
            for shots in (1, 3):
                assert len(one[f"demonstrations_{shots}_shots"]) == shots
                for key in (f"demonstrations_{shots}_shots", f"prediction_{shots}_shots"):
                    assert one[key] == other[key]
            kept = slice(2, 3) if rices else slice(0, 1)  # the nearest is the last
            assert one["demonstrations_1_shots"] == one["demonstrations_3_shots"][kept]
    chosen = [[each["demonstrations_3_shots"] for each in alone[f"rices={rices}"][1]] for rices in (False, True)]
    assert chosen[0] != chosen[1]
