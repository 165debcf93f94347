"""Vision encoders: images in, features on an explicit grid out.

All providers share one interface, `VisionEncoder`: an encoder has an image size, a grid, a width, a normalization and a
hidden layer whose features it returns. It keeps prefix tokens (CLS, registers) separate from the patches. `ENCODERS`
maps the names of the providers to their classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ...errors import first_line
from ...files import read_object
from ...registry import Registry
from ..loading import load_strictly
from .base import VisionEncoder, description_file
from .hugging_face import NATIVE, HFVision
from .multiscale import MultiscaleVision, with_scales
from .open_clip import OpenClipVision
from .patches import PatchVision
from .several import SeveralVision

BUILT_IN = {
    **{"open_clip": OpenClipVision, "hf": HFVision, "several": SeveralVision, "patches": PatchVision},
    **{found.provider: found for found in NATIVE.values()},
}
REQUIRED = ("image_size", "patch_size", "width", "num_blocks", "image_mean", "image_std", "layer", "levels")
COMMON = ("image_size", "layer", "levels", "scales", "weights", "dtype", "build")
ENCODERS: Registry[VisionEncoder] = Registry("vision", VisionEncoder, BUILT_IN, builder="build", fixed=COMMON)
register = ENCODERS.register


def build_vision(
    provider: str,
    dtype: torch.dtype = torch.float32,
    weights: bool = True,
    scales: Sequence[int] | None = None,
    **options: Any,
) -> VisionEncoder:
    """Build the encoder of `provider`: ``open_clip``, ``hf``, one of native resolution or one that a module registers.

    weights: False skips loading published weights, to inspect sizes (best under ``torch.device("meta")``). scales: of
    a `MultiscaleVision`; None for an encoder of one scale.
    """
    found = ENCODERS.find(provider)
    more = {"build": build_vision} if found is SeveralVision else {}
    encoder = found.build(**options, **more, dtype=dtype, weights=weights)
    for name in REQUIRED:
        if not hasattr(encoder, name):
            raise ValueError(f"vision.provider={provider}: {type(encoder).__name__} has no attribute {name}")
    if isinstance(encoder, found) or not encoder.provider:  # `hf` can build an encoder of another provider
        encoder.provider = provider
    encoder.options = {key: options[key] for key in ENCODERS.options(provider) if key in options}
    return with_scales(encoder, scales)


def describe_vision(vision: VisionEncoder) -> dict:
    """Plain values from which `vision_from` builds the encoder again, without its weights."""
    return {"provider": vision.provider, **vision.describe()}


def vision_from(description: dict) -> VisionEncoder:
    """Build the encoder of a description, with new weights."""
    found = dict(description)
    provider, scales = found.pop("provider"), found.pop("scales", None)
    if "encoders" in found:
        found["encoders"] = {name: vision_from(each) for name, each in found["encoders"].items()}
    encoder = ENCODERS.find(provider).from_description(found)
    encoder.provider = provider
    return with_scales(encoder, scales)


def read_description(folder: Path) -> dict:
    """The description of an encoder that was written by `VisionEncoder.save`."""
    file = description_file(folder)
    if file.name != "config.json":
        return {"provider": "hf", **read_object(file), "encoder": read_object(folder / "config.json")}
    return {"provider": "open_clip", **read_object(file)}


def load_vision(folder: Path, dtype: torch.dtype = torch.float32, trust_remote_code: bool = False) -> VisionEncoder:
    """Load an encoder that was written by `VisionEncoder.save`."""
    description = read_description(folder)
    provider = description["provider"]
    if provider == SeveralVision.provider:
        return _load_several(folder, description, dtype)
    encoder = ENCODERS.find(provider).from_folder(folder, dtype, trust_remote_code)
    encoder.provider = provider
    try:
        return with_scales(encoder, description.get("scales"))
    except ValueError as error:
        raise ValueError(f"{description_file(folder)}: {error}") from None


def _load_several(folder: Path, description: dict, dtype: torch.dtype) -> VisionEncoder:
    try:
        encoder = vision_from(description)
    except Exception as error:  # libraries can raise anything for a configuration that cannot be built
        file = description_file(folder)
        raise ValueError(f"{file} describes no encoder that can be built: {first_line(error)}") from None
    load_strictly(encoder, folder / "model.safetensors")
    return encoder.to(dtype)


__all__ = [
    "ENCODERS",
    "HFVision",
    "MultiscaleVision",
    "OpenClipVision",
    "PatchVision",
    "SeveralVision",
    "VisionEncoder",
    "build_vision",
    "describe_vision",
    "load_vision",
    "read_description",
    "register",
    "vision_from",
]
