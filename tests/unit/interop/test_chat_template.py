"""Exported chat templates: typed and plain content give the ids of training, for all tokenizers and templates."""

from __future__ import annotations

import copy

import pytest

from vlmtrain.data.chat_texts import ChatTexts
from vlmtrain.data.processor import Processor
from vlmtrain.data.records import Conversation, Turn
from vlmtrain.data.templates import CHATML
from vlmtrain.interop.chat_template import spoken_words, typed_speech

from ...media import slots
from ..data.chat_formats import CHATS, TOKENIZERS, renderer


def speaking(kind: str, template: str) -> Processor:
    found = renderer(kind, template)
    return Processor(found.tokenizer, None, found.template, 1000)


@pytest.mark.parametrize("template", [*CHATS, "blip"])
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_an_exported_template_renders_what_training_saw(kind, template):
    processor = speaking(kind, template)
    speech = typed_speech(processor)
    items = [{"type": "image"}, {"type": "text", "text": "What color"}, {"type": "text", "text": " is it?"}]
    said = speech.tokenizer.apply_chat_template(
        [{"role": "user", "content": items}], add_generation_prompt=True, tokenize=False
    )
    asked = Conversation("one", (Turn("user", "<image>\nWhat color is it?"),), (None,))
    expected = processor.renderer.prompt(asked, slots(1))
    ids = expected.input_ids.masked_fill(expected.index >= 0, speech.image_id)
    assert speech.tokenizer(said).input_ids == ids.tolist()
    assert speech.tokenizer.padding_side == "left" and renderer(kind, template).tokenizer.chat_template == (
        processor.tokenizer.chat_template
    )


@pytest.mark.parametrize("first", ["{{ '<s>' }}<image>", "{{ '<s>' }}"])
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_an_exported_template_numbers_images_where_they_stand(kind, first):
    """Those of a template that puts all images first, and those within the text."""
    found = renderer(kind, "chatml")
    tokenizer = copy.deepcopy(found.tokenizer)
    tokenizer.chat_template = first + CHATML
    speech = typed_speech(Processor(tokenizer, None, "chat", 1000), "<|image|>", "<|video|>", heading="Image ")
    for kinds, numbered in ((["image"] * 2, ["Image 1<|image|>", "Image 2<|image|>"]), (["video"], ["<|video|>"])):
        items = [{"type": each} for each in kinds] + [{"type": "text", "text": "What color?"}]
        said = speech.tokenizer.apply_chat_template([{"role": "user", "content": items}], tokenize=False)
        if "<image>" in first:
            assert said.startswith(f"<s>{''.join(numbered)}<|im_start|>user\nWhat color?<|im_end|>")
        else:
            assert said.replace(" \n", "\n").startswith("<s><|im_start|>user\n" + "\n".join([*numbered, "What color?"]))


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_blips_processors_insert_images_and_the_first_token_themselves(kind):
    processor = speaking(kind, "blip")
    speech = spoken_words(processor)
    asked = Conversation("one", (Turn("user", "<image>\nWhat is it?"),), (None,))
    expected = processor.renderer.prompt(asked, slots(1))
    said = speech.tokenizer.apply_chat_template([{"role": "user", "content": "<image>\nWhat is it?"}], tokenize=False)
    assert said == "What is it?"
    assert speech.tokenizer(said).input_ids == expected.input_ids[1:].tolist()
    with pytest.raises(ValueError, match="template=bare does not put images before the text: use template=blip"):
        spoken_words(speaking(kind, "bare"))


def test_a_template_that_renders_differently_is_refused():
    processor = speaking("tiny", "vicuna_v1")  # whose template now numbers the turns
    chat = processor.renderer._chat
    numbered = chat.template.replace("'USER: '", "'USER ' ~ loop.index ~ ' '")
    processor.renderer._chat = ChatTexts(chat.tokenizer, numbered)
    with pytest.raises(ValueError, match="would give other tokens than in training"):
        typed_speech(processor)
