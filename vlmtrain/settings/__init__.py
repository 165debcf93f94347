"""Builds the settings of a run from a command.

`composition` composes the configuration with Hydra, `fields` reads plain values into typed objects, and `run` and
`stage` declare every key with its bounds.
"""

from __future__ import annotations

from .composition import compose, compose_evaluation, flatten, import_modules
from .run import LLM, ConnectorChoice, Engine, Evaluation, Features, Run, Validation, Vision, options_of, read_run
from .stage import STAGE_PARTS, Expected, LoRA, Pattern, Stage

__all__ = [
    "LLM",
    "STAGE_PARTS",
    "ConnectorChoice",
    "Engine",
    "Evaluation",
    "Expected",
    "Features",
    "LoRA",
    "Pattern",
    "Run",
    "Stage",
    "Validation",
    "Vision",
    "compose",
    "compose_evaluation",
    "flatten",
    "import_modules",
    "options_of",
    "read_run",
]
