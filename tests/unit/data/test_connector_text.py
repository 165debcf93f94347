"""The text that a connector reads with each image: its speaker and vocabulary, and that it stays with its image."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from transformers import BertTokenizerFast

from vlmtrain.data.connector_text import TextReader, text_vocabulary
from vlmtrain.data.geometry import Geometry
from vlmtrain.data.processor import Processor
from vlmtrain.data.records import IMAGE_MARK, BadSample, Conversation, Turn

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "circle", "what", "color", "and", "now", "[", "]", "sep"]
GRAY = (0.5, 0.5, 0.5)


class StubImage:
    def __init__(self, height: int = 8, width: int = 8):
        self.shape = height, width

    def size(self) -> tuple[int, int]:
        return self.shape

    def load(self) -> Image.Image:
        return Image.new("RGB", self.shape[::-1])


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    file = tmp_path_factory.mktemp("bert") / "vocab.txt"
    file.write_text("\n".join(WORDS))
    return BertTokenizerFast(str(file))


def talk(*texts: str, pictures: int) -> Conversation:
    turns = [Turn("user" if i % 2 == 0 else "assistant", text) for i, text in enumerate(texts)]
    return Conversation("talk", tuple(turns), (StubImage(),) * pictures)


TALK = talk(
    f"{IMAGE_MARK}\nwhat color", "red", "now what", "circle", f"and {IMAGE_MARK}{IMAGE_MARK} now", "red red", pictures=3
)


def said(reader: TextReader, conversation: Conversation) -> list[str]:
    return [reader.tokenizer.decode(ids[1:-1]) for ids in reader(conversation)]


def test_berts_vocabulary_becomes_blip_2s(bert):
    assert text_vocabulary(bert) == (len(WORDS) + 1, 2, 3)


def test_a_tokenizer_that_has_the_last_id_keeps_its_size(bert, tmp_path):
    bert.save_pretrained(tmp_path)
    published = BertTokenizerFast.from_pretrained(tmp_path)
    published.add_special_tokens({"bos_token": "[DEC]"})
    assert text_vocabulary(published) == (len(WORDS) + 1, 2, 3)


def test_a_tokenizer_without_cls_gets_one(tokenizer):
    assert tokenizer.cls_token_id is None and tokenizer.sep_token_id is None
    assert text_vocabulary(tokenizer) == (len(tokenizer) + 2, len(tokenizer), tokenizer.eos_token_id)


def test_an_instruction_is_the_users_text_in_the_turn_of_the_image(bert):
    assert said(TextReader(bert, "instruction", 20), TALK) == ["what color", "and now", "and now"]


def test_an_answer_is_the_assistants_text_about_the_image(bert):
    assert said(TextReader(bert, "answer", 20), TALK) == ["red", "red red", "red red"]


def test_texts_get_special_tokens_and_are_truncated(bert):
    words = "what color and now"
    ids = bert(words, add_special_tokens=False).input_ids
    assert TextReader(bert, "answer", 6).encode(words).tolist() == [2, *ids, 3]
    assert TextReader(bert, "answer", 5).encode(words).tolist() == [2, *ids[:3], 3]
    assert TextReader(bert, "instruction", 5).encode(words).tolist() == [2, *ids[1:], 3]
    assert TextReader(bert, "instruction", 2).encode(words).tolist() == [2, 3]


def test_special_tokens_in_text_stay_text(bert, tokenizer):
    assert TextReader(bert, "instruction", 20).encode("red [SEP] circle").tolist() == [2, 5, 11, 13, 12, 6, 3]
    assert tokenizer.eos_token_id not in TextReader(tokenizer, "instruction", 20).encode("red <|end|> circle")[:-1]


@pytest.mark.parametrize("reads, length, said", [("question", 9, "read=question: expected one"), ("answer", 1, "=1: ")])
def test_what_cannot_be_read_is_named(bert, reads, length, said):
    with pytest.raises(ValueError, match=f"connector_text.*{said}"):
        TextReader(bert, reads, length)


# batches


def processor(tokenizer, reader: TextReader | None, fit: str = "squash", **options) -> Processor:
    grids = ((1, 2), (2, 1)) if fit == "tiles" else ()
    geometry = Geometry((8, 8), fit, GRAY, GRAY, tokens=4, grid=(2, 2), tile_grids=grids)
    return Processor(tokenizer, geometry, "chat", 300, reader=reader, **options)


OTHER = talk(f"what circle {IMAGE_MARK}", "red", pictures=1)
SILENT = talk("what now", "circle", pictures=0)


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_texts_stay_with_their_images(bert, tokenizer, layout):
    make = processor(tokenizer, TextReader(bert, "instruction", 20))
    samples = [make(conversation) for conversation in (OTHER, SILENT, TALK)]
    batch = make.collate(samples) if layout == "padded" else make.pack(samples)
    expected = ["what circle", "what color", "and now", "and now"]
    assert len(batch.visual.pixels[0]) == 4
    for ids, mask, words in zip(*batch.visual.texts, expected, strict=True):
        assert bert.decode(ids[mask]) == f"[CLS] {words} [SEP]"
    assert batch.to(torch.device("cpu"), torch.bfloat16).visual.texts.ids.dtype == torch.int64


def test_every_view_of_an_image_has_its_text(bert, tokenizer):
    make = processor(tokenizer, TextReader(bert, "instruction", 20), "tiles")
    batch = make.collate([make(OTHER), make(TALK)])
    assert len(batch.visual.pixels[0]) == len(batch.visual.texts.ids) == 4 * 3
    said = [bert.decode(ids[mask]) for ids, mask in zip(*batch.visual.texts)]
    expected = ["what circle", "what color", "and now", "and now"]
    assert said == [f"[CLS] {words} [SEP]" for words in expected for _ in range(3)]


def test_a_placeholder_image_has_a_placeholder_text(bert, tokenizer):
    make = processor(tokenizer, TextReader(bert, "instruction", 20))
    for batch in (make.collate([make(SILENT)]), make.collate([], rows=2), make.pack([])):
        assert len(batch.visual.pixels[0]) == 1 and not batch.visual.items
        assert batch.visual.texts.ids.tolist() == [[2, 3]] and batch.visual.texts.mask.all()


def test_without_a_reader_there_is_no_text(tokenizer):
    make = processor(tokenizer, None)
    batch = make.collate([make(OTHER)])
    assert batch.visual.texts is None


def test_a_prompt_has_the_text_of_its_images(bert, tokenizer):
    make = processor(tokenizer, TextReader(bert, "instruction", 20))
    sample = make(TALK)
    starts = sample.tokens.answers[0][0], sample.tokens.answers[2][0]
    first, last = (sample.cut(sample.tokens.until(start)) for start in starts)
    assert len(first.pixels[0]) == len(first.texts) == 1 and len(last.pixels[0]) == len(last.texts) == 3
    assert all(one.equal(other) for one, other in zip(last.texts, sample.texts))
    asked = make.prompt(Conversation("asked", TALK.turns[:1], TALK.images[:1]))
    assert [ids.tolist() for ids in asked.texts] == [sample.texts[0].tolist()]


@pytest.mark.parametrize("own", [True, False])
def test_saved_and_loaded_it_reads_the_same(bert, tokenizer, tmp_path, own):
    make = processor(tokenizer, TextReader(bert if own else tokenizer, "instruction", 20))
    make.save_pretrained(tmp_path)
    again = Processor.from_pretrained(tmp_path)
    assert [t.tolist() for t in again(TALK).texts] == [t.tolist() for t in make(TALK).texts]
    assert again.tokenizer.get_vocab() == tokenizer.get_vocab()


@pytest.mark.parametrize("conversation", [SILENT, TALK])
def test_pairs_have_one_image(tokenizer, conversation):
    with pytest.raises(BadSample, match=f"talk: {len(conversation.images)} images"):
        processor(tokenizer, None, in_pairs=True)(conversation)
