"""Hashes of the files in a model folder; weights have separate hashes, over their tensors."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch

from ..errors import shown
from ..files import check_regular, read_object

MANIFEST = "vlmtrain.json"
WEIGHTS = (".safetensors", ".safetensors.index.json")


def file_hashes(model: Path) -> dict[str, str]:
    """SHA-256 of all files in a model folder except weights and the manifest, by relative path."""
    files = (file for file in sorted(model.rglob("*")) if file.is_file() and not file.name.endswith(WEIGHTS))
    names = ((str(file.relative_to(model)), file) for file in files)
    return {name: hashlib.sha256(file.read_bytes()).hexdigest() for name, file in names if name != MANIFEST}


def check_files(model: Path, folder: str) -> None:
    """Raise ValueError if a file of `folder`, within a model folder, is not the one listed in the manifest."""
    if not is_model_folder(model):
        return  # `read_manifest` raises an error about a missing manifest
    for file in (model / folder).rglob("*"):
        check_regular(file)
    known = read_object(model / MANIFEST).get("files", {})
    if not isinstance(known, dict) or not all(isinstance(wanted, str) for wanted in known.values()):
        raise ValueError(f"{model / MANIFEST}: 'files' must map names of files to their hashes, got {shown(known)}")
    for name, wanted in known.items():
        if not name.startswith(f"{folder}/"):
            continue
        file = model / name
        if not file.is_file():
            raise ValueError(f"{file} is missing, but {model / MANIFEST} lists it")
        if hashlib.sha256(file.read_bytes()).hexdigest() != wanted:
            raise ValueError(f"{file} is not the file that {model / MANIFEST} lists: its hash differs")


def write_manifest(folder: Path, parts: dict[str, dict]) -> None:
    """Write the manifest of all parts and other files in the folder, which `load_part` checks."""
    (folder / MANIFEST).write_text(json.dumps({"parts": parts, "files": file_hashes(folder)}, indent=2) + "\n")


def is_model_folder(folder: Path) -> bool:
    return (folder / MANIFEST).exists()


def check_answers(folder: Path) -> None:
    """Raise ValueError unless `folder` is a model folder with a language model, which is needed to answer."""
    parts = read_manifest(folder)
    if "llm" not in parts:
        raise ValueError(
            f"{folder} has no language model, only {', '.join(parts)}: expected the model of a stage with an llm"
        )


def read_manifest(folder: Path) -> dict[str, dict]:
    """Manifest entries of the parts of a model folder. Raises ValueError if `folder` is not a model folder."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a model folder: no such directory")
    models = sorted(folder.glob(f"*/model/{MANIFEST}"), key=lambda file: file.stat().st_mtime)
    if models and not is_model_folder(folder):
        raise ValueError(f"{folder} is a run folder, not a model folder. Did you mean {models[-1].parent}?")
    if (folder / "config.json").exists() and not is_model_folder(folder):
        raise ValueError(f"{folder} is a Hugging Face folder: convert it with 'vlmtrain import {folder} OUT_DIR'")
    parts = read_object(folder / MANIFEST).get("parts")
    if not isinstance(parts, dict) or not all(isinstance(facts, dict) for facts in parts.values()):
        raise ValueError(f"{folder / MANIFEST} lists no parts: it is not the manifest of a model")
    for part, facts in parts.items():
        if not {"sha256", "dtype"} <= facts.keys() or not isinstance(
            getattr(torch, str(facts["dtype"]), None), torch.dtype
        ):
            raise ValueError(f"{folder / MANIFEST} does not give the hash and dtype of {part}")
    return parts
