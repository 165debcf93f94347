"""The folder of a run: its files, the finished stages, and whether a command may resume the run.

run_dir/config.yaml
run_dir/train.log
run_dir/<stage>/metrics.jsonl, validation.jsonl, answers.json, samples.json, summary.json
run_dir/<stage>/checkpoints/step-000100/
run_dir/<stage>/bad_steps.jsonl, decided.json
run_dir/<stage>/model/, best/
run_dir/report.html
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path

from omegaconf import OmegaConf

from ..files import make_folder, replace_text
from ..settings import Run, flatten
from ..settings.free_keys import changes_no_update, with_added
from .fingerprints import fingerprint, same_content
from .provenance import KEYS, differences
from .records import CONFIG, SUMMARY, read_config, read_summary

NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)


class RunFolder:
    """Paths of a run, and its record of settings."""

    def __init__(self, root: str | Path):
        self.root = Path(root)

    def stage(self, name: str) -> Path:
        return self.root / name

    def model(self, name: str) -> Path:
        return self.stage(name) / "model"

    def checkpoints(self, name: str) -> Path:
        return self.stage(name) / "checkpoints"

    def summary(self, name: str) -> dict:
        """The summary of a finished stage."""
        return read_summary(self.stage(name))

    def is_finished(self, name: str) -> bool:
        """Whether the stage has a summary, which is written last."""
        return (self.stage(name) / SUMMARY).exists()

    def lock(self, patience: float = 5.0) -> str | None:
        """Lock the folder until this process ends; returns a warning if the file system does not support locks.

        The operating system releases the lock when the process ends, whatever the file contains. Raises ValueError if
        another run still holds the lock after `patience` s, or if the folder is not writable.
        """
        make_folder(self.root, f"run_dir={self.root}")
        self._lock = open(self.root / ".lock", "a+")  # noqa: SIM115 - held until the process ends
        try:
            self._wait_for_lock(patience)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            return (
                f"run_dir={self.root} is on a file system without locks ({error.strerror}): a second run in this "
                "folder is not prevented, and concurrent runs overwrite each other's files"
            )
        return None

    def _wait_for_lock(self, patience: float) -> None:
        deadline = time.monotonic() + patience
        while not self._take_lock():
            if time.monotonic() > deadline:
                self._lock.seek(0)
                raise ValueError(
                    f"run_dir={self.root} is in use by another run ({self._lock.read().strip() or 'unknown'}); "
                    "set another run_dir"
                )
            time.sleep(0.1)  # a run that has just been killed may not have ended yet
        self._lock.truncate(0)
        self._lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        self._lock.flush()

    def _take_lock(self) -> bool:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def check_same(self, run: Run) -> None:
        """Raise ValueError, naming the key, if these settings would change the run that is in the folder."""
        file = self.root / CONFIG
        if not file.exists():
            return
        old = read_config(self.root)
        began = [name for name in old.get("stages", {}) if (self.stage(name) / "metrics.jsonl").exists()]
        before, now = (with_added(_binding(c, began), began) for c in (old, run.composed))
        for key in sorted(before.keys() | now.keys()):
            was, value = before.get(key), now.get(key)
            if was != value and not _is_moved(old.get("files", {}), was, value):
                raise ValueError(
                    f"{key}={value} would change the run in {self.root}, which started with {key}={was}; restore that "
                    f"value or set another run_dir{self._how_to_extend(key)}"
                )

    def _how_to_extend(self, key: str) -> str:
        """How to train a stage for longer, if `key` is its length."""
        if not key.endswith((".max_steps", ".epochs")):
            return ""
        stage = key.split(".")[1]
        return (
            ". To train longer, finish the stage and start another run from its model: "
            f"run_dir=NEW stage={stage} init_from={self.model(stage)}"
        )

    def write_config(self, run: Run, record: dict) -> list[str]:
        """Write settings and provenance; returns the differences in provenance from the previous start of the run.

        Earlier records that differ are kept in ``earlier``, the latest last.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        file = self.root / CONFIG
        before = read_config(self.root) if file.exists() else {}
        changed = differences(before, record) if before else []
        earlier = list(before.get("earlier", []))
        if changed:
            earlier.append({key: before[key] for key in KEYS[:-1] if key in before})
        whole = {**run.composed, **record, **({"earlier": earlier} if earlier else {})}
        replace_text(file, OmegaConf.to_yaml(OmegaConf.create(whole)))
        return changed


def _is_moved(files: Mapping, before: object, now: object) -> bool:
    """Whether a setting that names a file or folder now names an equal one, given the fingerprints of the run."""
    if not isinstance(before, str) or not isinstance(now, str) or before not in files or not Path(now).exists():
        return False
    return same_content(files[before], fingerprint(Path(now)))


def _binding(config: dict, began: list[str]) -> dict:
    """The settings that must not change, by dotted key: those that decide updates of stages that have begun."""
    if not began:
        return {}
    config = {key: value for key, value in config.items() if key not in KEYS}
    config["stages"] = {name: stage for name, stage in config.get("stages", {}).items() if name in began}
    features = config.get("features", {})
    if features.get("cache", "off") == "off":
        config["features"] = {**features, "dtype": None}
    # with early stopping, validation decides the number of steps
    early = [name for name, stage in config["stages"].items() if stage.get("early_stopping") is not None]
    deciding = {f"stages.{name}.{key}" for name in early for key in ("validate_every", "validation", "best_metric")}
    deciding |= {f"validation.{key}" for key in ("samples", "shots", "shots_from", "shots_by")} if early else set()
    found = {key: value for key, value in flatten(config) if key in deciding or not changes_no_update(key)}
    encoders = config.get("vision", {}).get("encoders")
    return found | ({"vision.encoders": list(encoders)} if encoders else {})  # their order is that of their features
