"""The contrastive loss compared with open_clip's, the end tokens of texts, and their length."""

from __future__ import annotations

import open_clip
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from vlmtrain.data.geometry import Geometry
from vlmtrain.data.processor import Processor
from vlmtrain.data.shapes import Shapes
from vlmtrain.model import VLMWrapper
from vlmtrain.model.vision import build_vision
from vlmtrain.objectives import build_objective
from vlmtrain.planning.plan import Machine, plan_run
from vlmtrain.runs.folder import RunFolder
from vlmtrain.settings import compose
from vlmtrain.training.run import check_stages


@pytest.fixture
def parts(tokenizer):
    torch.manual_seed(0)
    settings = compose(["recipe=quickstart"])
    vision = build_vision(**vars(settings.vision))
    return vision, build_objective("contrastive", settings.vision, tokenizer, {})


def test_loss_equals_open_clips(parts, tokenizer):
    vision, objective = parts
    geometry = Geometry(vision.image_size, "squash", vision.image_mean, vision.image_std, tokens=0)
    processor = Processor(tokenizer, geometry, "plain", max_length=40)
    samples = [processor(Shapes("caption", 5)[i]) for i in range(5)]
    batch = processor.collate(samples, rows=7)
    loss = objective(VLMWrapper(vision, None, None), batch, None)

    images = torch.nn.functional.normalize(vision.pooled(batch.visual.normalized().pixels[0]), dim=-1)
    ids = torch.zeros(5, 40, dtype=torch.long)
    for row, sample in enumerate(samples):
        length = len(sample.tokens)
        ids[row, :length] = sample.tokens.input_ids
        ids[row, length] = tokenizer.eos_token_id
    objective.text.pool_type, objective.text.eos_id = "eos", tokenizer.eos_token_id  # open_clip's own pooling
    texts = torch.nn.functional.normalize(objective.text(ids), dim=-1)
    expected = open_clip.ClipLoss()(images, texts, objective.temperature()) * 5
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)


def test_captions_that_begin_with_the_end_token_differ(tokenizer):
    """As in OPT's and GPT-2's tokenizers, the token that begins a text is also the one that ends it."""
    end, number = tokenizer.eos_token, tokenizer.eos_token_id
    inner = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    inner.post_processor = TemplateProcessing(single=f"{end} $A", special_tokens=[(end, number)])
    both = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token=end, eos_token=end, pad_token=tokenizer.pad_token)
    torch.manual_seed(0)
    settings = compose(["recipe=quickstart"])
    objective = build_objective("contrastive", settings.vision, both, {})
    processor = Processor(both, Geometry((48, 48), "squash", (0.5,) * 3, (0.5,) * 3, tokens=0), "plain", max_length=40)
    data = Shapes("caption", 8)
    first = data[0]
    other = next(data[i] for i in range(1, 8) if data[i].turns[-1].text != first.turns[-1].text)
    samples = [processor(conversation) for conversation in (first, other, first)]
    assert all(sample.tokens.input_ids[0] == number for sample in samples)
    one, two, again = objective._embed(processor.collate(samples))
    assert torch.allclose(one, again, rtol=1e-5, atol=1e-6) and not torch.allclose(one, two, rtol=0.1, atol=0.1)


@pytest.mark.parametrize(
    "more, fits", [(["stages.contrast.max_length=40"], True), (["stages.contrast.max_length=41"], False)]
)
def test_captions_longer_than_the_text_towers_positions_are_refused_before_training(more, fits, tmp_path):
    settings = compose(["recipe=clip", "mini=true", *more])
    for door in (lambda: check_stages(settings, RunFolder(tmp_path)), lambda: plan_run(settings, Machine())):
        if fits:
            door()
            continue
        with pytest.raises(ValueError, match=r"stages.contrast.max_length=41 .*text_cfg.context_length=40") as error:
            door()
        assert "\n" not in str(error.value)
