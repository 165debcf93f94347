"""Dialogues that share their images have the losses and gradients of separate samples, and do not see each other."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from vlmtrain.batch import Batch
from vlmtrain.data.geometry import Geometry
from vlmtrain.data.processor import Processor, Sample
from vlmtrain.data.records import Conversation, Turn
from vlmtrain.data.shapes import VOCABULARY, Shapes
from vlmtrain.model import VLMWrapper
from vlmtrain.model.attention import attend_in_segments
from vlmtrain.model.llm import build_random_llm
from vlmtrain.model.parts import make_connector
from vlmtrain.model.rotary import use_multimodal_rotary
from vlmtrain.model.tiny_tokenizer import build_tiny_tokenizer
from vlmtrain.model.vision import build_vision
from vlmtrain.objectives import OBJECTIVES, Objective
from vlmtrain.objectives.language_modelling import LanguageModelling
from vlmtrain.runs.folder import RunFolder
from vlmtrain.settings import compose
from vlmtrain.training.checks import check_run, check_stages

SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
LLM = {**SHAPE, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256, "model_type": "llama"}
VISION = {
    "embed_dim": 12,
    "vision_cfg": {"image_size": 24, "layers": 2, "width": 24, "head_width": 12, "patch_size": 8},
    "text_cfg": {"context_length": 8, "vocab_size": 32, "width": 16, "heads": 2, "layers": 1},
}
MODELS = {
    "positions of text": ({}, None),
    "a sliding window": ({"model_type": "mistral", "sliding_window": 13}, None),
    "rows of positions": ({}, "mrope"),
}


def build(kind: str) -> tuple[VLMWrapper, Processor]:
    more, positions = MODELS[kind]
    tokenizer = build_tiny_tokenizer(VOCABULARY)
    torch.manual_seed(0)
    vision = build_vision("open_clip", model_config=VISION, layer=-1)
    llm = build_random_llm({**LLM, **more}, tokenizer)
    with torch.no_grad():
        for parameter in llm.parameters():
            parameter.mul_(10) if parameter.dim() > 1 else parameter.add_(0.1 * torch.randn(parameter.shape))
    model = VLMWrapper(vision, make_connector("mlp", vision, llm, {}), llm).double()
    attend_in_segments(llm)
    if positions is not None:
        use_multimodal_rotary(llm, positions)
    tokens, grid = model.connector.num_tokens(*vision.grid), model.connector.output_grid(*vision.grid)
    geometry = Geometry(vision.image_size, "squash", vision.image_mean, vision.image_std, tokens, grid)
    return model, Processor(tokenizer, geometry, "chat", 200, positions=positions, share_images=True)


def about(number: int, media: tuple, *exchanges: int) -> Conversation:
    """A dialogue about `media`, with questions and answers of the shapes data."""
    words = [turn.text.split("\n")[-1] for turn in Shapes("instruct", 20)[number].turns]
    turns = []
    for exchange in exchanges:
        marks = "<image>\n" * len(media) if not turns else ""
        question, answer = words[2 * exchange : 2 * exchange + 2]
        turns += [Turn("user", marks + question), Turn("assistant", answer)]
    return Conversation(f"dialogue {number}", tuple(turns), media)


def talks() -> list[list[Conversation]]:
    """Dialogues about no image, one image and two images; those of one list show the same."""
    source = Shapes("instruct", 8, image_size=24)
    one, two = source[6].media, source[7].media + source[5].media
    return [
        [about(0, one, 0), about(1, one, 0, 1), about(2, one, 1), about(3, one, 0)],
        [Shapes("text", 3)[0]],
        [about(4, two, 1), about(5, two, 0, 1)],
        [about(6, source[4].media, 0)],
    ]


def trees(processor: Processor, per: str = "token") -> list[Sample]:
    return [Sample.tree([weighed(processor(each), per) for each in group]) for group in talks()]


def weighed(sample: Sample, per: str) -> Sample:
    return sample._replace(tokens=sample.tokens.weighed(per))


def loss_and_gradients(kind: str, batches: list[Batch]) -> tuple[Tensor, dict[str, Tensor]]:
    model, _ = build(kind)
    moved = [batch.to(torch.device("cpu"), torch.double) for batch in batches]
    loss = sum(LanguageModelling()(model, batch, None) for batch in moved)
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("per", ["token", "sqrt"])
def test_dialogues_about_an_image_train_like_separate_samples(kind, per):
    _, processor = build(kind)
    alone = [processor.collate([weighed(processor(each), per)]) for group in talks() for each in group]
    expected, gradients = loss_and_gradients(kind, alone)
    shared = processor.pack(trees(processor, per))
    assert shared.input_ids.numel() < sum(batch.input_ids.numel() for batch in alone)
    assert len(shared.visual.items) == 4
    found, others = loss_and_gradients(kind, [shared])
    assert float((found - expected).abs() / expected) <= 1e-5  # losses are computed in float32
    assert others.keys() == gradients.keys()
    norm = sum(gradient.square().sum() for gradient in gradients.values()).sqrt()
    for name, gradient in gradients.items():
        assert float((others[name] - gradient).norm() / norm) <= 1e-5, name


@torch.no_grad()
@pytest.mark.parametrize("kind", MODELS)
def test_every_dialogue_has_the_logits_of_its_own_sample(kind):
    model, processor = build(kind)
    row = trees(processor)
    logits = model(processor.pack(row).to(torch.device("cpu"), torch.double))[0]
    start = 0
    for group, tree in zip(talks(), row):
        shared, *parts = tree.tokens.parts
        prefix, *behind = logits[start : start + len(tree.tokens)].split([shared, *parts])
        start += len(tree.tokens)
        for talk, own in zip(group, behind, strict=True):
            batch = processor.collate([processor(talk)]).to(torch.device("cpu"), torch.double)
            torch.testing.assert_close(torch.cat([prefix, own]), model(batch)[0])


@torch.no_grad()
@pytest.mark.parametrize("edited", [1, 2, 3, 4])
def test_no_token_of_a_dialogue_changes_a_logit_of_another(edited):
    model, processor = build("positions of text")
    tree, *others = trees(processor)
    branch, ids = tree.tokens.branch, tree.tokens.input_ids
    changed = replace(tree.tokens, input_ids=torch.where(branch == edited, (ids + 1) % 40, ids))
    before, after = (
        model(processor.pack([first, *others]).to(torch.device("cpu"), torch.double))[0]
        for first in (tree, tree._replace(tokens=changed))
    )
    same = (before == after).all(-1)
    assert torch.equal(same[: len(branch)], branch != edited) and same[len(branch) :].all()


def test_a_record_of_several_dialogues_is_the_tree_of_them():
    _, processor = build("rows of positions")
    first, *others = talks()[0]
    record = Conversation("record", first.turns, first.media, others=tuple(each.turns for each in others))
    tree, found = trees(processor)[0].tokens, processor(record)
    assert len(found.pixels[0]) == 1 and found.tokens.answers == tree.answers
    for name in ("input_ids", "targets", "weights", "index", "branch", "positions"):
        assert torch.equal(getattr(found.tokens, name), getattr(tree, name)), name
    for (start, end), answer in zip(tree.answers, [turn for each in talks()[0] for turn in each.turns[1::2]]):
        assert processor.renderer.decode(tree.input_ids[start:end]) == answer.text


SHARED = ["stages.instruct.layout=packed", "stages.instruct.share_images=true"]
READER = ["connector=qformer", *(f"stages.{name}.connector_text.read=instruction" for name in ("align", "instruct"))]
REFUSED = {
    "padded rows": (["stages.instruct.layout=padded"], "expected false, or true with layout=packed"),
    "captions": (["stages.instruct.template=plain"], "needs a template with questions"),
    "flash attention": (
        ["llm.attn_implementation=flash_attention_2", "precision=bf16"],
        "llm.attn_implementation=flash_attention_2 cannot keep dialogues about the same images apart",
    ),
    "a loss that may read rows": (["stages.instruct.objective=mine"], "objective=mine may read the dialogues"),
    "a connector that reads text": (READER, "the connector reads the instruction of each dialogue"),
}


@pytest.mark.parametrize("more, said", REFUSED.values(), ids=REFUSED)
def test_what_cannot_share_images_is_refused_before_training(more, said, tmp_path, monkeypatch):
    class Mine(Objective):
        """It may read rows as samples."""

    monkeypatch.setitem(OBJECTIVES, "mine", Mine)
    with pytest.raises(ValueError, match=f"stages.instruct.share_images=true.*{said}"):
        run = compose(["recipe=llava_1_5", "mini=true", "data.validation=null", *SHARED, *more])
        check_run(run, 1)
        check_stages(run, RunFolder(tmp_path))


def test_what_can_share_images_is_not_refused(tmp_path):
    run = compose(["recipe=llava_1_5", "mini=true", "data.validation=null", *SHARED])
    check_run(run, 1)
    check_stages(run, RunFolder(tmp_path))
