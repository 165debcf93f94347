"""What a run was made with, and from what: code, libraries, machine, and the files that it reads."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf

from ..settings import flatten
from ..world import World

LIBRARIES = ("vlmtrain", "torch", "transformers", "deepspeed", "open_clip_torch", "hydra-core", "safetensors")
HASHED_WHOLE = 2**26  # bytes up to which a file is read for its hash
MOST_FILES = 100_000  # of a folder, that are looked at
KEYS = ("versions", "git", "machine", "files", "earlier")


def provenance(settings: DictConfig, world: World) -> dict:
    """The record that config.yaml carries beside the settings."""
    return {
        "versions": {"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}},
        "git": git_state(Path(__file__).parent),
        "machine": {
            "platform": platform.platform(),
            "device": torch.cuda.get_device_name() if world.device.type == "cuda" else f"cpu {platform.machine()}",
            "processes": world.size,
            "threads": torch.get_num_threads(),
        },
        "files": {str(path): fingerprint(path) for path in sorted(_read_paths(settings))},
    }


def git_state(folder: Path) -> dict | None:
    """Commit of the checkout that a folder is tracked in, and the hash of what differs from it; None without one."""

    def git(*words: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(folder), *words], capture_output=True, text=True, errors="replace", timeout=30, check=True
        )
        return done.stdout

    try:
        if not git("ls-files", "."):  # installed into an environment that lies within some other checkout
            return None
        changes = git("diff", "HEAD", "--", ".") + git("status", "--porcelain", "--", ".")
        digest = hashlib.sha256(changes.encode()).hexdigest() if changes else None
        return {"commit": git("rev-parse", "HEAD").strip(), "changes": digest}
    except (OSError, subprocess.SubprocessError):
        return None


def fingerprint(path: Path) -> dict:
    """Size, time of change, and a hash: of a small file's bytes, or of the names and sizes in a folder."""
    if path.is_file():
        facts = path.stat()
        found = {"bytes": facts.st_size, "modified": facts.st_mtime}
        if facts.st_size <= HASHED_WHOLE:
            found["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
        return found
    digest, count, size, modified = hashlib.sha256(), 0, 0, 0.0
    for file in _files(path):
        facts = file.stat()
        digest.update(f"{file.relative_to(path)} {facts.st_size}\n".encode(errors="replace"))
        count, size, modified = count + 1, size + facts.st_size, max(modified, facts.st_mtime)
        if count == MOST_FILES:
            break
    return {"files": count, "bytes": size, "modified": modified, "sha256": digest.hexdigest()}


def _files(folder: Path) -> Iterator[Path]:
    for parent, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            file = Path(parent, name)
            if file.is_file():
                yield file


def _read_paths(settings: DictConfig) -> Iterator[Path]:
    """The files and folders that the settings name as something to read."""
    sources = {key: OmegaConf.to_container(settings)[key] for key in ("data", "vision", "llm", "init_from", "stages")}
    for key, value in flatten(sources):
        named = key.startswith("data.") or key.split(".")[-1] in ("path", "pretrained", "init_from", "bert")
        if named and isinstance(value, str) and Path(value).exists():
            yield Path(value)


def differences(before: Mapping, now: Mapping) -> list[str]:
    """What of two records differs, a line each; times of change count only where there is no hash."""
    old, new = ({key: dict(_compared(record, key)) for key in KEYS[:-1]} for record in (before, now))
    return [
        f"{key}.{name}: {old[key].get(name)} -> {new[key].get(name)}"
        for key in KEYS[:-1]
        for name in sorted(old[key].keys() | new[key].keys())
        if old[key].get(name) != new[key].get(name)
    ]


def _compared(record: Mapping, key: str) -> Iterator[tuple[str, object]]:
    for name, value in (record.get(key) or {}).items():
        if key == "files":
            value = {k: v for k, v in value.items() if k != "modified" or "sha256" not in value}
        yield name, value
