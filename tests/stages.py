"""Stages for tests of functions that take one."""

from __future__ import annotations

from omegaconf import OmegaConf

from vlmtrain.settings import Stage
from vlmtrain.settings.fields import read
from vlmtrain.settings.locations import CONFIGS


def make_stage(name: str = "s", **keys) -> Stage:
    """A stage with the defaults of configs/objective/language_modelling.yaml, which trains the connector."""
    defaults = OmegaConf.to_container(OmegaConf.load(CONFIGS / "objective" / "language_modelling.yaml"))
    return read(Stage, {**defaults, "train": {"connector": 1e-3}, **keys}, f"stages.{name}.", name=name, position=0)
