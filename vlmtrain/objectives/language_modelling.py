"""Next-token prediction of the assistant's answers."""

from __future__ import annotations

from torch import Tensor

from ..batch import Batch
from ..connectors import Features
from ..model import VLMWrapper
from .base import Objective
from .token_losses import token_losses


class LanguageModelling(Objective):
    """Weighted sum of token cross-entropies; logits are computed only at positions with a target."""

    needs = ("llm",)
    reads_packed = True

    def forward(self, model: VLMWrapper, batch: Batch, features: Features | None) -> Tensor:
        trained = batch.trained
        losses = token_losses(model(batch, features, trained.positions), trained.ids) * trained.weights
        self.of_targets = losses.detach()
        return losses.sum()
