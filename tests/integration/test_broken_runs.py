"""Run folders with broken files, and invalid places for them: the error is one line that names the file."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from vlmtrain.ablation import read_line
from vlmtrain.runs.folder import RunFolder
from vlmtrain.runs.records import read_records
from vlmtrain.runs.reproduction import SETTINGS
from vlmtrain.settings import compose
from vlmtrain.training.tracking import WandB

from ..conftest import data_overrides
from .test_bad_folders import model, refused  # noqa: F401 - a fixture
from .test_bad_input import start

BROKEN = {"empty": "", "cut": '{"steps": 2', "a list": "[1, 2]", "zeros": "\0" * 64}
RECORD = {"machine": {"processes": 1, "threads": 1}}


@pytest.fixture
def run_dir(llava_files, tmp_path) -> Path:
    """A run whose first stage is finished, according to its files."""
    folder = RunFolder(tmp_path / "run")
    line = ("recipe=llava_1_5", "mini=true", *data_overrides(llava_files), f"run_dir={folder.root}")
    few = ("stages.align.max_steps=1", "stages.instruct.max_steps=1", "workers=0")
    folder.write_config(compose([*line, *few]), RECORD)
    folder.stage("align").mkdir()
    (folder.stage("align") / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    return folder.root


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
def test_a_broken_record_of_the_run_is_named(content, run_dir, llava_files, capsys):
    (run_dir / "config.yaml").write_text(content)
    said = f"{run_dir / 'config.yaml'} is not the record of a run: "
    with pytest.raises(ValueError) as error:
        start(run_dir, llava_files)
    assert said in str(error.value) and "\n" not in str(error.value)
    for command in ("report", "reproduce"):
        assert said in refused(capsys, command, str(run_dir))


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
def test_a_broken_summary_is_named(content, run_dir, llava_files, tmp_path, capsys):
    (run_dir / "align" / "summary.json").write_text(content)
    said = f"{run_dir / 'align' / 'summary.json'} is not "
    with pytest.raises(ValueError) as error:
        start(run_dir, llava_files)
    assert said in str(error.value) and "\n" not in str(error.value)
    assert said in refused(capsys, "report", str(run_dir))
    line = ["recipe=llava_1_5", "mini=true", "connectors=[linear]", "seeds=[0]", f"run_dir={tmp_path / 'ablation'}"]
    ablation = read_line(line)
    for stage in ("align", "instruct"):
        summary = ablation.job(ablation.choices[0], 0) / stage / "summary.json"
        summary.parent.mkdir(parents=True)
        summary.write_text(content)
    assert f"{summary} is not " in refused(capsys, "ablate", *line)


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
@pytest.mark.parametrize("name", ["vlmtrain.json", "processor/processor.json"])
def test_a_broken_file_of_a_model_is_named(name, content, model, capsys):  # noqa: F811
    (model / name).write_text(content)
    assert str(model / name) in refused(capsys, "evaluate", str(model))


@pytest.mark.parametrize("place", ["/etc/hostname", "/proc/run"])
def test_an_invalid_run_folder_is_named(place, run_dir, llava_files, capsys):
    with pytest.raises(ValueError, match=f"run_dir={place} is not a writable folder: "):
        start(place, llava_files)
    assert place in refused(capsys, "reproduce", str(run_dir), "--out", place)
    assert place in refused(capsys, "ablate", "recipe=quickstart", "connectors=[linear]", f"run_dir={place}")


def test_a_folder_with_a_finished_rerun_or_other_files_is_refused(run_dir, tmp_path, capsys):
    other = tmp_path / "other"
    other.mkdir()
    (other / "notes.txt").write_text("mine")
    assert f"{other} already contains something else" in refused(capsys, "reproduce", str(run_dir), "--out", str(other))
    assert [path.name for path in other.iterdir()] == ["notes.txt"]
    (other / "notes.txt").rename(other / SETTINGS)
    assert "something else" in refused(capsys, "reproduce", str(run_dir), "--out", str(other))


def test_a_line_truncated_by_a_kill_does_not_count_as_a_step(tmp_path):
    file = tmp_path / "metrics.jsonl"
    assert read_records(file) == []
    whole = '{"step": 1}\n{"step": 2}\n'
    for end in range(len(whole) + 1):
        file.write_text(whole[:end])
        assert read_records(file) == [{"step": 1}, {"step": 2}][: (end >= 11) + (end >= 23)], end
    file.write_text('{"step": 1\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 1"):
        read_records(file)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP])
def test_without_file_locks_the_run_continues_with_a_warning(number, tmp_path, monkeypatch):
    def flock(file, how):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    assert "a second run in this folder is not prevented" in RunFolder(tmp_path).lock()


def test_any_other_failure_of_the_lock_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", lambda file, how: (_ for _ in ()).throw(OSError(errno.EIO, "broken")))
    with pytest.raises(OSError, match="broken"):
        RunFolder(tmp_path).lock()


def test_wandbs_id_is_saved_before_wandb_starts(tmp_path, monkeypatch):
    import wandb

    known = []

    def killed(**options):
        known.append((options["id"], (tmp_path / "wandb_id.txt").read_text()))
        raise KeyboardInterrupt

    monkeypatch.setattr(wandb, "init", killed)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            WandB(SimpleNamespace(wandb="offline", wandb_project="project", composed={}), tmp_path)
    (first, kept), (second, _) = known
    assert first == kept == second
