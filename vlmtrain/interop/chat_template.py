"""A tokenizer and chat template for export that reproduce `Renderer`, also from typed content.

    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]}
    {"role": "user", "content": "<image>\\nWhat is this?"}

Both are the same turn: images and text keep their order, with a newline between an image and its neighbors. For
classes that take videos, ``{"type": "video"}`` and ``<video>`` stand for videos in the same way.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from typing import NamedTuple

from tokenizers import AddedToken, processors
from transformers import PreTrainedTokenizerBase

from ..data.processor import Processor
from ..data.records import IMAGE_MARK, VIDEO_MARK, BadSample, Conversation, Turn
from ..data.rendering import Renderer
from ..data.templates import INTERLEAVED, chat_template
from ..visual import MediaPlan, Placement

_TYPED = """\
{%- set typed = namespace(messages=[], text='', before='') -%}
{%- for message in messages -%}
{%- if message.content is string -%}{%- set typed.text = message.content -%}
{%- else -%}
{%- set typed.text = '' -%}{%- set typed.before = '' -%}
{%- for item in message.content -%}
{%- set now = KINDS.get(item.type) -%}
{%- if not loop.first and (now or typed.before) -%}{%- set typed.text = typed.text + '\\n' -%}{%- endif -%}
{%- set typed.text = typed.text + (now or item.text) -%}
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
# For templates that put images first: there are none within the text; _PICTURES collects their marks.
_MARKS_OUT = """\
{%- set typed.text = typed.text.split('IMAGE') | map('trim') | join(' ') | trim -%}
"""
_PICTURES = """\
{%- for message in messages -%}
{%- if message.content is string -%}
{%- set shown.marks = shown.marks + 'IMAGE' * (message.content.split('IMAGE') | length - 1) -%}
{%- else -%}
{%- for item in message.content if KINDS.get(item.type) == 'IMAGE' -%}
{%- set shown.marks = shown.marks + 'IMAGE' -%}
{%- endfor -%}
{%- endif -%}
{%- endfor -%}
"""
# For images that are numbered if there are several.
_NUMBERED = """\
{%- set pieces = framed.split('IMAGE') -%}{%- set numbered = namespace(text=pieces[0]) -%}
{%- for piece in pieces[1:] -%}
{%- set heading = HEADING ~ loop.index if pieces | length > 2 else '' -%}
{%- set numbered.text = numbered.text ~ heading ~ 'IMAGE' ~ piece -%}
{%- endfor -%}
{%- set framed = numbered.text -%}
"""
_PLAIN = (
    "{% for message in messages %}"
    "{% if message.role == 'assistant' %}{{ message.content }}"
    "{% elif message.role == 'user' %}{{ 'IMAGE' * (message.content.split('IMAGE') | length - 1) }}{% endif %}"
    "{% endfor %}"
)


class _Shown(NamedTuple):
    """What an export writes for an image or a video: a token, and texts around it."""

    token: str
    before: str = ""
    after: str = ""

    @property
    def text(self) -> str:
        return self.before + self.token + self.after


class Speech(NamedTuple):
    """Rendering of an export: a tokenizer with an image token, the id of that token, and the chat template.

    video_id: of the video token, for classes that take videos.
    """

    tokenizer: PreTrainedTokenizerBase
    image_id: int
    template: str
    video_id: int | None = None

    @property
    def media_ids(self) -> list[int]:
        """The ids of the tokens that stand for images and videos."""
        return [self.image_id] if self.video_id is None else [self.image_id, self.video_id]


def typed_speech(
    processor: Processor,
    token: str = IMAGE_MARK,
    video: str | None = None,
    framed_video: bool = True,
    heading: str = "",
) -> Speech:
    """Tokenizer and template of `processor` for Hugging Face processors that expand image tokens in the text.

    The tokenizer itself adds no special tokens: the template writes all of them. token: the image token. video: the
    video token, for classes that take videos. framed_video: whether the template writes the tokens around it, as around
    images, and not the processor. heading: text before the number of each image if there are several; empty if they are
    not numbered. The tokenizer's own template is kept if it writes these tokens. Raises ValueError if no candidate
    template gives the same token ids.
    """
    renderer, frame = processor.renderer, _frame(processor)
    marks = {IMAGE_MARK: _Shown(token, *frame)}
    if video is not None:
        marks[VIDEO_MARK] = _Shown(video, *frame) if framed_video else _Shown(video)
    tokenizer = _with_media_tokens(renderer.tokenizer, *(shown.token for shown in marks.values()))
    _add_nothing(renderer, tokenizer)
    own = tokenizer.chat_template
    if renderer.template == "chat" and isinstance(own, str) and token != IMAGE_MARK and token in own:
        if not framed_video:
            own = own.replace(frame[0] + video + frame[1], video)
        speech = _speech(tokenizer, own, marks)
        if _difference(renderer, speech, marks, (_exact_message,), heading=heading) is None:
            tokenizer.chat_template = own
            return speech
    inner = [_inner_template(renderer, processor.fallback), *_written_out(renderer)]
    before, start, spacings, changes = "", "", ("", _SPACING), ""
    if renderer.images_first:
        collected = (_PICTURES.replace("IMAGE", mark) for mark in marks)
        before = _with_kinds("{%- set shown = namespace(marks='') -%}" + "".join(collected), video is not None)
        spacings = (_MARKS_OUT,)
    if renderer.places_images:
        changes = f"{{% set framed = framed | replace('{IMAGE_MARK}', shown.marks) %}}"
    elif renderer.images_first:
        start = "{{- shown.marks -}}"
        inner += [each.replace("{{ bos_token }}", "{{ bos_token + ' ' }}") for each in inner]
    if heading:
        changes += _marked(_NUMBERED.replace("HEADING", json.dumps(heading)))
    typed = [_typed(each, video is not None) for each in spacings]
    templates = [start + each + end for end, each in product(inner, typed)]
    texts = {mark: json.dumps(shown.text, ensure_ascii=False) for mark, shown in marks.items()}
    replaced = "".join(f" | replace('{mark}', {texts[mark]})" for mark, shown in marks.items() if shown.text != mark)
    if changes or replaced:
        end = f"{{% endset %}}{changes}{{{{ framed{replaced} }}}}"
        templates = ["{% set framed %}" + each + end for each in templates]
    return _chosen(renderer, tokenizer, [before + each for each in templates], marks, heading=heading)


