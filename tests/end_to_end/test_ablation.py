"""`vlmtrain ablate`: all jobs have the same start and the same data, results are in a table, and no job runs twice."""

from __future__ import annotations

import csv
import json
import random
import signal
import statistics
import subprocess
import sys
import time

import pytest
import yaml

from ..conftest import metrics, run

STAGES = {"clip": 3, "text": 3, "align": 3, "instruct": 6}


def test_an_ablation_from_its_command_to_its_page(tmp_path):
    line = ["recipe=quickstart", "connectors=[linear,{avgpool:{window:2}}]", "seeds=[0,1]", f"run_dir={tmp_path}"]
    line += [f"stages.{stage}.max_steps={steps}" for stage, steps in STAGES.items()]
    line += ["validation.samples=2", "validation.final_samples=6", "validation.max_new_tokens=2", "workers=0"]
    command = [sys.executable, "-m", "vlmtrain.cli", "ablate", *line]
    done = run(*command)
    assert "avgpool-window-2" in done.stdout and "With 2 seeds" in done.stdout
    jobs = {name: tmp_path / "jobs" / name for name in ("linear", "avgpool-window-2")}
    for seed in ("seed-0", "seed-1"):
        summaries = [json.loads((job / seed / "align" / "summary.json").read_text()) for job in jobs.values()]
        for part in ("vision", "llm"):  # from the shared stages
            assert len({summary["parts"][part]["sha256_before"] for summary in summaries}) == 1
        order = [[record["target_tokens"] for record in metrics(job / seed, "instruct")] for job in jobs.values()]
        assert order[0] == order[1] and len(order[0]) == STAGES["instruct"]
        used = json.loads((jobs["avgpool-window-2"] / seed / "align" / "summary.json").read_text())["feature_cache"]
        assert used["hits"] > 0 and used["misses"] == 0  # from the first connector's run
    results = {entry["label"]: entry for entry in json.loads((tmp_path / "results.json").read_text())}
    assert results["linear"]["tokens"] == 16 and results["avgpool-window-2"]["tokens"] == 4
    for name, entry in results.items():
        answers = [json.loads((jobs[name] / f"seed-{s}" / "instruct" / "answers.json").read_text()) for s in (0, 1)]
        right = sum(answer["exact"] for seed in answers for answer in seed)
        assert entry["score"] == right / sum(map(len, answers))
        assert entry["interval"][0] <= entry["score"] <= entry["interval"][1]
    with open(tmp_path / "ablation.csv") as file:
        rows = {row["label"]: row for row in csv.DictReader(file)}
    assert {name: float(row["score"]) for name, row in rows.items()} == {n: e["score"] for n, e in results.items()}
    page = (tmp_path / "ablation.html").read_text()
    assert page.count("<svg") == 5 and "http" not in page.replace("http://www.w3.org", "")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("summary.json")}
    more = run(*command[:-1], "workers=0", "--json")
    assert {entry["label"] for entry in json.loads(more.stdout)} == set(jobs)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("summary.json")} == before
    refused = run(*command, "stages.instruct.max_steps=7", check=False)
    assert refused.returncode == 2 and "was started with other overrides" in refused.stderr


@pytest.mark.slow
def test_an_ablation_killed_three_times_has_the_same_results(tmp_path):
    """When the command is killed at random moments and restarted, its jobs are killed too and the results are equal."""
    line = ["recipe=llava_1_5", "mini=true", "connectors=[linear,avgpool]", "workers=0"]
    line += ["stages.align.max_steps=3", "stages.instruct.max_steps=6", "stages.instruct.save_every=2"]
    line += ["stages.align.batch_size=4", "stages.instruct.batch_size=4"]
    line += ["validation.samples=2", "validation.final_samples=6", "validation.max_new_tokens=2"]

    def command(name: str) -> list[str]:
        return [sys.executable, "-m", "vlmtrain.cli", "ablate", *line, f"run_dir={tmp_path / name}"]

    started = time.monotonic()
    run(*command("whole"))
    seconds = time.monotonic() - started
    rng = random.Random(0)
    for _ in range(3):
        process = subprocess.Popen(command("killed"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(rng.uniform(0.1, 0.5) * seconds)
        process.kill()
        assert process.wait() == -signal.SIGKILL, "it finished before it was killed"
    run(*command("killed"))
    found = [json.loads((tmp_path / name / "results.json").read_text()) for name in ("whole", "killed")]
    for entries in found:
        for entry in entries:  # these differ between any two runs
            del entry["samples_per_second"], entry["peak_memory_bytes"]
    assert found[0] == found[1]
    for connector in ("linear", "avgpool"):
        losses = [
            [record["loss"] for record in metrics(tmp_path / name / "jobs" / connector / "seed-0", "instruct")]
            for name in ("whole", "killed")
        ]
        assert losses[0] == losses[1] and len(losses[0]) == 6


@pytest.mark.slow
def test_equal_seconds_separate_rates_and_two_ranks_per_job(tmp_path):
    """`budget=wall` sets steps by measured seconds, `sweep` picks the lowest loss, and each job has its own ranks."""
    rates = "sweep.stages.instruct.train.llm=[1e-9,3e-3]"
    line = ["recipe=llava_1_5", "mini=true", "connectors=[linear,avgpool]", "ranks=2", "budget=wall", rates]
    line += ["sweep_steps=12", "stages.align.max_steps=4", "stages.instruct.max_steps=16", "workers=0"]
    line += ["stages.align.batch_size=4", "stages.instruct.batch_size=4"]
    line += ["validation.samples=2", "validation.final_samples=6", "validation.max_new_tokens=2"]
    done = run(sys.executable, "-m", "vlmtrain.cli", "ablate", *line, f"run_dir={tmp_path}")
    assert "seconds of training" in done.stdout
    lines = {
        name: yaml.safe_load((tmp_path / f"jobs/{name}/seed-0/config.yaml").read_text())
        for name in ("linear", "avgpool")
    }
    for name, settings in lines.items():
        assert settings["stages"]["instruct"]["train"]["llm"] == 3e-3
        assert json.loads((tmp_path / f"jobs/{name}/seed-0/instruct/summary.json").read_text())["world_size"] == 2
    seconds = {}
    for name in lines:
        (file,) = [file for file in tmp_path.glob(f"timing/{name}*/instruct/metrics.jsonl")]
        steps = [json.loads(record)["step_seconds"] for record in file.read_text().splitlines()]
        seconds[name] = statistics.median(steps[8:])
    assert lines["linear"]["stages"]["instruct"]["max_steps"] == 16
    wanted = max(1, round(16 * seconds["linear"] / seconds["avgpool"]))
    assert lines["avgpool"]["stages"]["instruct"]["max_steps"] == wanted
