"""Padded, packed and single samples have the same loss and gradients, and no sample sees another."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vlmtrain.batch import Batch
from vlmtrain.data.geometry import Geometry
from vlmtrain.data.processor import Processor, Sample
from vlmtrain.data.shapes import VOCABULARY, Shapes
from vlmtrain.model import VLMWrapper
from vlmtrain.model.attention import attend_in_segments
from vlmtrain.model.llm import build_random_llm
from vlmtrain.model.parts import make_connector
from vlmtrain.model.tiny_tokenizer import build_tiny_tokenizer
from vlmtrain.model.vision import build_vision
from vlmtrain.objectives import OBJECTIVES, Objective
from vlmtrain.objectives.language_modelling import LanguageModelling
from vlmtrain.runs.folder import RunFolder
from vlmtrain.settings import compose
from vlmtrain.training.assembly import build_parts, build_skeleton, build_tokenizer
from vlmtrain.training.batching import keeps_samples_apart
from vlmtrain.training.checks import check_stages


def build(prepared: bool) -> tuple[VLMWrapper, Processor]:
    settings = compose(["recipe=quickstart"]).composed
    tokenizer = build_tiny_tokenizer(VOCABULARY)
    torch.manual_seed(0)
    vision = build_vision(**settings["vision"])
    llm = build_random_llm(settings["llm"]["config"], tokenizer)
    model = VLMWrapper(vision, make_connector("mlp", vision, llm, {}), llm)
    if prepared:
        attend_in_segments(llm)
    tokens = model.connector.num_tokens(*vision.grid)
    geometry = Geometry(vision.image_size, "squash", vision.image_mean, vision.image_std, tokens)
    return model, Processor(tokenizer, geometry, "chat", max_length=512)


def samples(processor: Processor) -> list[Sample]:
    talks, text = Shapes("instruct", 4), Shapes("text", 3)
    return [processor(source[i]) for source, i in ((talks, 0), (text, 0), (talks, 1), (text, 1), (talks, 2))]


def loss_and_gradients(batches: list[Batch], prepared: bool) -> tuple[Tensor, dict[str, Tensor]]:
    model, _ = build(prepared)
    objective = LanguageModelling()
    loss = sum(objective(model, batch, None) for batch in batches) / sum(float(b.weights.sum()) for b in batches)
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_padded_packed_and_one_by_one_train_alike():
    _, processor = build(False)
    some = samples(processor)
    reference, gradients = loss_and_gradients([processor.collate([sample], rows=1) for sample in some], False)
    ways = {
        "padded": ([processor.collate(some)], False),
        "packed": ([processor.pack(some)], True),
        "packed in two rows, with an empty one": (
            [processor.pack(some[:2]), processor.pack([]), processor.pack(some[2:])],
            True,
        ),
    }
    for way, (batches, prepared) in ways.items():
        loss, found = loss_and_gradients(batches, prepared)
        assert float((loss - reference).abs() / reference) <= 1e-5, way
        assert found.keys() == gradients.keys(), way
        norm = sum(g.square().sum() for g in gradients.values()).sqrt()
        difference = sum((found[name] - g).square().sum() for name, g in gradients.items()).sqrt()
        assert float(difference / norm) <= 1e-5, way


BLOOM = ["llm.config.model_type=bloom"]


@pytest.mark.parametrize(
    "joins, more",
    [
        (True, []),
        (True, ["stages.instruct.padding=false"]),
        (False, ["stages.instruct.padding=true"]),
        (False, BLOOM),  # its positions are within its attention, which cannot be replaced
        (False, ["llm.attn_implementation=eager"]),
        (False, ["stages.instruct.objective=mine"]),
    ],
)
def test_samples_are_joined_unless_the_model_or_the_loss_cannot_tell_them_apart(joins, more, monkeypatch):
    class Mine(Objective):
        """It may read rows as samples."""

    monkeypatch.setitem(OBJECTIVES, "mine", Mine)
    settings = compose(["recipe=llava_1_5", "mini=true", "llm.config.hidden_size=64", *more])
    stage = settings.stages["instruct"]
    parts = build_skeleton(settings, stage, build_tokenizer(settings))
    assert keeps_samples_apart(settings, stage, parts, torch.device("cpu")) == joins


def logits_of(model: VLMWrapper, batch: Batch) -> list[Tensor]:
    return list(model(batch)[0].split(batch.boundaries.diff().tolist()))


@pytest.mark.parametrize("edited", range(5))
@pytest.mark.parametrize("what", ["tokens", "picture"])
def test_no_token_or_image_of_a_sample_changes_a_logit_of_another(edited, what):
    model, processor = build(True)
    model.eval()
    some = samples(processor)
    sample = some[edited]
    if what == "picture" and not sample.pixels[0]:
        pytest.skip("a sample without an image")
    with torch.no_grad():
        before = logits_of(model, processor.pack(some))
        if what == "picture":
            some[edited] = sample._replace(pixels=(tuple(255 - image for image in sample.pixels[0]),))
        else:
            ids = torch.where(sample.tokens.index < 0, (sample.tokens.input_ids + 1) % 40, sample.tokens.input_ids)
            tokens = type(sample.tokens)(ids, *list(vars(sample.tokens).values())[1:])
            some[edited] = sample._replace(tokens=tokens)
        after = logits_of(model, processor.pack(some))
    changed = [not torch.equal(one, other) for one, other in zip(before, after)]
    assert changed == [number == edited for number in range(5)]


@pytest.mark.parametrize(
    "more, said",
    [
        (["llm.config.model_type=recurrent_gemma"], "layout=packed: RecurrentGemmaForCausalLM has layers other than"),
        (["llm.attn_implementation=flash"], "llm.attn_implementation=flash: "),
        (
            [*BLOOM, "stages.instruct.layout=padded", "stages.instruct.padding=false"],
            "padding=false: Bloom.* has a cus",
        ),
        (["stages.instruct.padding=true"], "stages.instruct.padding=true: expected auto or false with layout=packed"),
    ],
)
def test_an_unsupported_attention_is_refused_before_training(more, said, tmp_path):
    line = ["recipe=llava_1_5", "mini=true", "stages.instruct.layout=packed", "data.validation=null"]
    with pytest.raises(ValueError, match=said):
        check_stages(compose([*line, *more]), RunFolder(tmp_path))


def test_flash_attention_in_fp32_is_refused():
    line = ["recipe=llava_1_5", "mini=true", "precision=fp32", "llm.attn_implementation=flash_attention_2"]
    with pytest.raises(ValueError, match="flash_attention_2 does not support fp32: set precision=bf16"):
        compose(line)


def test_every_stage_uses_the_attention_that_the_command_sets(tmp_path):
    settings = compose(["recipe=llava_1_5", "mini=true", "llm.attn_implementation=eager"])
    tokenizer, previous = build_tokenizer(settings), None
    for stage in settings.stages.values():
        parts = build_parts(settings, stage, previous, tokenizer)
        assert parts["llm"].config._attn_implementation == "eager"
        previous = tmp_path / stage.name
        VLMWrapper(*(parts[name] for name in ("vision", "connector", "llm"))).save_pretrained(previous)
