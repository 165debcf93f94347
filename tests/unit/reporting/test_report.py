"""The page of a run, also for an untrusted run folder."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from vlmtrain.reporting.report import write_report

EVIL = '<script>alert(1)"'
PICTURE = "data:image/jpeg;base64,/9j/4A=="
SCORES = {"loss_at_start": 2.0, "loss": 1.0, "exact_match": 0.5, "blind_exact_match": 0.1, "questions": 2}


def run_folder(folder: Path, **changes: object) -> Path:
    """A run of one finished stage; changes replace files, given by name, with values or text."""
    machine = {"processes": 1, "device": EVIL, "command": f"python {EVIL}"}
    config = {"name": EVIL, "seed": EVIL, "precision": EVIL, "connector": {"name": EVIL}, "stages": {EVIL: {}}}
    record = {"step": 1, "loss": 1.0, "grad_norm": 0.5, "learning_rate": {EVIL: 0.1}, "samples_per_second": 2.0}
    part = {"learning_rate": {EVIL: 0.1}, "trained": True, "parameters": 5, "sha256_before": EVIL, "sha256_after": "b"}
    summary = {"steps": EVIL, "seconds": 3.0, "world_size": 1, "skipped_samples": 0, "validation": SCORES}
    sample = {key: EVIL for key in ("question", "reference", "prediction", "blind_prediction")}
    sample |= {
        "conversation": 0,
        "exact": False,
        "pictures": [PICTURE, f'x" onerror="{EVIL}', "https://example.org/a.png"],
    }
    files = {
        "config.yaml": {
            **config,
            "machine": machine,
            "git": {"commit": EVIL, "changes": None},
            "versions": {EVIL: EVIL},
        },
        f"{EVIL}/metrics.jsonl": record,
        f"{EVIL}/summary.json": {**summary, "parts": {EVIL: part}},
        f"{EVIL}/samples.json": [sample],
    }
    for name, content in files.items():
        content = changes.get(name.rpartition("/")[2], content)
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        dump = yaml.safe_dump if name == "config.yaml" else json.dumps
        file.write_text(content if isinstance(content, str) else dump(content))
    return folder


def test_nothing_from_the_folder_is_markup(tmp_path):
    page = write_report(run_folder(tmp_path / "run")).read_text()
    assert "<script" not in page and "alert(1)" in page
    assert re.findall(r"<img [^>]*>", page) == [f'<img src="{PICTURE}" alt="">']
    assert "onerror" not in page and "example.org" not in page


def test_the_page_shows_command_commit_hardware_and_gradient_norm_and_samples_before_charts(tmp_path):
    page = write_report(run_folder(tmp_path / "run")).read_text()
    assert "<code>python " in page and "1 x " in page and "commit " in page and ">gradient norm<" in page
    assert page.index('class="cards"') < page.index('class="charts"')


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"samples.json": [1]}, "has files that are not those of a stage"),
        ({"summary.json": {"steps": 1, "parts": [], "validation": None}}, "has files that are not those of a stage"),
        ({"summary.json": [1]}, "is not the summary of a finished stage"),
        ({"metrics.jsonl": {"step": 1}}, "has files that are not those of a stage"),
        ({"config.yaml": "a: &a [1]\nstages: {b: *a}\n"}, "it has YAML aliases"),
    ],
)
def test_a_broken_file_is_named_in_one_line(tmp_path, changes, said):
    with pytest.raises(ValueError, match=said) as refused:
        write_report(run_folder(tmp_path / "run", **changes))
    assert str(tmp_path / "run") in str(refused.value) and "\n" not in str(refused.value)


def test_a_bomb_of_aliases_ends(tmp_path):
    lines = ["a0: &a0 [x, x]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)), "stages: {}"]
    with pytest.raises(ValueError, match="it has YAML aliases"):
        write_report(run_folder(tmp_path / "run", **{"config.yaml": "\n".join(lines)}))
