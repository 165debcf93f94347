"""Training objectives. Each sums its loss over a batch; the training loop divides by the total weight of the step."""

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
    """Build the objective of a stage with these parts; `vision` holds the encoder's settings.

    Raises ValueError for an unknown name, or if something that the objective requires is missing.
    """
    if name not in OBJECTIVES:
        raise ValueError(f"unknown objective '{name}'. Available: {', '.join(OBJECTIVES)}")
    return OBJECTIVES[name].build(vision, tokenizer, parts)


__all__ = ["OBJECTIVES", "Objective", "build_objective"]
