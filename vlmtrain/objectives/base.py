"""What an objective is."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ..connectors import VisionFeatures
from ..data.loader import StepData
from ..data.processor import Batch
from ..model import VLMWrapper
from ..settings import Vision


class Objective(nn.Module):
    """A training loss over a model. Its own parameters, if any, are the part called ``objective``.

    needs: parts that a stage with this objective must have.
    compares_samples: whether the loss looks across samples, each a picture and a text, so that a step must be one
                      micro-batch.
    sees_pictures_as_tokens: whether pictures take places in the text.
    """

    needs: tuple[str, ...] = ()
    compares_samples = False
    sees_pictures_as_tokens = True

    @classmethod
    def build(cls, vision: Vision, tokenizer: PreTrainedTokenizerBase, parts: Mapping[str, nn.Module]) -> Objective:
        """The objective for a stage's other parts; its texts are encoded by `tokenizer`."""
        return cls()

    @staticmethod
    def weight(data: StepData) -> float:
        """A rank's share of what the summed loss is divided by."""
        raise NotImplementedError

    def forward(self, model: VLMWrapper, batch: Batch, features: VisionFeatures | None) -> Tensor:
        """Loss summed over the batch, a scalar. `features` are given where the encoder is frozen."""
        raise NotImplementedError
