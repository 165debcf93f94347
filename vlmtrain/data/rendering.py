"""Rendering: converts a conversation into tokens and targets in one pass.

    conversation -> template -> spans of text (template, user, assistant, image) -> tokens + targets

Template text and the text of turns are separated before tokenization, and tokens are assigned to spans by their
character offsets, so no string has to be searched for inside another. Special-token strings in the text of a turn
are encoded as ordinary text: only those of the template become control tokens.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..time_limit import time_limit
from ..visual import NO_MEDIA, MediaPlan
from .chat_texts import ChatTexts, is_silent
from .grading import check_grading
from .positions import POSITIONS
from .records import IMAGE_MARK, BadSample, Conversation, Dropped, Turn, check_content, check_conversation
from .rendered import IGNORE, Rendered
from .spans import IMAGE, Span, for_decoder, merged, with_images, without_marks
from .templates import CAPTIONS, CHUNK_END, IMAGES_FIRST, INTERLEAVED, chat_template

RENDERING = 2  # to be increased when conversations are rendered to other numbers of tokens
PROBE_SECONDS = 20

_Run = list[tuple[str, int]]
"""Texts that are tokenized as one string, each with the assistant turn that it trains, or -1."""


class _Slots(NamedTuple):
    """The slots of a placement. newlines: see `Placement`."""

    number: int
    count: int
    newlines: int


class Renderer:
    """Renders conversations for one tokenizer and template.

    template: ``plain`` (only the caption, as in LLaVA's pretraining: images, caption, newline), ``prefix`` (the same,
    but the beginning of the caption up to a random token, at most its middle, is part of the prompt, as in BLIP-2's
    training of FlanT5), ``chat`` (the tokenizer's own chat template, or else `fallback`), ``interleaved`` (only the
    text of the turns, with `templates.CHUNK_END` after that which follows an image), or a name in
    `templates.TEMPLATES`. If a chat template writes ``<image>`` before the first turn, all images stand there (Molmo2),
    and if it writes one before each turn of the user, those of the turn (Otter). positions: the rows of positions that
    the language model reads, a name in `positions.POSITIONS`; None if it reads none. controls: tokens that the media
    plan puts into the template's text, and that are ordinary text in a turn. allowed: pattern of special tokens that
    the text of a turn may contain, such as those around boxes. slot: token at the positions of images; None for the
    filler. newline: token after the rows of an image; None if there are none. shared: whether images with nothing
    between them share the token there, and spaces next to images are dropped. decoder_start: id of the token with which
    the decoder of an encoder-decoder model begins: the encoder then reads the text before the last answer, followed by
    the end-of-text token, and the decoder the last answer and this token again; None for a decoder-only model.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: str,
        max_length: int,
        fallback: str | None = None,
        positions: str | None = None,
        controls: Sequence[str] = (),
        allowed: str = r"(?!)",
        slot: str | None = None,
        newline: str | None = None,
        shared: bool = False,
        decoder_start: int | None = None,
    ):
        self.shared = shared
        self.rows = None if positions is None else POSITIONS[positions]
        self.tokenizer = tokenizer
        self.template = template
        self.max_length = max_length
        self.shows_captions, self._is_document = template in CAPTIONS, template == INTERLEAVED
        jinja = None if self.shows_captions or self._is_document else chat_template(template, tokenizer, fallback)
        self._chunk_end = CHUNK_END if CHUNK_END in tokenizer.get_vocab() else ""
        if self._is_document and decoder_start is not None:
            raise ValueError(f"template={template} trains on all text: it needs a decoder-only language model")
        names = (template, fallback) if template == "chat" and not tokenizer.chat_template else (template,)
        self.images_first = not IMAGES_FIRST.isdisjoint(names)
        self.places_images = False  # whether the template writes the mark at which they stand
        self._places_each_turns = False  # whether it writes one for each turn of the user
        # Many control tokens (Llama-3's headers, Phi-3's <|end|>) are not in `all_special_tokens`.
        added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        marks = filter(re.compile(r"<\S+>|\[\S+\]").fullmatch, tokenizer.get_added_vocab())
        in_template = {mark for mark in marks if mark in (jinja or "")}
        controls = set(controls) - {""}
        if self._is_document:
            in_template |= {CHUNK_END, IMAGE_MARK}
        specials = added.union(tokenizer.all_special_tokens, in_template, controls)
        specials = sorted((each for each in specials if not re.fullmatch(allowed, each)), key=len, reverse=True)
        self._hidden = {
            number
            for number, token in tokenizer.added_tokens_decoder.items()
            if token.special and not re.fullmatch(allowed, token.content)
        }
        self._special = re.compile("|".join(map(re.escape, specials)) or r"(?!)")
        self.filler = tokenizer.pad_token_id or 0
        self.slot = self.filler if slot is None else tokenizer.convert_tokens_to_ids(slot)
        self.newline = None if newline is None else tokenizer.convert_tokens_to_ids(newline)
        self.decoder_start = decoder_start
        if decoder_start is not None and tokenizer("").input_ids not in ([], [tokenizer.eos_token_id]):
            raise ValueError(
                "an encoder-decoder language model needs a tokenizer that adds at most an end-of-text token, got "
                f"{tokenizer.convert_ids_to_tokens(tokenizer('').input_ids)}"
            )
        self._chat: ChatTexts | None = None
        if jinja is not None:
            with time_limit(PROBE_SECONDS, f"template={template}: the chat template does not end"):
                self._chat = ChatTexts(tokenizer, jinja)
                self._probe()
                self._chat.probe()

    def _probe(self) -> None:
        """Determine where the chat template puts images. Raises BadSample, a ValueError, if it cannot be trained on."""
        once = (Turn("user", "question"), Turn("assistant", "answer"))
        self._spans(Conversation(f"template={self.template}", once))
        with suppress(ValueError):
            self._places_each_turns = all(IMAGE_MARK in text for text in self._chat.between(once * 2)[::2][:2])
        self.places_images = IMAGE_MARK in self._chat.between(once)[0] and not self._places_each_turns
        self.images_first |= self.places_images

    @property
    def sample_texts(self) -> list[str]:
        """The template's text around a question and its answer."""
        return [] if self._chat is None else self._chat.around((Turn("user", "question"), Turn("assistant", "answer")))

    @property
    def stop_ids(self) -> list[int]:
        """Token ids that end an answer."""
        if self.shows_captions and self.decoder_start is not None:
            stop = []
        elif self.shows_captions:
            stop = self.tokenizer("\n", add_special_tokens=False).input_ids[-1:]
        else:
            exchange = Turn("user", "question"), Turn("assistant", "answer")
            probe = self._render(Conversation("stop", exchange), NO_MEDIA)
            stop = [int(probe.input_ids[probe.answers[-1][1] - 1])]
        eos = self.tokenizer.eos_token_id
        return stop if eos is None or eos in stop else [*stop, eos]

    def render(self, conversation: Conversation, media: MediaPlan, place: float | None = None) -> Rendered:
        """Tokens and targets of a conversation, with the slots of its planned `media`.

        place: for ``prefix``, a random number in [0, 1), which decides where the caption is cut; None for no cut. It
        does not change the number of tokens.

        A conversation longer than `max_length` loses complete turns from its end; images are never cut. With ``plain``
        the question counts as well although it is not rendered, so that the length of a record does not depend on the
        template. Raises BadSample, naming the conversation, if no target remains or if marks and images do not match.

        With ``interleaved``, the first `max_length` tokens remain, or those of the conversation's `Window`, with the
        images that are completely among them. Raises Dropped if no target or no image remains.
        """
        conversation = self._checked(conversation)
        if self._is_document:
            return self._document(conversation, media)
        turns = conversation.turns
        unseen = self._unseen(conversation)
        while True:
            rendered = self._render(replace(conversation, turns=turns), media, place)
            if len(rendered) + unseen <= self.max_length:
                break
            turns = turns[:-1]
            while turns and turns[-1].role != "assistant":
                turns = turns[:-1]
            if not turns or IMAGE_MARK in "".join(t.text for t in conversation.turns[len(turns) :] if t.role == "user"):
                of_images = sum(placement.slots for placement in media.placements)
                raise BadSample(
                    f"{conversation.id}: {len(rendered) + unseen} tokens ({of_images} of images) exceed "
                    f"max_length={self.max_length}"
                )
        if not (rendered.weights > 0).any():
            raise BadSample(f"{conversation.id}: nothing to learn: no assistant text")
        return rendered

    def _document(self, conversation: Conversation, media: MediaPlan) -> Rendered:
        rendered = self._render(conversation, media)
        start, images = conversation.window
        excess = max(0, len(rendered) - self.max_length)
        if excess or _has_more(conversation):
            first = int(start * (excess + 1))
            rendered = rendered.between(first, first + self.max_length, images)
        if not (rendered.weights > 0).any() or (conversation.media and not rendered.media.placements):
            raise Dropped(
                f"{conversation.id}: max_length={self.max_length} leaves no image with a text after it, of "
                f"{len(conversation.media)} images"
            )
        return rendered

    def _checked(self, conversation: Conversation) -> Conversation:
        """The conversation without an empty system turn that the template does not support. Raises BadSample."""
        check_conversation(conversation)
        conversation = self._with_system_taken(conversation)
        if self._chat is not None:
            self._chat.check_words(conversation)
        return conversation

    def _unrendered(self, conversation: Conversation) -> str:
        """Text that is not rendered but counts towards `max_length`: the question, with ``plain``."""
        return "" if self._chat or self._is_document else conversation.turns[0].text.replace(IMAGE_MARK, "").strip()

    def _unseen(self, conversation: Conversation) -> int:
        words = self._unrendered(conversation)
        return len(self.tokenizer(words, add_special_tokens=False).input_ids) if words else 0

    def lengths(self, conversations: Sequence[Conversation], media: Sequence[MediaPlan]) -> list[int | None]:
        """Number of tokens of each rendered conversation; None where only rendering it can tell, and for bad ones.

        All texts are tokenized together, which is faster than to render each conversation.
        """
        texts: list[str] = []
        found: list[tuple[int, int, int] | None] = []  # tokens without texts, end of its texts, of those rendered
        for conversation, plan in zip(conversations, media, strict=True):
            try:
                rendered, unseen = self._texts(conversation, plan)
            except (BadSample, _Unusual):
                found.append(None)
                continue
            texts += rendered
            fixed = sum(placement.slots + placement.newlines for placement in plan.placements)
            fixed += self.shows_captions + 2 * (self.decoder_start is not None)
            found.append((fixed, len(texts), len(texts) + len(unseen)))
            texts += unseen
        counts = list(map(len, self.tokenizer(texts, add_special_tokens=False).input_ids)) if texts else []
        sums = [0, *accumulate(counts)]
        lengths, start = [], 0
        for each in found:
            if each is None:
                lengths.append(None)
                continue
            fixed, end, unseen = each
            length = fixed + sums[end] - sums[start]
            fits = length + sums[unseen] - sums[end] <= self.max_length
            lengths.append(length if fits else None)
            start = unseen
        return lengths

    def _texts(self, conversation: Conversation, media: MediaPlan) -> tuple[list[str], list[str]]:
        """Texts whose tokens are those of the rendered conversation, and texts that only count towards the limit.

        Raises _Unusual if the number of tokens depends on more than the texts, and BadSample.
        """
        conversation = self._checked(conversation)
        runs = [part for part in self._layout(conversation, media) if isinstance(part, list)]
        is_cut = _has_more(conversation) or any(answer == _DROPPED for run in runs for _, answer in run)
        if is_cut or not any(turn.weight for turn in conversation.turns if turn.role == "assistant"):
            raise _Unusual
        texts = ["".join(piece for piece, _ in run) for run in runs]
        return list(filter(None, texts)), list(filter(None, [self._unrendered(conversation)]))

    def showable(self, conversation: Conversation) -> Conversation:
        """The part of a held-out conversation that the template can render: captions have only one exchange.

        Raises BadSample if evaluation cannot use the annotations of its turns.
        """
        if conversation.others:
            raise BadSample(
                f"{conversation.id}: evaluation reads one dialogue per record, got {len(conversation.dialogues)}"
            )
        check_grading(conversation.id, conversation.turns)
        if not self.shows_captions:
            return conversation
        turns = tuple(turn for turn in conversation.turns if turn.role != "system")[:2]
        shown = sum(turn.text.count(IMAGE_MARK) for turn in turns if turn.role == "user")
        return replace(conversation, turns=turns, media=conversation.media[:shown])

    def excess(self, conversation: Conversation, media: MediaPlan) -> int:
        """Number of tokens by which a conversation, or a prompt, exceeds `max_length`. Raises BadSample."""
        if conversation.turns and conversation.turns[-1].role == "user":
            return len(self.prompt(conversation, media)) - self.max_length
        conversation = self._checked(conversation)
        return len(self._render(conversation, media)) + self._unseen(conversation) - self.max_length

    def prompt(self, conversation: Conversation, media: MediaPlan) -> Rendered:
        """Tokens up to the answer to generate; the conversation ends with a user turn."""
        check_content(conversation)
        conversation = self._with_system_taken(conversation)
        complete = (*conversation.turns, Turn("assistant", "answer"))
        rendered = self._render(replace(conversation, turns=complete), media)
        return rendered.until(rendered.answers[-1][0], rendered.answers[:-1])

    def decode(self, ids: Tensor | Sequence[int]) -> str:
        """Text of a generated answer, without its end and without special tokens that turns may not contain."""
        text = self.tokenizer.decode([number for number in torch.as_tensor(ids).tolist() if number not in self._hidden])
        return (text.split("\n")[0] if self.shows_captions else text).strip()

    def _render(self, conversation: Conversation, media: MediaPlan, place: float | None = None) -> Rendered:
        tokens: list[tuple[int, int, int]] = []  # id, the assistant turn and the placement to which it belongs, or -1
        encoded = None
        for part in self._layout(conversation, media):
            if isinstance(part, _Slots):
                tokens += self._shown(part)
            elif part is _DECODER:
                encoded = len(tokens) + 1
                tokens += [(self.tokenizer.eos_token_id, -1, -1), (self.decoder_start, -1, -1)]
            else:
                tokens += self._encode(part)
        if self.template == "prefix" and place is not None:
            begin = next((number for number, (_, answer, _) in enumerate(tokens) if answer == 0), len(tokens))
            middle = (len(tokens) - begin) // 2
            cut = begin + 1 + int(place * middle) if middle else begin
            prefix = [(token, -1, -1) for token, _, _ in tokens[begin:cut]]
            if encoded is None:
                tokens[begin:cut] = prefix
            else:  # before the end of the encoder's text
                tokens[encoded - 1 : cut] = prefix + tokens[encoded - 1 : begin]
                encoded += len(prefix)
        if self.shows_captions:
            # Appended as a token, because a full stop and a newline may merge, and generation stops at this token.
            tokens += [(token, 0, -1) for token in self.stop_ids[:1]]

        input_ids, answer, index = map(torch.tensor, zip(*tokens))
        trains = torch.cat([answer[1:] >= 0, torch.tensor([False])])
        of_turns = torch.tensor([turn.weight for turn in conversation.turns if turn.role == "assistant"])
        weights = torch.where(trains, of_turns[answer.roll(-1)], 0.0)
        targets = torch.where(weights > 0, input_ids.roll(-1), IGNORE)
        ranges = tuple(map(_range, (answer == turn for turn in range(int(answer.max()) + 1))))
        positions = None if self.rows is None else self.rows(index, media.placements)
        return Rendered(input_ids, targets, weights, index, ranges, media, positions, encoded=encoded)

    def _shown(self, slots: _Slots) -> list[tuple[int, int, int]]:
        """The slots of a placement and its newlines as tokens, see `_encode`."""
        row = [(self.slot, -1, slots.number)] * (slots.count // (slots.newlines or 1))
        return [*row, (self.newline, -1, -1)] * slots.newlines if slots.newlines else row

    def _spans(self, conversation: Conversation) -> list[Span]:
        if self._is_document:
            return self._document_spans(conversation)
        if self._chat is None:
            return self._plain_spans(conversation)
        if self.images_first:
            self._check_marks(conversation)
        try:
            texts = self._chat.around(conversation.turns)
        except ValueError as error:
            raise BadSample(f"{conversation.id}: {error}") from None
        spans, rest = [], texts[0]
        for index, (turn, after) in enumerate(zip(conversation.turns, texts[1:])):
            words = turn.text.strip()
            if turn.role == "user" and self._places_each_turns:
                before, _, rest = rest.partition(IMAGE_MARK)
                images = [IMAGE] * turn.text.count(IMAGE_MARK)
                spans += [Span(before), *images, Span(rest), Span(without_marks(words), is_words=True)]
                rest = after
                continue
            if turn.role != "assistant":
                spans.append(Span(rest))
                if self.images_first:
                    is_start = index == 0 and not self.places_images
                    spans.append(Span(without_marks(words), is_words=True, is_start=is_start))
                else:
                    spans += with_images(words) if turn.role == "user" else [Span(words, is_words=True)]
                rest = after
                continue
            # A space before the answer belongs to the answer, whether or not it merges with the first word, so that
            # prompts end in the same way ("ASSISTANT:") for every answer.
            before = rest.rstrip(" ")
            space = rest[len(before) :]
            spans.append(Span(before))
            number = sum(t.role == "assistant" for t in conversation.turns[:index])
            end = re.match(rf"\s*(?:{self._special.pattern})", after)
            if end is None:
                raise BadSample(
                    f"{conversation.id}: the chat template puts {after[:20]!r} after the assistant's text, which does "
                    "not start with an end-of-turn token of this tokenizer: choose another template, or add it with "
                    "llm.new_tokens"
                )
            spans += [Span(space + words, is_words=True, answer=number), Span(end.group(), answer=number)]
            rest = after[end.end() :]
        spans.append(Span(rest))
        if not self.images_first:
            return spans
        images = [IMAGE] * len(conversation.media)
        place = next((i for i, span in enumerate(spans) if not span.is_words and IMAGE_MARK in span.text), None)
        if place is None:
            return [*images, *spans]
        before, _, after = spans[place].text.partition(IMAGE_MARK)
        return [*spans[:place], Span(before), *images, Span(after), *spans[place + 1 :]]

    def template_texts(self, turns: Sequence[Turn]) -> list[str]:
        """The chat template's text before each turn and after the last one, see `ChatTexts.around`."""
        return self._chat.around(turns)

    def _with_system_taken(self, conversation: Conversation) -> Conversation:
        """The conversation, without an empty system turn if the template supports no system turn."""
        turns = conversation.turns
        reason = self._chat.no_system if self._chat else "it contains only images and answers"
        if reason is None or not turns or turns[0].role != "system":
            return conversation
        if is_silent(turns[0]):
            return replace(conversation, turns=turns[1:])
        raise BadSample(f"{conversation.id}: template={self.template} does not support a system turn: {reason}")

    def _check_marks(self, conversation: Conversation) -> None:
        """Raise BadSample for an image after an answer, because the answer would already see it in training."""
        spoken = [turn.text for turn in conversation.turns if turn.role == "user"]
        if any(IMAGE_MARK in text for text in spoken[1:]):
            raise BadSample(
                f"{conversation.id}: template={self.template} puts images first: later turns cannot have images"
            )

    @property
    def _starts_with_bos(self) -> bool:
        bos = self.tokenizer.bos_token_id
        return bos is not None and self.tokenizer("").input_ids[:1] == [bos]

    def _plain_spans(self, conversation: Conversation) -> list[Span]:
        if [turn.role for turn in conversation.turns] != ["user", "assistant"]:
            roles = ", ".join(turn.role for turn in conversation.turns)
            raise BadSample(f"{conversation.id}: template=plain requires one user and one assistant turn, got {roles}")
        user, assistant = conversation.turns
        spans = [Span(self.tokenizer.bos_token)] if self._starts_with_bos else []
        spans += [span for span in with_images(user.text) if span.is_image]
        return [*spans, Span(assistant.text.strip(), is_words=True, answer=0)]

    @property
    def document_template(self) -> str:
        """A chat template that writes conversations as ``interleaved`` does, if each turn of the user is a chunk."""
        start = self.tokenizer.bos_token if self._starts_with_bos else ""
        end = "{% if turn.role == 'assistant' %}" + self._chunk_end + "{% endif %}"
        return f"{start}{{% for turn in messages %}}{{{{ turn.content }}}}{end}{{% endfor %}}"

    def _document_spans(self, conversation: Conversation) -> list[Span]:
        spans, number = [Span(self.tokenizer.bos_token)] if self._starts_with_bos else [], -1
        for before, turn in zip((None, *conversation.turns), conversation.turns):
            words = turn.text.strip()
            if turn.role == "user":
                spans += with_images(words)
                continue
            number += 1
            spans.append(Span(words, is_words=True, answer=number))
            if self._chunk_end and before.text:  # a text without images is not a chunk
                spans.append(Span(self._chunk_end, answer=number))
        # OpenFlamingo's code does not train the end of a document, because nothing is trained after the end of a chunk
        return [*spans, Span(self.tokenizer.eos_token or "", answer=None if self._chunk_end else number)]

    def _layout(self, conversation: Conversation, media: MediaPlan) -> list[_Run | _Slots | object]:
        """The texts to tokenize, the slots of images between them, and `_DECODER` where the decoder begins."""
        parts: list[_Run | _Slots | object] = []
        shown = iter(media.by_medium)
        chunk: list[Span] = []  # text that is tokenized together
        spans = self._spans(conversation)
        if self.decoder_start is not None:
            spans = for_decoder(spans)
        for span in merged(spans) if self.shared else spans:
            if span.is_decoder:
                parts += [*self._runs(chunk), _DECODER]
                chunk = []
            if span.is_start:
                parts += self._runs(chunk)
                chunk = []
            if span.is_image:
                for number, placement in next(shown):
                    before = "" if span.follows else placement.before
                    parts += self._runs([*chunk, Span(before)])
                    parts.append(_Slots(number, placement.slots, placement.newlines))
                    chunk = [Span(placement.after)]
                    if not self.shared:  # the text after an image starts anew
                        parts += self._runs(chunk)
                        chunk = []
            else:
                chunk.append(span)
        return parts + self._runs(chunk)

    def _runs(self, spans: list[Span]) -> list[_Run]:
        """Consecutive text spans as texts to tokenize.

        The spans are tokenized as one string, as in the language model's own training. Special-token strings in the
        text of a turn are cut after their first character, so that the tokenizer never sees a complete one.
        """
        runs: list[_Run] = []
        run: _Run = []
        for span in spans:
            answer = -1 if span.answer is None else span.answer
            position = 0
            while span.is_words and (match := self._special.search(span.text, position)):
                cut = match.start() + 1
                runs.append([*run, (span.text[position:cut], answer)])
                run = [(_AFTER_CUT, _DROPPED)]
                position = cut
            run.append((span.text[position:], answer))
        return [*runs, run]

    def _encode(self, run: _Run) -> list[tuple[int, int, int]]:
        """Token ids of a run, each with the assistant turn to which it belongs (or -1), and -1."""
        text = "".join(piece for piece, _ in run)
        if not text:
            return []
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ends = list(accumulate(len(piece) for piece, _ in run))
        out = []
        for token, (start, end) in zip(encoded.input_ids, encoded.offset_mapping):
            # A token across two spans (" answer" after "ASSISTANT:") belongs to the span in which it ends.
            # Trailing white space of a token does not count.
            end = start + len(text[start:end].rstrip()) if text[start:end].strip() else end
            out.append((token, run[bisect_left(ends, max(end, 1))][1]))
        return [(token, answer, -1) for token, answer in out if answer != _DROPPED]


class _Unusual(Exception):
    """A conversation that must be rendered to know its length."""


_AFTER_CUT, _DROPPED = "\n", -2
"""Prefix of a text that continues after a cut, so that the tokenizer does not treat it as a beginning and add a
space; the tokens of the prefix are dropped."""

_DECODER = object()
"""Place at which the encoder's text ends and the decoder's begins."""


def _range(belongs: Tensor) -> tuple[int, int]:
    """The first and the last position that belong to an answer; (0, 0) if none does."""
    found = belongs.nonzero()
    return (int(found[0]), int(found[-1]) + 1) if len(found) else (0, 0)


def _has_more(conversation: Conversation) -> bool:
    """Whether a document has more images than its window shows."""
    most = conversation.window.images
    return most is not None and len(conversation.media) > most
