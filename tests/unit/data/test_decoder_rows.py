"""Rows of encoder-decoder models: what the encoder and the decoder read, compared with a tokenizer like T5's."""

from __future__ import annotations

import pytest
import torch
from tokenizers import processors
from transformers import PreTrainedTokenizerBase

from vlmtrain.data.mixture import Mixture
from vlmtrain.data.processor import Processor
from vlmtrain.data.records import BadSample, Conversation, Turn
from vlmtrain.data.rendered import IGNORE, Rendered
from vlmtrain.data.rendering import Renderer

from ...media import slots
from .chat_formats import tokenizers, unigram

START = 0
CAPTION = "a red circle and a blue square"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    """Like T5's: a space before every text, and </s> behind it."""
    found = unigram("always")
    found.backend_tokenizer.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 2)])
    found.bos_token = None
    return found


def talk(*texts: str) -> Conversation:
    turns = tuple(Turn(("user", "assistant")[i % 2], text) for i, text in enumerate(texts))
    return Conversation("7", turns, (None,) * sum(text.count("<image>") for text in texts[::2]))


def render(subject: Renderer, *texts: str, place: float | None = None) -> Rendered:
    return subject.render(talk(*texts), slots(*[3] * len(talk(*texts).media)), place)


def parts(row: Rendered) -> tuple[list[int], list[int], list[int]]:
    """Ids of the text of the encoder and of the decoder, and the decoder's targets. The encoder has none."""
    ids, split = row.input_ids, row.encoded
    assert row.targets[:split].eq(IGNORE).all() and row.index[split:].eq(-1).all()
    trained = row.targets[split:]
    assert trained[:-1].ne(IGNORE).all() and trained[-1] == IGNORE and row.weights.gt(0).equal(row.targets.ne(IGNORE))
    return ids[:split][row.index[:split] == -1].tolist(), ids[split:].tolist(), trained[:-1].tolist()


def test_a_question_enters_the_encoder_and_its_answer_the_decoder(tokenizer):
    subject = Renderer(tokenizer, "blip", 50, decoder_start=START)
    row = render(subject, "What <image> color is the circle", "red and blue")
    encoder, decoder, targets = parts(row)
    assert row.index[:4].tolist() == [0, 0, 0, -1]
    assert encoder == tokenizer("What color is the circle").input_ids  # with </s>
    assert targets == tokenizer("red and blue").input_ids
    assert decoder == [START, *targets]  # shifted right; the last position has no target
    prompt = subject.prompt(talk("What <image> color is the circle"), slots(3))
    assert prompt.input_ids.equal(row.input_ids[: row.encoded + 1]) and prompt.encoded == row.encoded
    assert subject.stop_ids == [2] and subject.decode(targets) == "red and blue"


def test_earlier_turns_enter_the_encoder(tokenizer):
    subject = Renderer(tokenizer, "bare", 80, decoder_start=START)
    row = render(subject, "<image> What color", "red", "How many", "two")
    encoder, _, targets = parts(row)
    assert encoder == tokenizer("What color red</s>How many").input_ids
    assert targets == tokenizer("two").input_ids
    assert row.answers == ((0, 0), (row.encoded + 1, len(row)))
    shorter = Renderer(tokenizer, "bare", len(row) - 1, decoder_start=START)
    assert parts(render(shorter, "<image> What color", "red", "How many", "two"))[2] == tokenizer("red").input_ids


@pytest.mark.parametrize("place, share", [(None, None), (0.0, 0.0), (0.5, 0.5), (0.999, 1.0)])
def test_a_caption_is_cut_between_its_first_token_and_its_middle(place, share, tokenizer):
    subject = Renderer(tokenizer, "prefix", 50, decoder_start=START)
    row = render(subject, "<image> Describe", CAPTION, place=place)
    whole = tokenizer(CAPTION).input_ids[:-1]
    middle = len(whole) // 2
    cut = 0 if share is None else min(middle, 1 + int(share * middle))
    encoder, decoder, targets = parts(row)
    assert encoder == [*whole[:cut], 2] and targets == [*whole[cut:], 2] and decoder[0] == START
    known = subject.lengths([talk("<image> Describe", CAPTION)], [slots(3)])
    assert known == [len(row)] == [3 + len(whole) + 3]  # two ends and the start token


def test_a_caption_of_one_token_is_not_cut(tokenizer):
    row = render(Renderer(tokenizer, "prefix", 50, decoder_start=START), "<image>", "red", place=0.9)
    assert parts(row)[2] == tokenizer("red").input_ids


def test_a_decoder_only_model_reads_the_prefix_without_learning_it():
    plain, cut = (
        Renderer(tokenizers()["byte_bpe"], template, 60).render(talk("<image>", CAPTION), slots(3), 0.999)
        for template in ("plain", "prefix")
    )
    assert cut.input_ids.equal(plain.input_ids) and cut.encoded is None
    answer = plain.answers[0]
    half = (answer[1] - 1 - answer[0]) // 2  # without the newline at its end
    assert cut.answers == ((answer[0] + half, answer[1]),)
    assert int((cut.weights > 0).sum()) == int((plain.weights > 0).sum()) - half


@pytest.mark.parametrize("template", ["blip", "bare", "plain", "vicuna_v1"])
def test_lengths_are_those_of_rendered_rows(template, tokenizer):
    subject = Renderer(tokenizer, template, 200, decoder_start=START)
    talks = [talk("<image> What color", "red"), talk("<image>", CAPTION)]
    talks += [] if template == "plain" else [talk("<image> What", "red", "How many", "two")]
    found = subject.lengths(talks, [slots(3)] * len(talks))
    assert found == [len(subject.render(each, slots(3))) for each in talks]


def test_padded_rows_tell_the_parts(tokenizer):
    subject = Processor(tokenizer, None, "blip", 50, decoder_start=START)
    samples = [subject(talk("What", "red and blue")), subject(talk("What color is this", "red"))]
    batch = subject.collate(samples, rows=3)
    assert batch.decoder.starts.tolist() == [samples[0].tokens.encoded, samples[1].tokens.encoded, 1]
    assert batch.decoder.encoder_width == samples[1].tokens.encoded
    assert batch.decoder.width == len(samples[0].tokens) - samples[0].tokens.encoded
    assert batch.lengths.tolist() == [*(len(sample.tokens) for sample in samples), 2]
    assert batch.trained.ids.tolist() == [*tokenizer("red and blue").input_ids, *tokenizer("red").input_ids]


def test_the_place_of_a_cut_depends_on_seed_and_position_only():
    one, same, other = (Mixture({"a": [None] * size}, seed=seed) for size, seed in ((5, 0), (9, 0), (5, 1)))
    places = torch.tensor([one.place(position) for position in range(400)])
    assert places.tolist() == [same.place(position) for position in range(400)]
    assert abs(float(places.mean()) - 0.5) < 0.05 and places.min() >= 0 and places.max() < 1
    assert len(places.unique()) > 390 and places.tolist() != [other.place(position) for position in range(400)]


def test_a_tokenizer_that_adds_other_tokens_is_refused():
    with pytest.raises(ValueError, match=r"adds at most an end-of-text token, got \['<s>'\]"):
        Renderer(unigram("always"), "blip", 50, decoder_start=START)


def test_a_record_without_a_trained_last_answer_is_bad(tokenizer):
    turns = (Turn("user", "What"), Turn("assistant", "red"), Turn("user", "How"), Turn("assistant", "two", weight=0.0))
    with pytest.raises(BadSample, match="nothing to learn"):
        Renderer(tokenizer, "blip", 50, decoder_start=START).render(Conversation("7", turns), slots())
