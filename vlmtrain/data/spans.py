"""Spans: the sections of a conversation's text, before it is tokenized."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from .records import IMAGE_MARK


@dataclass(frozen=True)
class Span:
    """A section of the rendered text. `answer` is the index of the assistant turn that it trains, if any."""

    text: str
    is_words: bool = False
    answer: int | None = None
    is_image: bool = False
    is_start: bool = False  # tokenized separately from the text before it
    follows: bool = False  # an image that shares the token before it with another image
    is_decoder: bool = False  # first of those of the decoder


IMAGE = Span("", is_image=True)


def with_images(words: str) -> list[Span]:
    """The text of a turn and its images, in order."""
    first, *rest = words.split(IMAGE_MARK)
    spans = [Span(first, is_words=True)]
    for piece in rest:
        spans += [IMAGE, Span(piece, is_words=True)]
    return spans


def without_marks(words: str) -> str:
    """Text without image marks and the white space around them."""
    return re.sub(rf"\s*{re.escape(IMAGE_MARK)}\s*", " ", words).strip()


def for_decoder(spans: Sequence[Span]) -> list[Span]:
    """The spans for an encoder-decoder model: only the last answer is the decoder's, without text after it."""
    last = max(span.answer for span in spans if span.answer is not None)
    first = next(number for number, span in enumerate(spans) if span.answer == last)
    encoded = (replace(span, answer=None) for span in spans[:first])
    begin = replace(spans[first], text=spans[first].text.lstrip(" "), is_decoder=True)
    return [*encoded, begin, *(span for span in spans[first + 1 :] if span.answer == last)]


def merged(spans: Sequence[Span]) -> list[Span]:
    """The spans without spaces next to images, and images with nothing between them as such that follow each other."""
    found: list[Span] = []
    after = False  # whether there is nothing but an image before
    for span in spans:
        if span.is_image:
            while found and not found[-1].is_image and not found[-1].text.rstrip(" "):
                found.pop()
            follows = bool(found) and found[-1].is_image
            if found and not follows:
                found[-1] = replace(found[-1], text=found[-1].text.rstrip(" "))
            found.append(replace(span, follows=follows))
        else:
            found.append(replace(span, text=span.text.lstrip(" ")) if after else span)
        after = span.is_image or (after and not found[-1].text)
    return found
