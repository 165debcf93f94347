"""A tokenizer and chat template for export that reproduce `Renderer`, also from typed content.

    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]}
    {"role": "user", "content": "<image>\\nWhat is this?"}

Both are the same turn: images and text keep their order, with a newline between an image and its neighbors.
"""

from __future__ import annotations

import copy
import json
import re
from itertools import product
from typing import NamedTuple

from tokenizers import AddedToken, processors
from transformers import PreTrainedTokenizerBase

from ..data.processor import Processor
from ..data.records import IMAGE_MARK, BadSample, Conversation, Turn
from ..data.rendering import Renderer
from ..data.templates import chat_template
from ..visual import MediaPlan

_TYPED = """\
{%- set typed = namespace(messages=[], text='', before='') -%}
{%- for message in messages -%}
{%- if message.content is string -%}{%- set typed.text = message.content -%}
{%- else -%}
{%- set typed.text = '' -%}{%- set typed.before = '' -%}
{%- for item in message.content -%}
{%- set now = 'image' if item.type in ('image', 'image_url') else 'text' -%}
{%- if typed.before and 'image' in (now, typed.before) -%}{%- set typed.text = typed.text + '\\n' -%}{%- endif -%}
{%- set typed.text = typed.text + ('IMAGE' if now == 'image' else item.text) -%}
{%- set typed.before = now -%}
{%- endfor -%}
{%- endif -%}
{%- set typed.text = typed.text | trim -%}
SPACING\
{%- set typed.messages = typed.messages + [dict(message, content=typed.text)] -%}
{%- endfor -%}
{%- set messages = typed.messages -%}
"""
# For a tokenizer that adds a space before the first word of a text, but not after a special token.
_SPACING = """\
{%- set pieces = typed.text.split('IMAGE') -%}{%- set typed.text = pieces[0] -%}
{%- for piece in pieces[1:] -%}
{%- set space = ' ' if piece and not piece.startswith(' ') else '' -%}
{%- set typed.text = typed.text + 'IMAGE' + space + piece -%}
{%- endfor -%}
"""
# For `blip`: there are no images within the text; _PICTURES puts them before it, or the processor does.
_MARKS_OUT = """\
{%- set typed.text = typed.text.split('IMAGE') | map('trim') | join(' ') | trim -%}
"""
_PICTURES = """\
{%- set shown = namespace(marks='') -%}
{%- for message in messages -%}
{%- if message.content is string -%}
{%- set shown.marks = shown.marks + 'IMAGE' * (message.content.split('IMAGE') | length - 1) -%}
{%- else -%}
{%- for item in message.content if item.type in ('image', 'image_url') -%}
{%- set shown.marks = shown.marks + 'IMAGE' -%}
{%- endfor -%}
{%- endif -%}
{%- endfor -%}
{{- shown.marks -}}
"""
_PLAIN = (
    "{% for message in messages %}"
    "{% if message.role == 'assistant' %}{{ message.content }}"
    "{% elif message.role == 'user' %}{{ 'IMAGE' * (message.content.split('IMAGE') | length - 1) }}{% endif %}"
    "{% endfor %}"
)


class Speech(NamedTuple):
    """Rendering of an export: a tokenizer with an image token, the id of that token, and the chat template."""

    tokenizer: PreTrainedTokenizerBase
    image_id: int
    template: str


def typed_speech(processor: Processor) -> Speech:
    """Tokenizer and template of `processor` for Hugging Face processors that expand image tokens in the text.

    The tokenizer itself adds no special tokens: the template writes all of them. Raises ValueError if no candidate
    template gives the same token ids.
    """
    renderer = processor.renderer
    tokenizer = _with_image_token(renderer.tokenizer)
    _add_nothing(tokenizer)
    inner = [_inner_template(renderer, processor.fallback), *_written_out(renderer)]
    before, spacings = "", ("", _SPACING)
    if renderer.pictures_first:
        before, spacings = _PICTURES, (_MARKS_OUT,)
        inner += [each.replace("{{ bos_token }}", "{{ bos_token + ' ' }}") for each in inner]
    return _chosen(
        renderer,
        tokenizer,
        [_marked(before + _TYPED.replace("SPACING", each)) + end for end, each in product(inner, spacings)],
    )


def spoken_words(processor: Processor) -> Speech:
    """The same for BLIP-2's processors, which put the image tokens and the tokenizer's special tokens before the text.

    Raises ValueError for any template other than ``blip``.
    """
    renderer = processor.renderer
    if not renderer.pictures_first:
        raise ValueError(f"template={renderer.template} does not put images before the text: use template=blip")
    tokenizer = _with_image_token(renderer.tokenizer)
    _add_nothing(tokenizer)
    words = _inner_template(renderer, processor.fallback).replace("{{ bos_token }}", "")
    if tokenizer.bos_token is not None:
        start = (tokenizer.bos_token, tokenizer.bos_token_id)
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            f"{start[0]} $A", f"{start[0]} $A $B", [start]
        )
    return _chosen(renderer, tokenizer, [_marked(_TYPED.replace("SPACING", _MARKS_OUT)) + words], pictures_put=True)


def _marked(template: str) -> str:
    return template.replace("IMAGE", IMAGE_MARK)


