"""Base class of training objectives."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ..batch import Batch
from ..connectors import Features
from ..data.loader import StepData
from ..model import VLMWrapper
from ..settings import Vision


class Objective(nn.Module):
    """A training loss of a model. Its own parameters, if any, form the part ``objective``.

    needs: parts that a stage with this objective must have.
    compares_samples: whether the loss compares samples, each one image and one text, with each other, so that a step
                      must be one micro-batch.
    reads_packed: whether the loss reads batches only through the model's logits and ``batch.trained``, so that samples
                  can be joined in one row.
    sees_pictures_as_tokens: whether images are tokens within the text sequence.
    of_targets: the losses of ``batch.trained`` in the last forward pass, detached; None if the loss is not their sum.
    """

    needs: tuple[str, ...] = ()
    compares_samples = False
    reads_packed = False
    sees_pictures_as_tokens = True
    of_targets: Tensor | None = None

    @classmethod
    def build(cls, vision: Vision, tokenizer: PreTrainedTokenizerBase, parts: Mapping[str, nn.Module]) -> Objective:
        """Build the objective for a stage's other parts; its texts are encoded by `tokenizer`."""
        return cls()

    @classmethod
    def weight(cls, data: StepData) -> float:
        """This rank's part of the weight by which the summed loss is divided: of its samples, or of its tokens."""
        return data.samples if cls.compares_samples else data.weight

    def forward(self, model: VLMWrapper, batch: Batch, features: Features | None) -> Tensor:
        """Loss summed over the batch, a scalar. `features` are given if the encoder is frozen."""
        raise NotImplementedError
