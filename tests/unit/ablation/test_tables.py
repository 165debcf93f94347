"""Tables, note and page of finished jobs."""

from __future__ import annotations

import csv
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from vlmtrain.ablation import Entry, read_line, read_results
from vlmtrain.ablation.page import _losses, _side_by_side
from vlmtrain.ablation.results import _by_category
from vlmtrain.ablation.show import note, tables, write_results

from .jobs import QUICKSTART, finished_job


def test_seeds_may_have_different_numbers_of_steps(tmp_path):
    """As with packed rows of an epoch: the curves end where the shortest seed ends."""
    ablation = read_line([*QUICKSTART, "seeds=[0,1]", "stage=instruct", f"run_dir={tmp_path}"])
    for choice in ablation.choices:
        for seed in ablation.seeds:
            file = ablation.job(choice, seed) / "instruct" / "metrics.jsonl"
            file.parent.mkdir(parents=True)
            records = [{"step": step, "loss": 1 / step} for step in range(1, 12 + seed)]
            file.write_text("".join(json.dumps(record) + "\n" for record in records))
    lines = re.findall(r'<polyline points="([^"]*)"', _losses(ablation, ablation.choices))
    assert [len(line.split()) for line in lines] == [11, 11]


def test_answers_side_by_side_are_of_several_images(tmp_path):
    """Four questions about each of six images: each image's first two, in their order."""
    ablation = read_line([*QUICKSTART, f"run_dir={tmp_path}"])
    asked = {"reference": "red", "prediction": "red", "exact": True, "category": None}
    samples = [
        {"turn": turn, "question": f"{turn} of {picture}?", "pictures": [f"data:{picture}"], **asked}
        for picture in range(6)
        for turn in range(4)
    ]
    for choice in ablation.choices:
        folder = ablation.job(choice, 0) / "instruct"
        folder.mkdir(parents=True)
        (folder / "samples.json").write_text(json.dumps(samples))
    page = _side_by_side(ablation, ablation.choices)
    shown = re.findall(r"<dt>(.*?)</dt>", page)
    assert shown == [f"{turn} of {picture}?" for picture in range(6) for turn in range(2)]


def table_of(folder: Path, line: list[str], jobs: dict[str, dict]) -> tuple[list[Entry], str]:
    """Entries and note of finished jobs, given by folder with their questions and samples."""
    ablation = read_line(["recipe=quickstart", "stage=instruct", *line, f"run_dir={folder}"])
    for name, facts in jobs.items():
        finished_job(folder / "jobs" / name / "seed-0" / "instruct", np.random.default_rng(3), **facts)
    entries = read_results(ablation)
    write_results(ablation, entries)
    return entries, (folder / "ablation.md").read_text()


def test_the_note_names_choices_that_score_as_well_without_the_image(tmp_path):
    jobs = ["connectors=[mlp,linear]"], {"mlp": {}, "linear": {}}
    entries, said = table_of(tmp_path, *jobs)
    assert "without the image" not in said
    ablation = read_line([*QUICKSTART, f"run_dir={tmp_path}"])
    blinded = [replace(entry, blind=entry.score) if entry.label == "mlp" else entry for entry in entries]
    assert "At least as good without the image: mlp. " in note(ablation, blinded)


def test_the_note_states_what_an_axis_makes_unequal(tmp_path):
    line = ["connectors=[mlp]", "axis.stages.instruct.batch_size=[8,32]"]
    jobs = {"mlp-instruct.batch_size-8": {"samples": 8}, "mlp-instruct.batch_size-32": {"samples": 32}}
    entries, said = table_of(tmp_path, line, jobs)
    assert {entry.samples for entry in entries} == {8, 32}
    with open(tmp_path / "ablation.csv") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["score"]) for row in rows] == [entry.score for entry in entries]
    assert [float(row["interval.high"]) for row in rows] == [entry.interval[1] for entry in entries]
    assert {row["samples"] for row in rows} == {"8", "32"} and rows[0]["steps.instruct"] == "1"
    assert (
        "| samples |" in said and "Equal for all, except for what stages.instruct.batch_size changes: steps (" in said
    )


