"""Which files a model folder holds, by their hashes; the weights have hashes of their own, over their tensors."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch

from ..files import read_json

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


def write_manifest(folder: Path, parts: dict[str, dict]) -> None:
    """Write what each part is, and what else the folder holds, for `load_part` to check."""
    (folder / MANIFEST).write_text(json.dumps({"parts": parts, "files": file_hashes(folder)}, indent=2) + "\n")


def is_model_folder(folder: Path) -> bool:
    return (folder / MANIFEST).exists()


def check_answers(folder: Path) -> None:
    """Raise ValueError unless `folder` is a model folder with a language model, which answers."""
    parts = read_manifest(folder)
    if "llm" not in parts:
        raise ValueError(
            f"{folder} has no language model, only {', '.join(parts)}: expected the model of a stage that has an llm"
        )


def read_manifest(folder: Path) -> dict[str, dict]:
    """What each part of a model folder is. Raises ValueError if `folder` is no model folder."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a model folder: no such directory")
    if (folder / "config.json").exists() and not is_model_folder(folder):
        raise ValueError(
            f"{folder} is a Hugging Face folder: 'vlmtrain import {folder} OUT_DIR' makes a model folder of it"
        )
    parts = read_json(folder / MANIFEST)
    parts = parts.get("parts") if isinstance(parts, dict) else None
    if not isinstance(parts, dict) or not all(isinstance(facts, dict) for facts in parts.values()):
        raise ValueError(f"{folder / MANIFEST} names no parts: it is not the manifest of a model")
    for part, facts in parts.items():
        if not {"sha256", "dtype"} <= facts.keys() or not isinstance(
            getattr(torch, str(facts["dtype"]), None), torch.dtype
        ):
            raise ValueError(f"{folder / MANIFEST} does not say of {part} its hash and its type of numbers")
    return parts
