"""A connector that reads the instruction, in the complete model: its effect, and batches without an image."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vlmtrain.batch import Batch
from vlmtrain.data.connector_text import TextReader
from vlmtrain.data.geometry import Geometry
from vlmtrain.data.processor import Processor
from vlmtrain.data.records import IMAGE_MARK, Conversation, Turn
from vlmtrain.data.shapes import Shapes
from vlmtrain.distributed.world import World
from vlmtrain.evaluation import Chat
from vlmtrain.evaluation.validation import Validator
from vlmtrain.model import VLMWrapper
from vlmtrain.model.llm import build_random_llm
from vlmtrain.model.parts import make_connector
from vlmtrain.model.vision import build_vision
from vlmtrain.objectives.language_modelling import LanguageModelling
from vlmtrain.settings import compose

SIZES = {"num_queries": 3, "hidden_size": 16, "depth": 2, "num_heads": 2, "intermediate_size": 16, "dropout": 0.0}
CONNECTORS = {"qformer": SIZES, "meq_former": {**SIZES, "hidden_dim": 16, "encoder_dropout": 0.0}}
PICTURE = Shapes("instruct", 1)[0].images[0]


@pytest.fixture(params=CONNECTORS)
def built(request, tokenizer) -> tuple[VLMWrapper, Processor]:
    settings = compose(["recipe=quickstart"]).composed
    torch.manual_seed(0)
    vision = build_vision(**settings["vision"])
    llm = build_random_llm(settings["llm"]["config"], tokenizer)
    reader = TextReader(tokenizer, "instruction", 16)
    options = {**CONNECTORS[request.param], "text_vocab": reader.vocabulary.size}
    connector = make_connector(request.param, vision, llm, options)
    with torch.no_grad():  # away from an initialization at which all outputs are alike
        for parameter in connector.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
    look = (vision.image_mean, vision.image_std)
    geometry = Geometry(vision.image_size, "squash", *look, connector.num_tokens(*vision.grid))
    return VLMWrapper(vision, connector, llm).eval(), Processor(tokenizer, geometry, "chat", 200, reader=reader)


def asked(words: str, *more: str) -> Conversation:
    turns = [Turn("user", f"{IMAGE_MARK}{words}"), Turn("assistant", "red")]
    for question in more:
        turns += [Turn("user", question), Turn("assistant", "circle")]
    return Conversation("asked", tuple(turns), (PICTURE,))


def visual(model: VLMWrapper, batch: Batch) -> Tensor:
    with torch.no_grad():
        embedded = model.embed(batch.input_ids, batch.visual).embeddings
    return embedded[batch.visual.mask].unflatten(0, (-1, 3))


def test_the_instruction_changes_the_tokens_of_the_same_image(built):
    model, processor = built
    samples = [processor(asked(words)) for words in ("What color is this?", "How many circles are there?")]
    color, count = visual(model, processor.collate(samples))
    assert (color - count).abs().mean() > 0.1 * color.abs().mean()
    alone = torch.cat([visual(model, processor.collate([sample])) for sample in samples])
    torch.testing.assert_close(alone, torch.stack([color, count]), rtol=1e-4, atol=1e-5)  # padding has no effect
    packed = visual(model, processor.pack(samples))
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-5)


def test_a_later_question_does_not(built):
    model, processor = built
    one, other = (processor.collate([processor(asked("What color?", later))]) for later in ("How many?", "What shape?"))
    assert not one.input_ids.equal(other.input_ids)
    assert visual(model, one).equal(visual(model, other))


def test_without_an_image_the_connector_runs_without_effect(built):
    model, processor = built
    text = processor(Conversation("text", (Turn("user", "What color?"), Turn("assistant", "red"))))
    LanguageModelling()(model.train(), processor.collate([text]), None).backward()
    for name, parameter in model.connector.named_parameters():
        assert parameter.grad is not None and not parameter.grad.any(), name


def test_the_loss_trains_the_reading(built):
    model, processor = built
    samples = [processor(asked("What color is this?")), processor(asked("How many circles are there?"))]
    LanguageModelling()(model, processor.collate(samples), None).backward()
    still = {name for name, p in model.connector.named_parameters() if p.grad is None or not p.grad.any()}
    assert all(
        name.startswith("core.layers.1.text_ffn") for name in still
    )  # that of the last layer, whose output is unused


def test_generation_and_validation_read_it_too(built, monkeypatch):
    model, processor = built
    seen = []
    run = model.connector.core.forward
    monkeypatch.setattr(model.connector.core, "forward", lambda *a, **k: seen.append(a[1]) or run(*a, **k))
    question = "How many circles are there?"
    expected = processor.reader.encode(question).tolist()
    Chat(model, processor, [PICTURE]).say(question, max_new_tokens=1)
    validator = Validator([asked(question)], processor, World(0, 1, torch.device("cpu")), torch.float32, 4, 1)
    with torch.no_grad():
        validator.scores(model, None)
    assert len(seen) == 3  # chat; the conversation with the image and blind
    assert all(ids.tolist() == [expected] for ids in seen)


def test_saved_and_loaded_it_answers_the_same(built, tmp_path):
    model, processor = built
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again = Chat(VLMWrapper.from_pretrained(tmp_path), Processor.from_pretrained(tmp_path), [PICTURE])
    chat = Chat(model, processor, [PICTURE])
    for question in ("How many circles are there?", "What color is this?"):
        assert again.say(question, max_new_tokens=8) == chat.say(question, max_new_tokens=8)
