"""Contrastive image-text training (CLIP, Radford et al., 2021, section 2.3)."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from ..batch import Batch
from ..connectors import Features
from ..model import VLMWrapper
from ..settings import Vision
from .base import Objective
from .gathering import Share, all_numbers

MAX_LOGIT_SCALE = math.log(100)  # section 2.5: the logit scale is clipped to at most 100


class Contrastive(Objective):
    """Symmetric cross-entropy between each image and all captions of the step, and between each caption and all images.

    Owns CLIP's text tower and temperature. Candidates are gathered from all ranks with gradients, so the loss does
    not depend on the number of ranks.
    """

    needs = ("vision", "objective")
    compares_samples = True
    sees_pictures_as_tokens = False

    def __init__(self, text_tower: nn.Module, end_token: int, context_length: int):
        super().__init__()
        self.text = text_tower
        self.temperature = Temperature()
        self.end_token = end_token
        self.context_length = context_length

    @classmethod
    def build(cls, vision: Vision, tokenizer: PreTrainedTokenizerBase, parts: Mapping[str, nn.Module]) -> Contrastive:
        from open_clip.model import _build_text_tower

        config = vision.model_config
        if scales := getattr(parts.get("vision"), "scales", None):
            raise ValueError(
                "objective=contrastive needs one embedding per image, but an encoder with "
                f"vision.scales={list(scales)} has only grids of features: set vision.scales=null"
            )
        if config is None:
            raise ValueError(
                "objective=contrastive needs one encoder with vision.model_config, with a text_cfg for the text tower"
            )
        end = tokenizer.eos_token_id
        text = {**config["text_cfg"], "vocab_size": len(tokenizer), "pool_type": "none"}
        return cls(_build_text_tower(config["embed_dim"], text), end, text["context_length"])

    def forward(self, model: VLMWrapper, batch: Batch, features: Features | None) -> Tensor:
        rows = int((batch.weights.sum(1) > 0).sum())  # padding rows without weight come last
        images = F.normalize(model.vision.pooled(batch.visual.normalized().pixels[0])[:rows], dim=-1)
        texts = F.normalize(self._embed(batch)[:rows], dim=-1)
        share = Share.of([count for (count,) in all_numbers([rows], images.device)])
        all_images, all_texts, labels = share.gather(images), share.gather(texts), share.mine(images.device)
        scale = self.temperature()
        to_text = F.cross_entropy(scale * images @ all_texts.T, labels, reduction="sum")
        to_image = F.cross_entropy(scale * texts @ all_images.T, labels, reduction="sum")
        return (to_text + to_image) / 2

    def _embed(self, batch: Batch) -> Tensor:
        """Caption embeddings ``(B, embed_dim)``: the output of the text tower at the end token of each caption.

        The token is found by position, because a tokenizer may also put the same token in front. As in CLIP's published
        code it replaces the last token of a caption that fills the context.
        """
        ids = F.pad(batch.input_ids, (0, self.context_length))[:, : self.context_length]
        ends = batch.lengths.clamp(max=self.context_length - 1).unsqueeze(1)
        texts = self.text(ids.scatter(1, ends, self.end_token))
        # a tower that pools with a special token of its own has already pooled
        return texts if texts.ndim == 2 else texts[torch.arange(len(ids), device=ids.device), ends[:, 0]]


class Temperature(nn.Module):
    """The learned scale of cosine similarities, initially ``1 / 0.07`` (section 2.5)."""

    def __init__(self) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor([math.log(1 / 0.07)]))

    def forward(self) -> Tensor:
        return self.log_scale.clamp(max=MAX_LOGIT_SCALE).exp()
