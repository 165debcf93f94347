"""The command of an ablation, and its statistics compared with known cases."""

from __future__ import annotations

import contextlib
import copy
import csv
import functools
import json
import math
import re
import shutil
import subprocess
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

from vlmtrain.ablation import Entry, compare, read_line, read_results, run_ablation
from vlmtrain.ablation.budget import _equal_steps, decide
from vlmtrain.ablation.page import _losses, _side_by_side
from vlmtrain.ablation.results import Clusters, _by_category, _interval, studentized_range
from vlmtrain.ablation.runner import Runner, device_slots
from vlmtrain.ablation.show import main_table, note, tables, write_results
from vlmtrain.cli import ablate
from vlmtrain.planning.plan import Machine, plan_run
from vlmtrain.reporting.charts import Series, line_chart, scatter_chart
from vlmtrain.settings import compose


@pytest.fixture(scope="module", autouse=True)
def each_line_is_composed_and_planned_once():
    """Ablations compose the same settings and make the same plans over and over."""
    planned = {}

    @functools.cache
    def compose_once(overrides, **options):
        return compose(overrides, **options)

    def plan_once(run, machine):
        key = json.dumps({**run.composed, "run_dir": ""}, sort_keys=True), machine  # no plan depends on the folder
        if key not in planned:
            planned[key] = plan_run(run, machine)
        return copy.deepcopy(planned[key])

    with contextlib.ExitStack() as patches:
        for module in ("budget", "definition", "jobs", "runner"):
            target = f"vlmtrain.ablation.{module}.compose"
            patches.enter_context(mock.patch(target, lambda line, **options: compose_once(tuple(line), **options)))
        for module in ("budget", "results"):
            patches.enter_context(mock.patch(f"vlmtrain.ablation.{module}.plan_run", plan_once))
        yield


