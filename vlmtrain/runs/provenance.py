"""Provenance of a run: code, libraries, machine, and the files that it reads."""

from __future__ import annotations

import hashlib
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path

import torch

from ..distributed.world import World
from ..settings import Run, flatten
from .fingerprints import fingerprint

LIBRARIES = ("vlmtrain", "torch", "transformers", "deepspeed", "open_clip_torch", "hydra-core", "safetensors")
KEYS = ("versions", "git", "machine", "files", "earlier")


def provenance(run: Run, world: World) -> dict:
    """The record in config.yaml in addition to the settings."""
    libraries = (*LIBRARIES, "datasets") if run.data.has_streams else LIBRARIES  # it decides the order of streams
    return {
        "versions": {"python": platform.python_version(), **{name: version(name) for name in libraries}},
        "git": git_state(Path(__file__).parent),
        "machine": {
            "platform": platform.platform(),
            "device": torch.cuda.get_device_name() if world.device.type == "cuda" else f"cpu {platform.machine()}",
            "processes": world.size,
            "command": shlex.join(["python", "-m", "vlmtrain.train", *sys.argv[1:]]),
            "threads": torch.get_num_threads(),
        },
        "files": {str(path): fingerprint(path) for path in sorted(_read_paths(run))},
    }


def git_state(folder: Path) -> dict | None:
    """Commit of the git checkout that tracks a folder, and a hash of uncommitted changes; None without a checkout."""

    def git(*words: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(folder), *words], capture_output=True, text=True, errors="replace", timeout=30, check=True
        )
        return done.stdout

    try:
        if not git("ls-files", "."):  # installed in an environment inside an unrelated checkout
            return None
        changes = git("diff", "HEAD", "--", ".") + git("status", "--porcelain", "--", ".")
        digest = hashlib.sha256(changes.encode()).hexdigest() if changes else None
        return {"commit": git("rev-parse", "HEAD").strip(), "changes": digest}
    except (OSError, subprocess.SubprocessError):
        return None


def _read_paths(run: Run) -> Iterator[Path]:
    """The files and folders in the settings that the run reads."""
    sources = {key: run.composed[key] for key in ("data", "vision", "llm", "init_from", "stages")}
    for key, value in flatten(sources):
        named = key.startswith("data.") or key.split(".")[-1] in ("path", "pretrained", "init_from", "bert")
        if named and isinstance(value, str) and Path(value).exists():
            yield Path(value)


def differences(before: Mapping, now: Mapping) -> list[str]:
    """Differences between two records, one per line; modification times count only if there is no hash."""
    old, new = (dict(_compared(record)) for record in (before, now))
    changed = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    return [f"{key}: {old.get(key)} -> {new.get(key)}" for key in changed]


def _compared(record: Mapping) -> Iterator[tuple[str, object]]:
    for key in KEYS[:-1]:
        for name, value in (record.get(key) or {}).items():
            if (key, name) == ("machine", "command"):
                continue
            if key == "files":
                value = {k: v for k, v in value.items() if k != "modified" or "sha256" not in value}
            yield f"{key}.{name}", value
