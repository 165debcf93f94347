"""Validation compared with plain computations: choices by likelihood, blanked images, and batches of any size."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from vlmtrain.data.processor import Processor
from vlmtrain.data.records import Conversation, Turn
from vlmtrain.data.sources import build_source
from vlmtrain.distributed.world import Stopped, World
from vlmtrain.evaluation.validation import Validator
from vlmtrain.model import VLMWrapper
from vlmtrain.objectives import OBJECTIVES
from vlmtrain.settings import compose
from vlmtrain.settings.data import read_data
from vlmtrain.training.assembly import build_parts, build_tokenizer
from vlmtrain.training.processing import build_processor

from ..conftest import gpt, human

CHOICES = ["red", "the large blue ring", "green square"]


@pytest.fixture(scope="module")
def model() -> tuple[VLMWrapper, Processor]:
    settings = compose(["recipe=quickstart", "stages.instruct.fresh=[vision,connector,llm]"])
    tokenizer = build_tokenizer(settings)
    parts = build_parts(settings, settings.stages["instruct"], None, tokenizer)
    objective = OBJECTIVES["language_modelling"]
    wrapper = VLMWrapper(parts["vision"], parts["connector"], parts["llm"]).eval()
    return wrapper, build_processor(settings, settings.stages["instruct"], parts, objective, tokenizer)


def validator(model, source, batch_size: int = 8, **options) -> Validator:
    return Validator(source, model[1], World(0, 1, torch.device("cpu")), torch.float32, batch_size, 6, **options)


@pytest.fixture(scope="module")
def questions(tmp_path_factory) -> list[Conversation]:
    folder = tmp_path_factory.mktemp("choices")
    colors = [(220, 40, 40), (40, 90, 230)]
    records = []
    for i, color in enumerate(colors):
        Image.new("RGB", (50, 50), color).save(folder / f"{i}.png")
        talk = [human("<image>\nHow many shapes?"), gpt("one"), human("What color is it?")]
        records.append({"image": f"{i}.png", "conversations": [*talk, {**gpt(CHOICES[i]), "choices": CHOICES}]})
    records.append({"conversations": [human("What shape?"), {**gpt("red"), "choices": CHOICES[:2]}]})
    (folder / "v.json").write_text(json.dumps(records))
    data = {"format": "llava_json", "images": str(folder), "validation": str(folder / "v.json")}
    return build_source(read_data(data).split("validation"), (48, 48), 0)


@torch.no_grad()
def test_a_part_of_the_data_is_drawn_from_all_of_it(model):
    """Sorted data: the first half of the conversations is about one word, the second about another."""
    talks = [(Turn("user", "What?"), Turn("assistant", word)) for word in ("red", "blue") for _ in range(20)]
    source = [Conversation(str(i), turns) for i, turns in enumerate(talks)]
    few, more, other = (
        validator(model, source, seed=seed).losses(model[0], size).keys() for seed, size in ((0, 8), (0, 16), (1, 8))
    )
    assert len(few) == 8 and few < more and few != other
    assert min(few) < 20 <= max(few)
    assert list(validator(model, source).losses(model[0], None)) == list(range(40))


def test_a_stop_signal_ends_validation_between_batches(model):
    source = [Conversation(str(i), (Turn("user", "What?"), Turn("assistant", "red"))) for i in range(4)]
    with pytest.raises(Stopped):
        validator(model, source, stop=SimpleNamespace(received=True)).losses(model[0], None)


@torch.no_grad()
def test_the_likelihood_of_a_choice_is_that_of_its_tokens(model, questions):
    wrapper, processor = model
    found = validator(model, questions).answers(wrapper, None)
    asked = [answer for answer in found if answer.likelihoods]
    assert [(a.conversation, a.turn, len(a.likelihoods)) for a in asked] == [(0, 1, 3), (1, 1, 3), (2, 0, 2)]
    for answer in asked:
        conversation = questions[answer.conversation]
        for choice, likelihood in zip(answer.grading.choices, answer.likelihoods):
            asked_so_far = conversation.turns[: 2 * answer.turn + 1]
            prompt = processor.prompt(Conversation("q", asked_so_far, conversation.images))
            whole = processor(Conversation("a", (*asked_so_far, Turn("assistant", choice)), conversation.images))
            batch = processor.collate([whole])
            logits = wrapper(batch).log_softmax(-1)[0]
            places = range(len(prompt.tokens), len(whole.tokens))
            total = sum(float(logits[t - 1, batch.input_ids[0, t]]) for t in places)
            assert likelihood.total == pytest.approx(total, abs=1e-4) and likelihood.tokens == len(places)


@torch.no_grad()
def test_batches_of_any_size_give_the_same_answers_and_likelihoods(model, questions):
    one, many, again = (validator(model, questions, size).answers(model[0], None) for size in (1, 8, 8))
    assert many == again  # bit-identical
    assert [a.prediction for a in one] == [a.prediction for a in many] and any(a.prediction for a in one)
    for a, b in zip(one, many):
        assert [x.total for x in a.likelihoods] == pytest.approx([x.total for x in b.likelihoods], abs=1e-4)


@torch.no_grad()
def test_blind_values_are_those_of_gray_images(model, questions):
    wrapper, processor = model
    mean = tuple(round(255 * value) for value in processor.geometry.mean)

    class Gray:
        def size(self):
            return 48, 48

        def load(self):
            return Image.new("RGB", (48, 48), mean)

    gray = [
        Conversation(talk.id, talk.turns, tuple(Gray() for _ in talk.images))
        for talk in (questions[i] for i in range(len(questions)))
    ]
    scores, shown = validator(model, questions).scores(wrapper, None)
    plain, _ = validator(model, gray).scores(wrapper, None)
    # the mean color is not a multiple of 1/255
    assert scores["blind_loss"] == pytest.approx(plain["loss"], abs=1e-3) and scores["loss"] != scores["blind_loss"]
    assert scores["perplexity"] == pytest.approx(torch.tensor(scores["loss"]).exp().item())
    for key in ("choice_accuracy", "blind_choice_accuracy", "blind_exact_match", "choice_accuracy_normalised"):
        assert 0 <= scores[key] <= 1
    assert shown[1]["scores"].keys() == {"exact_match", "choice_accuracy", "choice_accuracy_normalised"}


def said(function, *values) -> str | None:
    try:
        function(*values)
    except ValueError as error:
        return str(error)
    return None


@pytest.mark.parametrize("name, conversation", [("choice", 0), ("vqa_accuracy", 0), ("yes_no", 0), ("cider", None)])
@torch.no_grad()
def test_metrics_that_cannot_judge_a_question_are_refused_before_it_is_asked(name, conversation, model, questions):
    named = validator(model, questions, metrics=[name])
    before = said(named.check_metrics, None)
    assert before == said(named.scores, model[0], None)
    assert (before and f"names {name}" in before and f"conversation {conversation}" in before) or conversation is None
    assert said(validator(model, [questions[2]], metrics=["choice"]).check_metrics, None) is None
