"""The model: vision encoder, connector, fusion and language model."""

import importlib

from ..connectors import VisionFeatures
from .wrapper import VLMWrapper

__all__ = ["VLMWrapper", "VisionFeatures", "build_model"]


def __getattr__(name: str) -> object:
    """Import `build_model` only when it is used: it composes settings, which modules of this package do not need."""
    if name != "build_model":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return importlib.import_module("..training.building", __name__).build_model