def entry(label: str, exact: list[np.ndarray]) -> Entry:
    # five questions per image
    measured = [Clusters.of(seed, np.arange(len(seed)) // 5) for seed in exact]
    return Entry(label, float(np.concatenate(exact).mean()), (0, 0), measured)


def answers(rng, rate: float, seeds: int = 3, questions: int = 500) -> list[np.ndarray]:
    """Seeds with different numbers of questions."""
    return [(rng.random(questions + 5 * seed) < rate).astype(float) for seed in range(seeds)]


def test_a_command_becomes_choices_seeds_and_shared_settings():
    ablation = read_line(
        ["recipe=quickstart", "connectors=[linear,{qformer:{num_queries:8}}]", "seeds=[0,2]", "jobs=2", "workers=0"]
    )
    assert [choice.label for choice in ablation.choices] == ["linear", "qformer-num_queries-8"]
    assert ablation.seeds == (0, 2) and ablation.jobs == 2 and ablation.line == ("recipe=quickstart", "workers=0")
    assert ablation.settings(ablation.choices[1]).connector.options["num_queries"] == 8
    assert str(ablation.folder) == "runs/ablation-quickstart"


def test_axes_multiply_the_choices():
    line = ["recipe=quickstart", "connectors=[linear,mlp]", "axis.stages.align.train.connector=[1e-3,2e-3]"]
    ablation = read_line(
        [*line, "axis.precision=[fp32]", "sweep.stages.instruct.train.llm=[1e-3,5e-4]", "budget=flops"]
    )
    assert [c.label for c in ablation.choices] == [
        f"{name}, align.connector={rate}, precision=fp32" for name in ("linear", "mlp") for rate in ("0.001", "0.002")
    ]
    assert len({c.folder for c in ablation.choices}) == 4 and all("/" not in c.folder for c in ablation.choices)
    settings = ablation.settings(ablation.choices[1])
    assert settings.stages["align"].train["connector"] == 2e-3 and settings.connector.name == "linear"
    assert ablation.sweep_lines() == [["stages.instruct.train.llm=0.001"], ["stages.instruct.train.llm=0.0005"]]


def test_stages_are_shared_by_the_choices_that_agree_on_them(tmp_path):
    line = ["recipe=quickstart", "connectors=[linear,{qformer:{num_queries:8}}]", f"run_dir={tmp_path}"]
    for axis, shared in (("stages.align.train.connector=[1e-3,2e-3]", 1), ("stages.clip.max_steps=[3,4]", 2)):
        ablation = read_line([*line, f"axis.{axis}"])
        runner = Runner(ablation, show_progress=False)
        assert len({runner.shared(choice, 0) for choice in ablation.choices}) == shared


def test_keys_that_do_not_affect_results_do_not_move_shared_stages():
    line = ["recipe=quickstart", "connectors=[linear]"]
    free = ["workers=0", "collective_timeout=99", "wandb=offline", "stages.clip.micro_batch_size=8"]
    first, other, longer = (
        Runner(ablation, False).shared(ablation.choices[0], 0)
        for ablation in map(read_line, (line, [*line, *free, "stages.clip.save_every=5"], [*line, "precision=bf16"]))
    )
    assert first == other != longer


@pytest.mark.parametrize("more, cached", [(["features.max_gb=5"], True), (["features.cache=off"], False)])
def test_features_are_shared_unless_the_command_says_otherwise(more, cached, tmp_path, monkeypatch):
    begun = []
    monkeypatch.setattr(subprocess, "run", lambda command, **options: begun.append(command) or Namespace(returncode=1))
    ablation = read_line(["recipe=quickstart", "connectors=[mlp]", "stage=instruct", f"run_dir={tmp_path}", *more])
    assert run_ablation(ablation, False)
    assert (f"features.cache={tmp_path}/features" in begun[0]) is cached


@pytest.mark.parametrize(("jobs", "ranks", "threads"), [(1, 1, "8"), (2, 1, "4"), (2, 2, "2"), (16, 1, "1")])
def test_jobs_share_the_threads_of_the_machine(jobs, ranks, threads, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    ablation = read_line(["recipe=quickstart", "connectors=[linear]", f"jobs={jobs}", f"ranks={ranks}"])
    with Runner(ablation, False)._slot(tmp_path, "linear seed 0") as environment:
        assert environment["OMP_NUM_THREADS"] == threads
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    with Runner(ablation, False)._slot(tmp_path, "linear seed 0") as environment:
        assert environment["OMP_NUM_THREADS"] == "3", "the user's value is kept"


def test_jobs_get_their_own_devices_if_there_are_enough():
    assert device_slots(list("01234567"), jobs=2, ranks=4) == ["0,1,2,3", "4,5,6,7"]
    assert device_slots(list("01"), jobs=3, ranks=1) == [None] * 3 and device_slots([], 1, 1) == [None]


LINEAR = ["recipe=quickstart", "connectors=[linear]"]


@pytest.mark.parametrize(
    "line, said",
    [
        ([*LINEAR, "stage=instuct"], "unknown stage 'instuct'"),
        (["recipe=quickstart"], r"connectors=\[...\] is not set"),
        (["recipe=quickstart", "connectors=[linear,linear]"], r"connectors=\['linear', 'linear'\]: duplicate entry"),
        ([*LINEAR, "axis.precision=[fp32,fp32]"], r"axis.precision=\['fp32', 'fp32'\]: duplicate entry"),
        (
            [*LINEAR, "axis.wandb_project=['a+b','a*b']"],
            "two choices would use the same folder linear-wandb_project-a-b-",
        ),
        ([*LINEAR, "axis.precision=[fp32]", "axis.precision=[bf16]"], "axis.precision is given twice"),
        (
            [*LINEAR, "budget=flops", "axis.stages.instruct.max_steps=[10,40]"],
            "^axis.stages.instruct.max_steps: budget=flops sets the steps of each choice; expected budget=steps$",
        ),
        ([*LINEAR, "budget=samples", "sweep.stages.instruct.batch_size=[8,16]"], "budget=samples sets the steps"),
        (["recipe=quickstart", "connectors=[]"], "non-empty list"),
        (["recipe=quickstart", "connectors=[linear]", "seeds=[a]"], "seeds=a"),
        (["recipe=quickstart", "connectors=[linear]", "jobs=0"], "jobs=0"),
        (["recipe=quickstart", "connectors=[linear]", "connector=mlp"], "connector=mlp"),
        (["recipe=quickstart", "connectors=[lineal]"], "Did you mean 'linear'"),
        (["recipe=quickstart", "connectors=[[linear]]"], "expected a name"),
        (["recipe=quickstart", "connectors=[mlp]", "budget=flop"], "budget=flop: .* Did you mean 'flops'"),
        (["recipe=quickstart", "connectors=[mlp]", "axis.connector=[mlp]"], "axis.connector: connector is set"),
        ([*LINEAR, "budgt=flops"], "unknown key 'budgt'. Did you mean 'budget'"),
        ([*LINEAR, "metrc=loss"], "unknown key 'metrc'. Did you mean 'metric'"),
        ([*LINEAR, "job=2"], "unknown key 'job'. Did you mean 'jobs'"),
        ([*LINEAR, "rank=2"], "unknown key 'rank'. Did you mean 'ranks'"),
        ([*LINEAR, "sweep_steps=9"], r"^sweep_steps=9 has no effect without sweep.KEY=\[...\]$"),
        (["recipe=quickstart", "connectors=[mlp]", "axis.llm=tiny"], "axis.llm=tiny: expected a non-empty list"),
        (["recipe=quickstart", "connectors=[mlp]", "axis.llm=[tin]"], "unknown llm 'tin'"),
        (
            ["recipe=quickstart", "connectors=[mlp]", "axis.workers=[0]", "sweep.workers=[1]"],
            "sweep.workers: workers is",
        ),
    ],
)
def test_invalid_settings_are_named(line, said):
    with pytest.raises(ValueError, match=said):
        ablation = read_line(line)
        ablation.settings(ablation.choices[0])


QUICKSTART = ["recipe=quickstart", "connectors=[linear,mlp]"]


@pytest.mark.parametrize(
    "line, said",
    [
        (["data.validation=null"], r"^data\.validation=null: expected validation data"),
        (["stages.instruct.validation=null"], r"^stages\.instruct\.validation=null: expected validation data"),
        (["stage=clip"], "^stage=clip: it has no connector to compare; expected one of align, instruct$"),
        (
            ["recipe=clip"],
            "recipe clip: last stage=contrast: it has no connector to compare; no other stage has one$",
        ),
        (["metric=exact_mach"], "^metric=exact_mach: expected a metric .* exact_match, .*Did you mean 'exact_match'"),
        (["metric=bleu4"], "^metric=bleu4: expected a metric of single answers, one of exact_match, .*cider"),
        (["metric=yes_no_f1"], "^metric=yes_no_f1: expected a metric of single answers"),
        (["metric=cider", "validation.metrics=[yes_no]"], "^metric=cider: .* one of exact_match, yes_no_accuracy"),
        (
            ["metric=vqa_accuracy"],
            "^metric=vqa_accuracy: it requires 'answers', which none of the 80 .* data.validation has",
        ),
        (
            ["metric=cider", "validation.final_samples=3"],
            r"^metric=cider: it requires a caption, which none of the 3 .*; validation.metrics=\[cider\] uses the ref",
        ),
        (
            ["sweep.stages.clip.train.vision=[1e-3,2e-3]"],
            "^sweep.stages.clip.train.vision: stage clip comes before the connector and is shared; "
            "expected a key of one of align, instruct$",
        ),
        (["stage=instruct", "sweep.stages.align.train.connector=[1e-3,2e-3]"], "stage align does not run"),
        (["sweep.stages.instruct.train.llm=[1e-3,fast]"], "fast"),
    ],
)
def test_impossible_comparisons_are_refused_before_anything_runs(line, said, tmp_path):
    ablation = read_line([*QUICKSTART, *line, f"run_dir={tmp_path / 'ablation'}"])
    with pytest.raises(ValueError, match=said):
        run_ablation(ablation, show_progress=False)
    assert not (tmp_path / "ablation").exists()


def finished_job(
    folder: Path,
    rng: np.random.Generator,
    question: str = "What is",
    samples: int = 8,
    right: float = 0.5,
    category: str | None = None,
) -> None:
    """The files of a job that has trained the stage `instruct`; with a category, there is one more score."""
    folder.mkdir(parents=True)
    answers = [
        {
            "conversation": i // 5,
            "turn": i % 5,
            "question": f"{question} {i}?",
            "reference": "red",
            "category": category,
            "scores": {"exact_match": float(rng.random() < right)},
            "blind_scores": {"exact_match": 0.0},
            "conversation_loss": [1.0, 2.0],
        }
        for i in range(50)
    ]
    score = float(np.mean([answer["scores"]["exact_match"] for answer in answers]))
    summary = {"steps": 1, "parts": {"connector": {"parameters": 7}}, "validation": {"exact_match": score, "loss": 0.5}}
    summary["validation"] |= {"cider": 1.0, "blind_cider": 0.5} if category else {}
    record = {"step": 1, "loss": 1.0, "samples": samples, "samples_per_second": 1.0, "peak_memory_bytes": 1}
    for name, content in (("answers", answers), ("summary", summary), ("samples", [])):
        (folder / f"{name}.json").write_text(json.dumps(content))
    (folder / "metrics.jsonl").write_text(json.dumps(record) + "\n")


def test_a_failed_job_does_not_stop_the_others_and_finished_ones_are_reported(tmp_path, monkeypatch, capsys):
    """Jobs whose process exits at once with status 1: each is started, and the table has those that finished before."""
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    rng = np.random.default_rng(9)
    for name in ("linear", "avgpool"):
        finished_job(tmp_path / "jobs" / name / "seed-0" / "instruct", rng)
    line = ["recipe=quickstart", "connectors=[mlp,linear,pixel_shuffle,avgpool]", "stage=instruct"]
    with pytest.raises(ValueError, match=r"2 of 4 jobs failed: mlp seed 0: .*exit 1.*; pixel_shuffle seed 0: ") as said:
        ablate.run(Namespace(overrides=[*line, f"run_dir={tmp_path}"], json=False))
    assert str(tmp_path / "jobs/pixel_shuffle/seed-0/output.log") in str(said.value)
    printed, told = capsys.readouterr()
    assert told.splitlines() == ["1 of 4 jobs: mlp seed 0 failed", "3 of 4 jobs: pixel_shuffle seed 0 failed"]
    assert "Left out because a job failed: mlp; pixel_shuffle." in printed and "samples/s is measured in" in printed
    assert [entry["label"] for entry in json.loads((tmp_path / "results.json").read_text())].count("linear") == 1
    assert "avgpool" in (tmp_path / "ablation.html").read_text()


def test_a_failed_sweep_does_not_stop_the_other_choices(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    line = ["recipe=quickstart", "connectors=[mlp,linear]", "seeds=[0,1]", "stage=instruct", f"run_dir={tmp_path}"]
    for seed in range(2):
        finished_job(tmp_path / "jobs" / "linear" / f"seed-{seed}" / "instruct", np.random.default_rng(seed))
    (tmp_path / "decisions.json").write_text(json.dumps({"linear": {"line": [], "sweep": {}}}))
    with pytest.raises(ValueError, match=r"^2 of 4 jobs failed: mlp: no run of the sweep finished; see [^;]*$"):
        ablate.run(Namespace(overrides=[*line, "sweep.stages.instruct.train.llm=[1e-3,2e-3]"], json=False))
    assert "Left out because a job failed: mlp." in capsys.readouterr().out


@pytest.mark.parametrize(
    "line, stage, key",
    [
        ([], "instruct", "stages.instruct.train.llm"),
        (["stage=align"], "align", "stages.align.train.connector"),
    ],
)
def test_a_sweep_takes_the_lowest_finite_loss_of_the_last_stage_that_runs(line, stage, key, tmp_path):
    """The first rate's run diverges without failing."""

    class Finished(Runner):
        def run(self, choice, seed, folder, line):
            loss = 0.5 if f"{key}=0.001" in line else math.nan
            summary = {"steps": 1, "parts": {}, "validation": {"loss": loss}}
            (folder / stage).mkdir(parents=True)
            (folder / stage / "summary.json").write_text(json.dumps(summary))

    ablation = read_line([*QUICKSTART, *line, f"sweep.{key}=[1e9,1e-3]", f"run_dir={tmp_path}"])
    decided = decide(ablation, ablation.choices[0], Finished(ablation, False))
    assert decided == {"line": [f"{key}=0.001"], "sweep": {f"{key}=0.001": 0.5}}


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


def test_an_ablation_resumes_with_other_values_of_keys_that_do_not_affect_results(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    line = ["recipe=quickstart", "connectors=[mlp]", "stage=instruct", f"run_dir={tmp_path}"]
    assert run_ablation(read_line(line), False)
    more = ["workers=0", "stages.instruct.micro_batch_size=1", "collective_timeout=99", "stages.instruct.save_every=5"]
    assert run_ablation(read_line([*line, *more]), False), "it started its job again"
    with pytest.raises(ValueError, match=r"was started with other overrides \(stages.instruct.max_length=99\)"):
        run_ablation(read_line([*line, "stages.instruct.max_length=99"]), False)


def test_mappings_may_be_values_of_an_axis():
    ablation = read_line([*QUICKSTART, "axis.stages.instruct.lora=[{llm:{rank:8,targets:['q proj',up]}},null]"])
    with_lora, without = (ablation.settings(choice).stages["instruct"].lora for choice in ablation.choices[:2])
    expected = {"rank": 8, "targets": ("q proj", "up")}
    assert {key: getattr(with_lora["llm"], key) for key in expected} == expected and without is None
    assert len({choice.folder for choice in ablation.choices}) == 4


def test_equal_connectors_are_not_distinguished_and_different_ones_are():
    rng = np.random.default_rng(0)
    same, other, worse = (entry(name, answers(rng, rate)) for name, rate in (("a", 0.6), ("b", 0.6), ("c", 0.45)))
    compare([same, other, worse])
    best, second = sorted((same, other), key=lambda e: -e.score)
    assert best.p_value is None and not second.is_told_apart and second.p_value > 0.05
    assert worse.is_told_apart


def test_equal_connectors_are_rarely_distinguished():
    """Without a difference, about one comparison in twenty is called significant, corrected for five comparisons."""
    rng, called = np.random.default_rng(1), 0
    for _ in range(20):
        entries = [entry(str(i), answers(rng, 0.5, questions=200)) for i in range(3)]
        compare(entries)
        called += any(e.is_told_apart for e in entries)
    assert called <= 4


def test_differences_between_seeds_are_not_attributed_to_connectors():
    """Runs whose rates vary only by seed, by ten points up and down: a plain bootstrap of three seeds would call many
    of them different."""
    rng, called = np.random.default_rng(4), 0
    for _ in range(60):
        rates = 0.5 + 0.1 * rng.standard_normal((2, 3))
        entries = [
            entry(str(i), [(rng.random(400) < rate).astype(float) for rate in own]) for i, own in enumerate(rates)
        ]
        compare(entries)
        called += any(e.is_told_apart for e in entries)
    assert called <= 6  # 3 are expected of 60 at a level of 5 %; more than 6, one time in thirty


@pytest.mark.parametrize(
    "value, choices, degrees", [(6.085, 2, 2), (3.877, 3, 10), (4.199, 4, 12), (4.232, 5, 20), (5.008, 10, 20)]
)
def test_the_studentized_range_is_that_of_the_tables(value, choices, degrees):
    """5 % points of Tukey's distribution; of two choices, Student's times the root of two."""
    assert studentized_range(np.array([value]), choices, degrees) == pytest.approx(0.05, abs=0.0025)


def questions_of_their_own(rng, choices: int, seeds: int, conversations: int = 40) -> list[Entry]:
    """Equal choices, each of which is good at some conversations with every seed."""
    rates = np.clip(0.5 + 0.25 * rng.standard_normal((choices, conversations)), 0, 1).repeat(5, axis=1)
    return [
        entry(str(i), [(rng.random(len(own)) < own).astype(float) for _ in range(seeds)]) for i, own in enumerate(rates)
    ]


def test_repeating_a_seed_ten_times_changes_no_interval():
    rng = np.random.default_rng(6)
    once = questions_of_their_own(rng, 3, seeds=1)
    often = [entry(e.label, [e.measured[0].sums.repeat(5) / 5] * 10) for e in once]
    compare(once)
    compare(often)
    for a, b in zip(once, often):
        assert b.p_value == pytest.approx(a.p_value, abs=0.01)
        assert _interval(b.measured) == pytest.approx(_interval(a.measured), abs=1e-9)
    assert any(e.p_value and 0.01 < e.p_value < 0.9 for e in once)


@pytest.mark.parametrize("choices, seeds", [(2, 10), (6, 3), (6, 2)])
def test_the_best_of_equal_choices_is_rarely_distinguished(choices, seeds):
    """Seeds that answer the same questions, and the best of several choices: at most 5 % are called significant."""
    rng, called = np.random.default_rng(7), 0
    for _ in range(60):
        entries = questions_of_their_own(rng, choices, seeds)
        compare(entries)
        called += any(e.runs_differ for e in entries)
    assert called <= 6  # more, of 60 at a level of 5 %, one time in thirty


def test_among_many_choices_a_bad_one_is_distinguished():
    rng = np.random.default_rng(8)
    rates = [0.6] * 59 + [0.1]
    entries = [entry(str(i), answers(rng, rate, questions=200)) for i, rate in enumerate(rates)]
    compare(entries)
    assert entries[-1].is_told_apart and sum(e.is_told_apart for e in entries) == 1


def test_with_few_seeds_it_says_that_it_cannot_tell():
    rng = np.random.default_rng(5)
    two = [entry("good", answers(rng, 0.9, seeds=2)), entry("bad", answers(rng, 0.2, seeds=2))]
    compare(two)
    bad = min(two, key=lambda e: e.score)
    assert bad.runs_differ and not bad.is_told_apart
    ablation = read_line(["recipe=quickstart", "connectors=[linear]", "seeds=[0,1]"])
    assert main_table(ablation, two)[2][-1].endswith("runs differ")
    assert "cannot be estimated" in note(ablation, two)


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


def test_the_interval_is_that_of_a_share():
    rng = np.random.default_rng(2)
    exact = answers(rng, 0.7, seeds=1, questions=2000)
    low, high = _interval([Clusters.of(exact[0], np.arange(2000))])
    half, mean = 1.96 * (0.7 * 0.3 / 2000) ** 0.5, float(exact[0].mean())
    assert (low, high) == pytest.approx((mean - half, mean + half), abs=0.005)


def test_questions_of_one_image_count_as_one_draw():
    """Five equal answers per image count as one: the interval is that of a fifth as many questions."""
    rng = np.random.default_rng(3)
    exact = [np.repeat(answers(rng, 0.5, 1, 400)[0], 5)]
    low, high = _interval([Clusters.of(exact[0], np.arange(2000) // 5)])
    assert high - low == pytest.approx(2 * 1.96 * (0.25 / 400) ** 0.5, rel=0.15)


def test_a_line_joins_the_pareto_front():
    points = [("cheap", 1.0, 0.2), ("beaten", 2.0, 0.1), ("good", 3.0, 0.5), ("dear", 4.0, 0.5)]
    chart = scatter_chart("t", points, "x")
    line = chart.split('<polyline points="')[1].split('"')[0]
    assert len(line.split()) == 2 and chart.count('fill="#fff"') == 2


def test_labels_of_coinciding_points_do_not_overlap():
    points = [(f"a_long_name_{i}", 16.0, 0.5 + i / 1000) for i in range(9)] + [("other", 64.0, 0.9)]
    chart = scatter_chart("t", points, "x")
    labels = re.findall(r'<text class="tick" x="([\d.]+)" y="([\d.]+)">(a_long_name_\d|other)<', chart)
    assert len(labels) == 10
    boxes = [(float(x), float(y), float(x) + 6.2 * len(name)) for x, y, name in labels]
    for i, (left, low, right) in enumerate(boxes):
        assert left >= 0 and right <= 460 and 0 <= low <= 230
        for start, other, end in boxes[i + 1 :]:
            assert abs(low - other) >= 11 or right <= start or end <= left


def test_lines_beyond_six_differ_by_their_strokes():
    series = [
        Series(f"line {i}", [0.0, 1.0], [0.0, float(i)], color=i, band=([0.0, 0.0], [1.0, 9.0])) for i in range(24)
    ]
    chart = line_chart("t", series, legend_below=True)
    strokes = re.findall(r'<polyline points="[^"]*" fill="none" stroke="([^"]*)" [^>]*dasharray="([^"]*)"', chart)
    assert len(set(strokes)) == 24 and chart.count("<polygon") == 24


def planned(ablation, choice) -> dict[str, tuple[float, float]]:
    """Samples and FLOPs of each stage with a connector, with the steps that the budget gives."""
    line = [f"stages.{name}.max_steps={steps}" for name, steps in _equal_steps(ablation, choice, None).items()]
    plans = plan_run(compose([*ablation.line, *choice.line, *line]), Machine())
    return {plan.name: (plan.steps * plan.batch_size, plan.flops) for plan in plans if "connector" in plan.parts}


def test_a_budget_of_flops_or_samples_is_kept():
    line = ["recipe=quickstart", "connectors=[linear,avgpool]"]
    flops = read_line([*line, "budget=flops"])
    first, other = (planned(flops, choice) for choice in flops.choices)
    for name in ("align", "instruct"):
        assert other[name][1] == pytest.approx(first[name][1], rel=0.02) and other[name][0] > first[name][0]
    samples = read_line([*line, "axis.stages.instruct.batch_size=[8,16]", "budget=samples"])
    assert len({planned(samples, choice)["instruct"][0] for choice in samples.choices}) == 1
