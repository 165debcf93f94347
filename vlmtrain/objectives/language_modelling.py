"""Next-token prediction of the assistant's answers."""

from __future__ import annotations

from torch import Tensor

from ..connectors import VisionFeatures
from ..data.processor import Batch
from ..model import VLMWrapper
from .base import Objective
from .token_losses import token_losses


class LanguageModelling(Objective):
    """Weighted sum of token cross-entropies; logits are computed only at positions with a target."""

    needs = ("llm",)

    def forward(self, model: VLMWrapper, batch: Batch, features: VisionFeatures | None) -> Tensor:
        keep = batch.weights > 0
        logits = model(
            batch.input_ids,
            batch.images,
            batch.is_image,
            features,
            keep=keep,
            positions=batch.positions,
            boundaries=batch.boundaries,
            tiles=batch.tiles,
            text_ids=batch.text_ids,
            text_mask=batch.text_mask,
        )
        return (token_losses(logits, batch.targets[keep]) * batch.weights[keep]).sum()