def _with_image_token(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    tokenizer = copy.deepcopy(tokenizer)
    if IMAGE_MARK not in tokenizer.get_vocab():
        tokenizer.add_tokens([AddedToken(IMAGE_MARK, special=True, normalized=False)], special_tokens=True)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "left"  # for generation
    return tokenizer


def _chosen(
    renderer: Renderer, tokenizer: PreTrainedTokenizerBase, templates: list[str], pictures_put: bool = False
) -> Speech:
    """Return the first template that gives the same token ids as the renderer. Raises ValueError if none does."""
    image_id, differing = tokenizer.convert_tokens_to_ids(IMAGE_MARK), ""
    for template in templates:
        speech = Speech(tokenizer, image_id, template)
        found = _difference(renderer, speech, pictures_put)
        if found is None:
            tokenizer.chat_template = template
            return speech
        differing = differing or found
    raise ValueError(f"the chat template of the export would give other tokens than in training: {differing}")


def _inner_template(renderer: Renderer, fallback: str | None) -> str:
    if renderer.template != "plain":
        return chat_template(renderer.template, renderer.tokenizer, fallback)
    adds = renderer.tokenizer("").input_ids[:1] == [renderer.tokenizer.bos_token_id]
    return ("{{ bos_token }}" if adds else "") + _marked(_PLAIN)


def _written_out(renderer: Renderer) -> list[str]:
    """Templates written from the texts that the renderer puts between turns, if these are the same for every turn.

    For templates that render an answer differently when further turns follow (reasoning templates), unlike training.
    """
    if renderer.template == "plain":
        return []
    talk = (Turn("user", "a"), Turn("assistant", "b")) * 3
    start, ask, end, *more, _ = renderer.template_texts(talk)
    try:
        before, after, *told, _ = renderer.template_texts((Turn("system", "s"), *talk))
    except ValueError:  # the template does not support a system turn
        before, after, told = "", "", [ask, end, *more]
    if more != [ask, end, ask] or told != [ask, end, *more]:
        return []
    texts = {"START": start, "BEFORE": before, "AFTER": after, "ASKED": ask.rstrip(" "), "ASK": ask, "END": end}
    template = (
        "{% if messages[0].role == 'system' %}{{ BEFORE + messages[0].content + AFTER }}{% set turns = messages[1:] %}"
        "{% else %}{{ START }}{% set turns = messages %}{% endif %}"
        "{% for turn in turns %}{{ turn.content }}"
        "{% if turn.role != 'user' %}{{ END }}{% elif not loop.last %}{{ ASK }}"
        "{% elif add_generation_prompt %}{{ ASKED }}{% endif %}{% endfor %}"
    )
    return [re.sub("|".join(texts), lambda found: json.dumps(texts[found[0]], ensure_ascii=False), template)]


def _add_nothing(tokenizer: PreTrainedTokenizerBase) -> None:
    for key in ("add_bos_token", "add_eos_token"):
        if hasattr(tokenizer, key) and getattr(tokenizer, key):
            setattr(tokenizer, key, False)
        if key in tokenizer.init_kwargs:
            tokenizer.init_kwargs[key] = False
    tokenizer.backend_tokenizer.post_processor = processors.Sequence([])


def _conversations(renderer: Renderer) -> list[tuple[Turn, ...]]:
    asked = Turn("user", f"{IMAGE_MARK}\nWhat is 2 + 2? It's \u00e9t\u00e9.")
    if renderer.template == "plain":
        return [(asked,)]
    again = (Turn("assistant", "It is four."), Turn("user", f"And\n{IMAGE_MARK}\n{IMAGE_MARK}\nhere:\n1. a"))
    talks = [(asked,), (Turn("user", "Hello"),), (asked, *again), (asked, again[0], Turn("user", "Why?"))]
    talks.append((Turn("user", f"Look: {IMAGE_MARK}"),))
    return [*talks, *((Turn("system", "Be brief."), *talk) for talk in talks)]


def _difference(renderer: Renderer, speech: Speech, pictures_put: bool) -> str | None:
    """Describe the first difference between the ids of typed or plain content and the renderer's; None if equal.

    pictures_put: whether a processor puts the image tokens before the others.
    """
    for turns in _conversations(renderer):
        images = sum(turn.text.count(IMAGE_MARK) for turn in turns)
        try:
            asked = Conversation("export", turns, (None,) * images)
            wanted = renderer.prompt(asked, MediaPlan.of_slots(*[3] * images))
        except BadSample:  # the template may not support a system turn, or only one exchange
            continue
        expected = wanted.input_ids.masked_fill(wanted.index >= 0, speech.image_id).tolist()
        for message_of in (_string_message, _typed_message):
            text = speech.tokenizer.apply_chat_template(
                [message_of(turn) for turn in turns],
                chat_template=speech.template,
                add_generation_prompt=True,
                tokenize=False,
            ).replace(IMAGE_MARK, IMAGE_MARK * 3)
            found = [speech.image_id] * (3 * images if pictures_put else 0) + speech.tokenizer(text).input_ids
            if found != expected:
                alike = min(len(found), len(expected))
                start = next((i for i in range(alike) if found[i] != expected[i]), max(0, alike - 4))
                shown = (speech.tokenizer.decode(ids[start : start + 8]) for ids in (found, expected))
                return "got {!r}, expected {!r}".format(*shown)
    return None


def _string_message(turn: Turn) -> dict:
    return {"role": turn.role, "content": turn.text}


def _typed_message(turn: Turn) -> dict:
    """A turn as typed items; unchanged if an image is in the middle of a line, which items cannot express."""
    content: list[dict] = []
    pieces = turn.text.split(IMAGE_MARK)
    for number, piece in enumerate(pieces):
        if number:
            content.append({"type": "image"})
            if piece and not piece.startswith("\n"):
                return _string_message(turn)
        if number < len(pieces) - 1 and piece and not piece.endswith("\n"):
            return _string_message(turn)
        text = piece.removeprefix("\n") if number else piece
        text = text.removesuffix("\n") if number < len(pieces) - 1 else text
        if text:
            content.append({"type": "text", "text": text})
    return {"role": turn.role, "content": content}
