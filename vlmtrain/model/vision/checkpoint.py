"""Reading of published checkpoints: their normalization, and the tensors of one part of a larger model."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ...files import read_object
from ..loading import mismatches

# Keys of a Hugging Face configuration that record its origin and version. The dtype is that of the weights.
_PROVENANCE = ("_name_or_path", "architectures", "auto_map", "transformers_version", "dtype", "torch_dtype")


def facts(config) -> dict:
    """The values of a Hugging Face configuration that define a model's function."""
    values = json.loads(config.to_json_string(use_diff=False))
    return {key: value for key, value in values.items() if key not in _PROVENANCE}


def read_preprocessor(path: str, image_mean: list[float] | None, image_std: list[float] | None) -> tuple[dict, dict]:
    """The preprocessor configuration of a checkpoint, and the mean and standard deviation of pixels as a mapping.

    image_mean, image_std: instead of those of the file. Raises ValueError if neither gives them.
    """
    found = _file(path, "preprocessor_config.json") or _file(path, "processor_config.json")
    preprocessor = read_object(found) if found else {}
    preprocessor = preprocessor.get("image_processor", preprocessor)
    mean, std = image_mean or preprocessor.get("image_mean"), image_std or preprocessor.get("image_std")
    if not mean or not std:
        raise ValueError(
            f"'{path}' has no preprocessor_config.json with image_mean and image_std: "
            "set vision.image_mean and vision.image_std"
        )
    return preprocessor, {"image_mean": list(mean), "image_std": list(std)}


def read_part(
    path: str,
    own: Mapping[str, Tensor],
    prefixes: tuple[str, ...],
    dropped: tuple[str, ...],
    part: str,
    renames: tuple[tuple[str, str], ...] = (),
) -> dict[str, Tensor]:
    """Memory-mapped tensors of one part of a checkpoint, by their names in that part.

    own: the tensors of the part, whose names and shapes the file must have. prefixes: names in the file that the part
    can have, in order of preference. dropped: starts of names that are ignored within the part. part: for messages.
    renames: patterns of names in the file, and their replacements.
    Raises ValueError listing tensors that are missing, unexpected or of another shape.
    """
    files = _files(path)
    known = {_renamed(name, renames) for name in files}
    prefix = next((prefix for prefix in prefixes if any(prefix + name in known for name in own)), prefixes[0])
    names = [name for name in files if name.startswith(prefix) and not name[len(prefix) :].startswith(dropped)]
    state = {}
    for file in sorted({files[name] for name in names}):
        here = _file(path, file)
        if here is None:
            raise ValueError(f"{path} is incomplete: {file} is missing, but its index lists it")
        try:
            with safe_open(here, "pt") as tensors:
                here_too = (name for name in names if files[name] == file)
                state |= {_renamed(name, renames): tensors.get_tensor(name) for name in here_too}
        except SafetensorError as error:
            raise ValueError(f"{here} is broken: {error}") from None
    problems = mismatches(state, {prefix + name: tensor for name, tensor in own.items()})
    if problems:
        raise ValueError(f"{path} does not fit {part}: {problems}")
    return {name.removeprefix(prefix): tensor for name, tensor in state.items()}


def _renamed(name: str, renames: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in renames:
        name = re.sub(pattern, replacement, name)
    return name


def _files(path: str) -> dict[str, str]:
    """The file that holds each tensor of a checkpoint."""
    index, single = _file(path, "model.safetensors.index.json"), _file(path, "model.safetensors")
    if index is not None:
        found = read_object(index).get("weight_map")
        if not isinstance(found, dict) or not all(isinstance(file, str) for file in found.values()):
            raise ValueError(f"{index} does not list the file of each tensor")
        return found
    if single is None:
        raise ValueError(f"cannot load weights from {path}: it has no model.safetensors")
    try:
        with safe_open(single, "pt") as tensors:
            return dict.fromkeys(tensors.keys(), single.name)
    except SafetensorError as error:
        raise ValueError(f"{single} is broken: {error}") from None


def _file(path: str, name: str) -> Path | None:
    """A file of a folder or Hub ID; None if there is none."""
    from transformers.utils import cached_file

    found = cached_file(path, name, _raise_exceptions_for_missing_entries=False)
    return found and Path(found)
