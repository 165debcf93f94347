"""Training objectives. Each sums its loss over a batch; the loop divides by the whole step's weight."""

from __future__ import annotations

from collections.abc import Mapping

from transformers import PreTrainedTokenizerBase

from .base import Objective
from .contrastive import Contrastive
from .language_modelling import LanguageModelling

OBJECTIVES = {"language_modelling": LanguageModelling, "contrastive": Contrastive}


def build_objective(name: str, settings: Mapping, tokenizer: PreTrainedTokenizerBase) -> Objective:
    """The objective of a stage; `settings` is the run's configuration. Raises ValueError for an unknown name."""
    if name not in OBJECTIVES:
        raise ValueError(f"unknown objective '{name}'. Available: {', '.join(OBJECTIVES)}")
    return OBJECTIVES[name].build(settings, tokenizer)


__all__ = ["OBJECTIVES", "Objective", "build_objective"]
