"""Training objectives. Each sums its loss over a batch; the loop divides by the whole step's weight."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn
from transformers import PreTrainedTokenizerBase

from ..settings import Vision
from .base import Objective
from .contrastive import Contrastive
from .language_modelling import LanguageModelling
from .qformer_pretraining import QFormerPretraining

OBJECTIVES = {
    "language_modelling": LanguageModelling,
    "contrastive": Contrastive,
    "qformer_pretraining": QFormerPretraining,
}


def build_objective(
    name: str, vision: Vision, tokenizer: PreTrainedTokenizerBase, parts: Mapping[str, nn.Module]
) -> Objective:
    """The objective of a stage with these parts; `vision` are the encoder's settings.

    Raises ValueError for an unknown name and for what the objective cannot do without.
    """
    if name not in OBJECTIVES:
        raise ValueError(f"unknown objective '{name}'. Available: {', '.join(OBJECTIVES)}")
    return OBJECTIVES[name].build(vision, tokenizer, parts)


__all__ = ["OBJECTIVES", "Objective", "build_objective"]
