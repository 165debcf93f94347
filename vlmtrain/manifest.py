"""Which files a model folder holds, by their hashes; the weights have hashes of their own, over their tensors."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

MANIFEST = "vlmtrain.json"
WEIGHTS = (".safetensors", ".safetensors.index.json")


def file_hashes(model: Path) -> dict[str, str]:
    """SHA-256 by path within a model folder, of all its files but weights and the manifest."""
    files = (file for file in sorted(model.rglob("*")) if file.is_file() and not file.name.endswith(WEIGHTS))
    names = ((str(file.relative_to(model)), file) for file in files)
    return {name: hashlib.sha256(file.read_bytes()).hexdigest() for name, file in names if name != MANIFEST}


def check_files(model: Path, folder: str) -> None:
    """Raise ValueError for a file of `folder`, within a model folder, that is not the one the manifest names."""
    try:
        known = json.loads((model / MANIFEST).read_text()).get("files", {})
    except (OSError, ValueError, AttributeError):
        return  # reading the manifest says what is wrong with it
    for name, wanted in known.items():
        if not name.startswith(f"{folder}/"):
            continue
        file = model / name
        if not file.is_file():
            raise ValueError(f"{file} is missing: {model / MANIFEST} names it")
        if hashlib.sha256(file.read_bytes()).hexdigest() != wanted:
            raise ValueError(f"{file} is not the file that {model / MANIFEST} names: its hash differs")
