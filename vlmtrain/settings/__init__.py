"""Builds the settings of a run from a command.

`composition` composes the configuration with Hydra, `fields` reads plain values into typed objects, and `run`, `model`,
`data` and `stage` declare every key with its bounds.
"""

from __future__ import annotations

from .composition import compose, compose_evaluation, compose_model
from .fields import AUTO, flatten
from .model import LLM, SeveralOptions, Vision
from .overrides import import_modules
from .run import Engine, Features, Run, Validation, read_run
from .stage import STAGE_PARTS, Expected, LoRA, Pattern, Stage

__all__ = [
    "AUTO",
    "LLM",
    "STAGE_PARTS",
    "Engine",
    "Expected",
    "Features",
    "LoRA",
    "Pattern",
    "Run",
    "SeveralOptions",
    "Stage",
    "Validation",
    "Vision",
    "compose",
    "compose_evaluation",
    "compose_model",
    "flatten",
    "import_modules",
    "read_run",
]