def spoken_words(processor: Processor) -> Speech:
    """The same for BLIP-2's processors, which put the image tokens and the tokenizer's special tokens before the text.

    Raises ValueError for any template other than ``blip``.
    """
    renderer = processor.renderer
    if not renderer.images_first:
        raise ValueError(f"template={renderer.template} does not put images before the text: use template=blip")
    tokenizer = _with_media_tokens(renderer.tokenizer, IMAGE_MARK)
    _add_nothing(renderer, tokenizer)
    words = _inner_template(renderer, processor.fallback).replace("{{ bos_token }}", "")
    if tokenizer.bos_token is not None:
        start = (tokenizer.bos_token, tokenizer.bos_token_id)
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            f"{start[0]} $A", f"{start[0]} $A $B", [start]
        )
    marks = {IMAGE_MARK: _Shown(IMAGE_MARK, *_frame(processor))}
    return _chosen(renderer, tokenizer, [_typed(_MARKS_OUT) + words], marks, pictures_put=True)


def _frame(processor: Processor) -> tuple[str, str]:
    return processor.geometry.frame if processor.geometry else ("", "")


def _marked(template: str) -> str:
    return template.replace("IMAGE", IMAGE_MARK)


def _typed(spacing: str, videos: bool = False) -> str:
    """The template that makes strings of typed content. spacing: template code about white space next to marks."""
    if videos:
        spacing += spacing.replace("IMAGE", VIDEO_MARK)
    return _marked(_with_kinds(_TYPED.replace("SPACING", spacing), videos))


def _with_kinds(template: str, videos: bool) -> str:
    """The template with the mark of each type of item in the place of KINDS."""
    kinds = {"image": IMAGE_MARK, "image_url": IMAGE_MARK}
    if videos:
        kinds |= {"video": VIDEO_MARK, "video_url": VIDEO_MARK}
    return template.replace("KINDS", str(kinds))


def _speech(tokenizer: PreTrainedTokenizerBase, template: str, marks: Mapping[str, _Shown]) -> Speech:
    image, *video = tokenizer.convert_tokens_to_ids([shown.token for shown in marks.values()])
    return Speech(tokenizer, image, template, *video)


def _with_media_tokens(tokenizer: PreTrainedTokenizerBase, *tokens: str) -> PreTrainedTokenizerBase:
    tokenizer = copy.deepcopy(tokenizer)
    if new := [token for token in tokens if token not in tokenizer.get_vocab()]:
        added = [AddedToken(token, special=True, normalized=False) for token in new]
        tokenizer.add_tokens(added, special_tokens=True)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "left"  # for generation
    return tokenizer


def _chosen(
    renderer: Renderer,
    tokenizer: PreTrainedTokenizerBase,
    templates: list[str],
    marks: Mapping[str, _Shown],
    pictures_put: bool = False,
    heading: str = "",
) -> Speech:
    """Return the first template that gives the same token ids as the renderer. Raises ValueError if none does."""
    differing = ""
    for template in templates:
        speech = _speech(tokenizer, template, marks)
        found = _difference(renderer, speech, marks, pictures_put=pictures_put, heading=heading)
        if found is None:
            tokenizer.chat_template = template
            return speech
        differing = differing or found
    raise ValueError(f"the chat template of the export would give other tokens than in training: {differing}")


def _inner_template(renderer: Renderer, fallback: str | None) -> str:
    if renderer.template == INTERLEAVED:
        return renderer.document_template
    if not renderer.shows_captions:
        return chat_template(renderer.template, renderer.tokenizer, fallback)
    adds = renderer.tokenizer("").input_ids[:1] == [renderer.tokenizer.bos_token_id]
    return ("{{ bos_token }}" if adds else "") + _marked(_PLAIN)


