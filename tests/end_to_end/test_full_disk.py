"""A full disk or a damaged checkpoint file is reported in one line, and the run resumes from what is intact."""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from vlmtrain.distributed.world import World
from vlmtrain.training.checkpoint import RECORD, Checkpoints

from ..conftest import metrics, train
from .test_resume import cut, flip_a_byte, line

MEGABYTE = 2**20
ALONE = World(0, 1, torch.device("cpu"))


class State:
    """A training state with one tensor."""

    updates: ClassVar = {"llm": 3}

    def share(self, rank: int, size: int) -> dict[str, torch.Tensor]:
        return {f"weight-{rank}": torch.arange(100.0)}


def limited(size: int):
    """Keep a process from writing a file larger than `size`, which it sees as a full disk."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


@pytest.fixture(scope="module")
def whole(llava_files, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    train(*line(llava_files, folder))
    return folder


def losses(run_dir: Path) -> list[float]:
    return [record["loss"] for record in metrics(run_dir, "instruct")]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 40 MB, with room for the first stage's model and two checkpoints."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", disk], capture_output=True
    )
    if not mounted or mounted.returncode:
        pytest.skip("this process may not mount")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_full_disk_leaves_the_checkpoints_before_it(llava_files, small_disk, whole):
    command = line(llava_files, small_disk / "run", "stages.instruct.keep_last=3")
    failed = train(*command, check=False)
    assert failed.returncode == 2 and "Traceback" not in failed.stderr
    assert "the checkpoint of step" in failed.stderr and "No space left" in failed.stderr
    saved = sorted(path.name for path in (small_disk / "run" / "instruct" / "checkpoints").iterdir())
    assert saved and not any(name.endswith(".partial") for name in saved)
    subprocess.run(["mount", "-o", "remount,size=400m", small_disk], check=True)
    done = train(*command)
    assert f"resuming after step {int(saved[-1][5:])}" in done.stdout
    assert losses(small_disk / "run") == losses(whole)


def test_a_checkpoint_that_cannot_be_written_harms_nothing(llava_files, tmp_path, whole):
    command = line(llava_files, tmp_path, "stages.align.save_every=1", "workers=0")
    failed = train(*command, check=False, preexec_fn=limited(MEGABYTE // 8))
    assert failed.returncode == 2 and "Traceback" not in failed.stderr, failed.stderr
    assert not list(tmp_path.rglob("*.partial/*"))
    train(*command)
    assert losses(tmp_path) == losses(whole)


def test_a_stage_without_room_for_its_last_checkpoint_writes_its_model(llava_files, tmp_path, whole):
    largest = max(file.stat().st_size for file in (whole / "instruct" / "model").rglob("*"))
    command = line(llava_files, tmp_path, "stages.instruct.save_every=null", "workers=0")
    done = train(*command, preexec_fn=limited(largest + MEGABYTE // 8))
    assert "could not be written" in done.stdout + done.stderr and "training is complete" in done.stdout + done.stderr
    model = Path("instruct", "model", "vlmtrain.json")
    assert (tmp_path / model).read_bytes() == (whole / model).read_bytes()
    assert losses(tmp_path) == losses(whole)


@pytest.mark.parametrize("damage", [flip_a_byte, cut, Path.unlink])
def test_damage_to_any_file_of_a_checkpoint_is_found(damage, tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints", 2, ALONE)
    for step in (4, 8):
        checkpoints.save(State(), step, {"cursor": {"position": 10 * step}, "drawn": [step]})
    assert checkpoints.newest()["cursor"] == {"position": 80}
    files = [path.name for path in (tmp_path / "checkpoints" / "step-000008").iterdir()]
    assert len(files) == 2
    for name in files:
        copy = Path(shutil.copytree(tmp_path / "checkpoints", tmp_path / f"copy of {name}"))
        damage(copy / "step-000008" / name)
        found = Checkpoints(copy, 2, ALONE).newest()
        assert found["step"] == 4 and found["cursor"] == {"position": 40}, name


def test_every_byte_of_the_record_counts(tmp_path):
    checkpoints = Checkpoints(tmp_path, 2, ALONE)
    checkpoints.save(State(), 4, {"losses": [0.125, 3.5]})
    whole = checkpoints.newest()
    checkpoints.save(State(), 8, {"losses": [0.125, 3.5]})
    file = tmp_path / "step-000008" / RECORD
    sound = file.read_bytes()
    for position in range(0, len(sound), 3):
        changed = bytearray(sound)
        changed[position] ^= 1
        file.write_bytes(changed)
        found = checkpoints.newest()
        assert found == whole or found == json.loads(sound)["record"], position
        if found == whole:  # the damaged one was renamed
            file.parent.with_name("step-000008.damaged").rename(file.parent)


def test_a_damaged_checkpoint_does_not_replace_a_valid_one(tmp_path):
    checkpoints = Checkpoints(tmp_path, 2, ALONE)
    for step in (6, 12):
        checkpoints.save(State(), step, {})
    record = tmp_path / "step-000012" / RECORD
    for again in range(2):  # the same step may be damaged a second time
        record.write_bytes(record.read_bytes()[:-1])
        assert checkpoints.newest()["step"] == 6
        if not again:
            checkpoints.save(State(), 12, {})
    for step in (7, 8, 9):
        checkpoints.save(State(), step, {})
    assert sorted(path.name for path in tmp_path.glob("step-*[0-9]")) == ["step-000008", "step-000009"]
