"""Which settings a run may be resumed with."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from PIL import Image

from vlmtrain.runs.fingerprints import fingerprint
from vlmtrain.runs.folder import RunFolder
from vlmtrain.settings import Run, compose


def run_on(home: Path, folder: Path, *more: str) -> Run:
    data = [
        "data=llava_json",
        f"data.images={home}",
        f"data.align={home / 'a.json'}",
        f"data.instruct={home / 'a.json'}",
    ]
    return compose(["recipe=llava_1_5", "mini=true", *data, f"run_dir={folder}", *more])


@pytest.fixture
def home(tmp_path) -> Path:
    (tmp_path / "home").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "home" / "a.png")
    (tmp_path / "home" / "a.json").write_text("[]")
    return tmp_path / "home"


@pytest.fixture
def begun(home, tmp_path) -> RunFolder:
    """A run whose first stage has started."""
    folder = RunFolder(tmp_path / "run")
    files = {str(path): fingerprint(path) for path in (home, home / "a.json")}
    folder.write_config(run_on(home, folder.root), {"files": files})
    (folder.stage("align") / "metrics.jsonl").parent.mkdir(parents=True)
    (folder.stage("align") / "metrics.jsonl").touch()
    return folder


def test_a_run_can_be_resumed_after_its_data_moved(begun, home, tmp_path):
    begun.check_same(run_on(home, begun.root))
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(home, elsewhere)
    begun.check_same(run_on(elsewhere, begun.root))
    Image.new("RGB", (9, 8)).save(elsewhere / "a.png")
    with pytest.raises(ValueError, match=r"data\.images=.*elsewhere would change the run .* data\.images=.*home;"):
        begun.check_same(run_on(elsewhere, begun.root))


def test_the_message_explains_how_to_train_longer(begun, home):
    with pytest.raises(ValueError, match=r"max_steps=7 would .*run_dir=NEW stage=align init_from=.*align/model$"):
        begun.check_same(run_on(home, begun.root, "stages.align.max_steps=7"))
    begun.check_same(run_on(home, begun.root, "stages.instruct.max_steps=7"))  # which has not started


def test_keys_that_the_run_did_not_know_yet_have_their_old_meaning(begun, home):
    config = (begun.root / "config.yaml").read_text()
    later = (
        "  repair: false\n",
        "  ignore: []\n",
        "      decay_ratio: 0.1\n",
        "    early_stopping: null\n",
        "    best_metric: loss\n",
    )
    assert all(line in config for line in later)
    for line in later:
        config = config.replace(line, "")
    (begun.root / "config.yaml").write_text(config)
    begun.check_same(run_on(home, begun.root))
    with pytest.raises(ValueError, match=r"data\.repair=True would change the run"):
        begun.check_same(run_on(home, begun.root, "data.repair=true"))


def test_with_early_stopping_validation_may_not_change(home, tmp_path):
    folder = RunFolder(tmp_path / "early")
    early = (f"data.validation={home / 'a.json'}", "stages.align.early_stopping=2", "stages.align.validate_every=5")
    folder.write_config(run_on(home, folder.root, *early), {})
    (folder.stage("align") / "metrics.jsonl").parent.mkdir(parents=True)
    (folder.stage("align") / "metrics.jsonl").touch()
    folder.check_same(run_on(home, folder.root, *early, "validation.max_new_tokens=3"))
    for change in ("validation.samples=7", "stages.align.validate_every=6"):
        with pytest.raises(ValueError, match=f"{change} would change the run"):
            folder.check_same(run_on(home, folder.root, *early, change))