def _written_out(renderer: Renderer) -> list[str]:
    """Templates written from the texts that the renderer puts between turns, if these are the same for every turn.

    For templates that render an answer differently when further turns follow (reasoning templates), unlike training.
    """
    if renderer.shows_captions or renderer.template == INTERLEAVED:
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


def _add_nothing(renderer: Renderer, tokenizer: PreTrainedTokenizerBase) -> None:
    """Let a tokenizer add no special tokens, which templates write.

    What an encoder reads ends with a token that no template writes, and is padded on the right: T5's positions would
    count padding between images and text.
    """
    for key in ("add_bos_token", "add_eos_token"):
        if hasattr(tokenizer, key) and getattr(tokenizer, key):
            setattr(tokenizer, key, False)
        if key in tokenizer.init_kwargs:
            tokenizer.init_kwargs[key] = False
    tokenizer.backend_tokenizer.post_processor = processors.Sequence([])
    if renderer.decoder_start is not None:
        end = tokenizer.eos_token
        frame = (f"$A {end}", f"$A $B {end}", [(end, tokenizer.eos_token_id)])
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(*frame)
        tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "right"


def _conversations(renderer: Renderer) -> list[tuple[Turn, ...]]:
    asked = Turn("user", f"{IMAGE_MARK}\nWhat is 2 + 2? It's \u00e9t\u00e9.")
    if renderer.shows_captions:
        return [(asked,)]
    again = (Turn("assistant", "It is four."), Turn("user", f"And\n{IMAGE_MARK}\n{IMAGE_MARK}\nhere:\n1. a"))
    talks = [(asked,), (Turn("user", "Hello"),), (asked, *again), (asked, again[0], Turn("user", "Why?"))]
    talks.append((Turn("user", f"Look: {IMAGE_MARK}"),))
    return [*talks, *((Turn("system", "Be brief."), *talk) for talk in talks)]


def _difference(
    renderer: Renderer,
    speech: Speech,
    marks: Mapping[str, _Shown],
    messages: Sequence[Callable[[Turn], dict]] | None = None,
    pictures_put: bool = False,
    heading: str = "",
) -> str | None:
    """Describe the first difference between the ids of messages and the renderer's; None if they are equal.

    marks: the marks in a turn and what is written for them. messages: how a turn becomes a message; by default with
    plain and with typed content. pictures_put: whether a processor puts the image tokens before the others. heading: as
    for `typed_speech`.
    """
    for turns, (mark, (token, before, after)) in product(_conversations(renderer), marks.items()):
        token_id = speech.tokenizer.convert_tokens_to_ids(token)
        images = sum(turn.text.count(IMAGE_MARK) for turn in turns)
        try:
            asked = Conversation("export", turns, (None,) * images)
            numbered = heading and mark == IMAGE_MARK and images > 1
            befores = [f"{heading}{number}{before}" if numbered else before for number in range(1, images + 1)]
            places = (Placement(n, (), 3, 3, None, before=text, after=after) for n, text in enumerate(befores))
            wanted = renderer.prompt(asked, MediaPlan((), tuple(places)))
        except BadSample:  # the template may not support a system turn, or only one exchange
            continue
        expected = wanted.input_ids.masked_fill(wanted.index >= 0, token_id).tolist()[: wanted.encoded]
        for message_of in messages or (_string_message, _typed_message):
            text = speech.tokenizer.apply_chat_template(
                [_showing(message_of(turn), mark) for turn in turns],
                chat_template=speech.template,
                add_generation_prompt=True,
                tokenize=False,
            ).replace(token, token * 3)
            found = [token_id] * (3 * images if pictures_put else 0) + speech.tokenizer(text).input_ids
            if found != expected:
                alike = min(len(found), len(expected))
                start = next((i for i in range(alike) if found[i] != expected[i]), max(0, alike - 4))
                shown = (speech.tokenizer.decode(ids[start : start + 8]) for ids in (found, expected))
                return "got {!r}, expected {!r}".format(*shown)
    return None


def _showing(message: dict, mark: str) -> dict:
    """The message with other media in the place of its images."""
    if mark == IMAGE_MARK:
        return message
    if isinstance(message["content"], str):
        return message | {"content": message["content"].replace(IMAGE_MARK, mark)}
    return message | {"content": [{"type": "video"} if "text" not in item else item for item in message["content"]]}


def _string_message(turn: Turn) -> dict:
    return {"role": turn.role, "content": turn.text}


def _exact_message(turn: Turn) -> dict:
    """A turn of the user as typed items whose texts include all white space; others as they are."""
    if turn.role != "user":
        return _string_message(turn)
    first, *rest = turn.text.split(IMAGE_MARK)
    content = [{"type": "text", "text": first}] if first else []
    for piece in rest:
        content += [{"type": "image"}, *([{"type": "text", "text": piece}] if piece else [])]
    return {"role": turn.role, "content": content}


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
