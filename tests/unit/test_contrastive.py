"""The contrastive loss against open_clip's own, and its texts' ends."""

from __future__ import annotations

import open_clip
import pytest
import torch
from omegaconf import OmegaConf

from vlmtrain.data.processor import Geometry, Processor
from vlmtrain.data.shapes import Shapes
from vlmtrain.model import VLMWrapper
from vlmtrain.model.vision import build_vision
from vlmtrain.objectives import build_objective
from vlmtrain.settings import compose


@pytest.fixture
def parts(tokenizer):
    torch.manual_seed(0)
    settings = compose(["recipe=quickstart"])
    vision = build_vision(**OmegaConf.to_container(settings.vision))
    return vision, build_objective("contrastive", settings, tokenizer, {})


def test_loss_equals_open_clips(parts, tokenizer):
    vision, objective = parts
    geometry = Geometry(vision.image_size, "squash", vision.image_mean, vision.image_std, tokens=0)
    processor = Processor(tokenizer, geometry, "plain", max_length=40)
    samples = [processor(Shapes("caption", 5)[i]) for i in range(5)]
    loss = objective(VLMWrapper(vision, None, None), processor.collate(samples, rows=7), None)

    images = torch.nn.functional.normalize(vision.pooled(torch.cat([s.images for s in samples])), dim=-1)
    ids = torch.zeros(5, 40, dtype=torch.long)
    for row, sample in enumerate(samples):
        length = len(sample.tokens)
        ids[row, :length] = sample.tokens.input_ids
        ids[row, length] = tokenizer.eos_token_id
    texts = torch.nn.functional.normalize(objective.text(ids), dim=-1)
    expected = open_clip.ClipLoss()(images, texts, objective.temperature()) * 5
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