def test_answers_to_different_questions_are_not_compared(tmp_path):
    line = ["connectors=[mlp]", "axis.data.difficulty=[1,2,3]", "data=probes"]
    names = [f"mlp-data.difficulty-{level}" for level in (1, 2, 3)]
    asked = ["What is", "What is", "Where is"]
    entries, said = table_of(tmp_path, line, {name: {"question": words} for name, words in zip(names, asked)})
    told = {entry.label: entry.p_value for entry in entries}
    assert list(told.values()).count(None) == 2 and told["mlp, data.difficulty=3"] is None
    assert said.count("other questions") == 1 and said.count("| the best |") == 1


@pytest.mark.parametrize("right", [0.9, 0.1])
def test_missing_scores_are_left_blank_in_the_tables(right, tmp_path):
    """An axis may change the data, and with it the scores and categories, of the best choice or of others."""
    line = ["connectors=[mlp]", "axis.data=[shapes,probes]"]
    jobs = {"mlp-data-shapes": {"right": right}, "mlp-data-probes": {"right": 1 - right, "category": "text"}}
    entries, said = table_of(tmp_path, line, jobs)
    assert {tuple(entry.by_category) for entry in entries} == {(), ("text",)}
    assert said.count("| mlp, data=shapes | - |\n") == 2
    assert "| mlp, data=probes | 1.0000 (0.5000) |\n" in said


def test_scores_with_demonstrations_are_shown_beside_those_without(tmp_path):
    jobs = {"mlp": {"fewer": 3}, "linear": {"fewer": 0}}
    line = ["connectors=[mlp,linear]", "metric=exact_match_4_shots"]
    entries, said = table_of(tmp_path, line, jobs)
    assert [(entry.score, entry.blind) for entry in entries] == [(1.0, 0.5)] * 2
    assert "| exact match 4 shots |" in said and "max_length left no room for some demonstrations: mlp (3 conv" in said
    assert "linear (" not in said
    table = tables(read_line(["recipe=quickstart", *line]), entries)["Other scores (blind)"]
    assert table[0] == ("", "exact match") and {row[1] for row in table[1:]} == {
        f"{entry.scores['exact_match']:.1%} (0.0%)" for entry in entries
    }
    by_default = tables(read_line(["recipe=quickstart", line[0]]), entries)["Other scores (blind)"]
    assert by_default == [("", "exact match 4 shots"), ("mlp", "100.0% (50.0%)"), ("linear", "100.0% (50.0%)")]


def test_a_category_has_its_own_score_and_blind_score():
    rng = np.random.default_rng(0)
    seeds = [
        [
            {
                "conversation": i // 2,
                "category": ("color", "count")[i % 2],
                "scores": {"exact_match": float(rng.random() < 0.8)},
                "blind_scores": {"exact_match": float(rng.random() < 0.3)},
            }
            for i in range(60)
        ]
        for _ in range(2)
    ]
    found = _by_category(seeds, "exact_match")
    assert list(found) == ["color", "count"]
    for kind, (score, (low, high), blind) in found.items():
        own = [answer for seed in seeds for answer in seed if answer["category"] == kind]
        assert score == pytest.approx(np.mean([answer["scores"]["exact_match"] for answer in own]))
        assert blind == pytest.approx(np.mean([answer["blind_scores"]["exact_match"] for answer in own]))
        assert low <= score <= high
    ablation = read_line(["recipe=quickstart", "connectors=[mlp]"])
    one = Entry("mlp", 0.8, (0.7, 0.9), [], by_category={"color": (0.8, (0.7, 0.9), 0.25)})
    assert tables(ablation, [one])["exact match by category (blind)"] == [
        ("", "color"),
        ("mlp", "80.0% ± 10.0% (25.0%)"),
    ]
