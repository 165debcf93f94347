"""vlmtrain: train vision-language models stage by stage and ablate the connector with one override."""

import importlib

from .interop.registration import register as _register

__version__ = "0.1.0"

_MODULES = {"Chat": "evaluation", "build_model": "training.building", "read_record": "data"}

__all__ = ["Chat", "__version__", "build_model", "read_record"]

_register()


def __getattr__(name: str) -> object:
    """Import names only when they are used: they load PyTorch, which ``vlmtrain --help`` does not need."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
